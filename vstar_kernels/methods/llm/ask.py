"""Asks a language model until its answer has a form.

The caller gives a conversation and a pydantic model, the form of the answer. :func:`ask` tells the
model the form, validates what comes, and sends it back with what is wrong until it is right.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from vstar_kernels.methods.llm.cache import Cache
from vstar_kernels.reading import FormatError, clean, decode, shorten, validate

if TYPE_CHECKING:
    from pydantic import BaseModel

LARGEST_REPEATED = 2**14  # characters of an unusable answer that are sent back

Messages = list[dict[str, str]]
Form = TypeVar("Form", bound="BaseModel")


class AnswerError(RuntimeError):
    """A language model gave no answer that can be used; the message says why."""


class NoText(AnswerError):  # noqa: N818
    """A response came, and there is no answer in it; another one may have it."""


@runtime_checkable
class LanguageModel(Protocol):
    """Answers conversations.

    Attributes:
        name: For messages.
        key: What answers depend on beside the conversation, as JSON takes it; None if answers are
            not to be kept.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> dict[str, Any] | None: ...

    def answer(self, messages: Messages, schema: dict[str, Any]) -> str:
        """Returns a text that should be JSON of this schema.

        Raises:
            AnswerError: There is none.
        """

    def redact(self, text: str) -> str:
        """Returns a text without the secrets that are used to ask."""


def ask(
    model: LanguageModel,
    messages: Messages,
    form: type[Form],
    *,
    attempts: int = 3,
    cache: Cache | None = None,
    refresh: bool = False,
) -> Form:
    """Asks a language model until its answer has the form that is wanted.

    Args:
        model: Such as an :class:`Endpoint` or a :class:`ChatModel`.
        messages: The conversation, which ends with the question; the form is added to that.
        form: A pydantic model with all fields required and no others allowed, as servers want it.
            Its validators say what else is wrong with an answer, in words for the language model.
        attempts: How many answers to ask for, at most.
        cache: Keeps the answers, if the model has a key.
        refresh: Whether to ask even for what the cache has.

    Raises:
        AnswerError: There is no such answer; the message says what came.
    """
    schema = form.model_json_schema()
    if cache is None or model.key is None:
        return _ask_until_valid(model, _with_schema(messages, schema), form, schema, attempts)
    request = {"model": model.key, "messages": messages, "schema": schema}
    answer = None if refresh else cache.get(request, form)
    if answer is None:
        answer = ask(model, messages, form, attempts=attempts)
        cache.put(request, answer)
    return answer


def _ask_until_valid(
    model: LanguageModel,
    messages: Messages,
    form: type[Form],
    schema: dict[str, Any],
    attempts: int,
) -> Form:
    conversation, problems = messages, []
    for _ in range(attempts):
        try:
            text = model.answer(conversation, schema)
        except NoText as error:
            problems.append(str(error))
            continue
        answer = model.redact(clean(text))
        try:
            return validate(form, _decode_answer(answer, model))
        except FormatError as error:
            problem = model.redact(str(error))
        problems.append(f"{problem}, in {shorten(answer)!r}")
        conversation = [*messages, *_correction(answer, problem)]
    if len(problems) == 1:
        raise AnswerError(problems[0])
    listed = (f"attempt {number}: {problem}" for number, problem in enumerate(problems, start=1))
    raise AnswerError("; ".join(listed))


def _with_schema(messages: Messages, schema: dict[str, Any]) -> Messages:
    """Returns a conversation whose last message asks for JSON of a schema.

    Servers that hold the answer to the schema want it said as well, and others have nothing else.
    """
    *before, question = messages
    wanted = f"Answer with one JSON object of this schema, and nothing else:\n{json.dumps(schema)}"
    return [*before, {**question, "content": f"{question['content']}\n\n{wanted}"}]


def _decode_answer(text: str, model: LanguageModel) -> Any:
    """Returns the JSON object in an answer, which may be in a code fence, or follow reasoning."""
    text = text.rpartition("</think>")[2].strip()
    if not text:
        raise FormatError("the answer is empty")
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        raise FormatError("the answer has no complete JSON object")
    return decode(text[start : end + 1], lambda found: model.redact(clean(found)))


def _correction(answer: str, problem: str) -> Messages:
    """Returns how a conversation goes on after an answer that cannot be used."""
    demand = f"That cannot be used: {problem}. Answer with the JSON object alone."
    return [
        {"role": "assistant", "content": answer[:LARGEST_REPEATED]},
        {"role": "user", "content": demand},
    ]
