"""Writes synopses (VSTAR, §3.4): what a language model is told, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.methods.arguments import check_integer, check_text
from vstar_kernels.methods.llm.ask import AnswerError, LanguageModel, Messages
from vstar_kernels.methods.vstar.synopsis import Synopsis, synopses_of
from vstar_kernels.methods.writers import Writer
from vstar_kernels.reading import (
    FormatError,
    clean,
    decode,
    read_text,
    require_pydantic,
    shorten,
    validate,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

LEAST_STAGES, MOST_STAGES = 2, 12

RULES = """\
You plan short videos in which something visibly changes. You get one sentence about the whole \
video. Split the change into consecutive stages of about equal length and describe each of them.

- One sentence of at most 25 words for each stage: what a still picture of that stage shows.
- Every sentence is read alone. Name the subject and the place each time; no "it", "then" or "now".
- Subject, place, viewpoint and style stay the same; only what the change affects differs, and \
each stage differs visibly from the one before.
- Begin with the state before the change and end with the state after it."""

EXAMPLE_PROMPT = "A candle burns down on a windowsill at night, time lapse."
EXAMPLE_STAGES = [
    "A tall new candle with a small first flame on a dark windowsill at night.",
    "A tall candle with a bright steady flame on a dark windowsill at night, wax beginning to run.",
    "A half-burnt candle with a bright flame on a dark windowsill at night, wax pooled below it.",
    "A short candle stub with a low flame on a dark windowsill at night, in a wide pool of wax.",
    "A burnt-out candle, a thread of smoke over flat wax on a dark windowsill at night.",
]


class SynopsisError(RuntimeError):
    """There is no synopsis; the message says why."""


class SynopsisFile:
    """A file of synopses, or a language model's answer that was saved.

    It holds JSON: an object ``{"prompt": …, "stages": […]}``, or a list of them, of which the
    prompt chooses one, ``"subprompts"`` being another name for ``"stages"``; or the answer to any
    prompt, ``{"stages": […]}`` or the list of stages alone.

    Raises:
        ImportError: ``pydantic`` is not installed.
    """

    key = None

    def __init__(self, path: str | Path) -> None:
        require_pydantic()
        self._path = Path(path)
        self.name = f"the file {self._path}"

    def find(self, prompt: str, fewest: int, most: int) -> Synopsis:
        """Returns the file's synopsis of a prompt.

        Raises:
            ValueError, OSError: The file cannot be read, or has no synopsis of this prompt.
        """
        try:
            content = decode(read_text(self._path))
        except OSError as error:
            raise OSError(f"it cannot be read: {error}") from None
        except FormatError as error:
            expected = 'expected {"prompt": …, "stages": […]}, a list of those, or {"stages": […]}'
            raise FormatError(f"{error}; {expected}") from None
        if isinstance(content, list) and content and all(isinstance(x, str) for x in content):
            content = {"stages": content}
        if isinstance(content, dict) and content.keys() == {"stages"}:
            return _synopsis(prompt, validate(stages_form(fewest, most), content))
        synopses = synopses_of(content)
        for synopsis in synopses:
            if synopsis.prompt == clean(prompt):
                check_number(len(synopsis.stages), fewest, most)
                return synopsis
        there = ", ".join(repr(synopsis.prompt) for synopsis in synopses)
        raise ValueError(f"it has none, but synopses of {shorten(there)}")


class SynopsisWriter(Writer):
    """Video synopsis prompting: splits a prompt into stages (VSTAR, arXiv 2403.13501, §3.4).

    >>> writer = vk.SynopsisWriter.from_endpoint("llama3", base_url="http://localhost:11434/v1")
    >>> writer.write("A rose blooms in a garden.", num_stages=4)

    A language model is told the rules, the form of the answer (JSON of a schema, which servers that
    can do so hold it to) and one example. An answer of another form, or with the wrong number of
    stages, is sent back with what is wrong.

    Args:
        source: What answers; see :meth:`from_endpoint`, :meth:`from_transformers` and
            :meth:`from_file`.
        least_stages, most_stages: How many stages a synopsis may have.
        **settings: ``attempts`` and ``cache``, see :class:`vstar_kernels.methods.writers.Writer`.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or out of its range.
    """

    file_type = SynopsisFile

    def __init__(
        self,
        source: LanguageModel | SynopsisFile,
        *,
        least_stages: int = LEAST_STAGES,
        most_stages: int = MOST_STAGES,
        **settings: Any,
    ) -> None:
        check_integer("least_stages", least_stages, 1)
        check_integer("most_stages", most_stages, 1)
        if least_stages > most_stages:
            raise ValueError(
                f"least_stages must be at most most_stages, got {least_stages} and {most_stages}"
            )
        super().__init__(source, **settings)
        self._limits = least_stages, most_stages

    def write(
        self, prompt: str, *, num_stages: int | None = None, refresh: bool = False
    ) -> Synopsis:
        """Returns the synopsis of a prompt.

        Args:
            prompt: The video as a whole, in a sentence.
            num_stages: How many stages; None leaves it to the source, within the limits.
            refresh: Ask even if there is an answer in the cache, and replace that.

        Raises:
            SynopsisError: The source has none after all attempts; the message says what came.
            TypeError, ValueError: The prompt is no text or empty, or num_stages is no integer or
                outside of the limits.
        """
        check_text("prompt", prompt)
        check_flag(refresh, "refresh")
        fewest, most = self._limits
        if num_stages is not None:
            check_integer("num_stages", num_stages, fewest, most)
            fewest = most = num_stages
        try:
            if isinstance(self._source, SynopsisFile):
                return self._source.find(prompt, fewest, most)
            answer = self._ask(
                conversation(prompt, fewest, most), stages_form(fewest, most), refresh=refresh
            )
            return _synopsis(prompt, answer)
        except (AnswerError, ValueError, OSError) as error:
            problem = f"no synopsis of {prompt!r} from {self._source.name}: {error}"
        raise SynopsisError(problem)


def conversation(prompt: str, fewest: int, most: int) -> Messages:
    """Returns what a language model is asked: the rules, one example, and the question."""
    example_count = len(EXAMPLE_STAGES)
    example = json.dumps({"stages": EXAMPLE_STAGES}, ensure_ascii=False)
    return [
        {"role": "system", "content": RULES},
        {"role": "user", "content": _question(EXAMPLE_PROMPT, example_count, example_count)},
        {"role": "assistant", "content": example},
        {"role": "user", "content": _question(prompt, fewest, most)},
    ]


def stages_form(fewest: int, most: int) -> type[BaseModel]:
    """Returns the form of an answer: a pydantic model with so many stages, each with text."""
    from pydantic import BaseModel, ConfigDict, Field, field_validator

    class Stages(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        # For servers that hold the answer to them; our own check has the better message.
        stages: list[str] = Field(
            fail_fast=True, json_schema_extra={"minItems": fewest, "maxItems": most}
        )

        @field_validator("stages", mode="before")
        @classmethod
        def count(cls, stages: Any) -> Any:
            if isinstance(stages, list):
                check_number(len(stages), fewest, most)
            return stages

        @field_validator("stages")
        @classmethod
        def tidy(cls, stages: list[str]) -> list[str]:
            stages = [" ".join(stage.split()) for stage in stages]
            for number, stage in enumerate(stages, start=1):
                if not any(map(str.isalpha, stage)):
                    raise ValueError(f"stage {number} has no text")
            return stages

    return Stages


def check_number(number: int, fewest: int, most: int) -> None:
    """Raises ValueError unless there are as many stages as were asked for."""
    if not fewest <= number <= most:
        raise ValueError(f"expected {_range(fewest, most)} stages, found {number}")


def _synopsis(prompt: str, answer: BaseModel) -> Synopsis:
    return Synopsis(prompt, answer.model_dump()["stages"])


def _question(prompt: str, fewest: int, most: int) -> str:
    return f"Video: {prompt}\nNumber of stages: {_range(fewest, most)}"


def _range(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest} to {most}"
