"""Reads what comes from outside: text is cleaned, JSON decoded and its fields validated strictly.

Answers of language models, files and cache entries all come in here. What is wrong with one of them
is a :class:`FormatError` with the path to the field, whatever it was that came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

SHOWN = 300  # characters of somebody else's text in a message
SHOWN_ERRORS = 3  # of a document with many
# What pydantic says in other words.
WITHOUT_INPUT = {"missing": "it is missing", "extra_forbidden": "there is no such field"}
MESSAGES = {"model_type": "it must be a JSON object"}
Clean = Callable[[str], str]
Form = TypeVar("Form", bound="BaseModel")

# What terminals obey (ECMA-48): control sequences, and control strings with their contents. Each
# class excludes the character that the whole begins with, so that no text is scanned twice.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90-\x9f]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# Controls, marks of direction, by which text is shown in another order than it has, and halves of
# surrogate pairs, which no encoding can write.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


class FormatError(ValueError):
    """Something from outside does not have the form that it should have; the message says where."""


def clean(text: str) -> str:
    """Returns a text without control characters and escape sequences, but with its line breaks."""
    if text.isprintable():
        return text
    return _CONTROL.sub("", _SEQUENCE.sub("", text)).replace("\r\n", "\n").replace("\r", "\n")


def shorten(text: str, limit: int = SHOWN) -> str:
    """Returns a text as messages show it: cleaned, on one line, of limited length."""
    text = " ".join(clean(text).split())
    return text if len(text) <= limit else text[:limit] + "…"


def decode(text: str, clean: Clean = clean) -> Any:
    """Decodes JSON, and cleans all texts and names in it.

    Raises:
        FormatError: It is not JSON, is nested too deeply, or has a name twice in one object.
    """

    def cleaned(value: Any) -> Any:
        """Cleans the texts in a value; objects in it have been cleaned when they were made."""
        if isinstance(value, str):
            return clean(value)
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            name = clean(name)
            if name in made:
                raise FormatError(f"it has the key {shorten(name)!r} twice")
            made[name] = cleaned(value)
        return made

    def refuse(constant: str) -> Any:
        raise FormatError(f"{constant} is not a number in JSON")

    try:
        return cleaned(json.loads(text, object_pairs_hook=make_object, parse_constant=refuse))
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"it is not JSON: {error}") from None
    except FormatError:
        raise
    except ValueError:  # Python reads no integers of thousands of digits
        raise FormatError("it has a number of too many digits") from None


def validate(form: type[Form], value: Any) -> Form:
    """Validates a decoded value by a pydantic model, strictly.

    Lists in the model are to stop at their first error (``fail_fast``): pydantic takes a second to
    describe half a million.

    Raises:
        FormatError: It does not have that form; the message names the fields, as ``stages[1]``.
    """
    from pydantic import ValidationError

    try:
        return form.model_validate(value, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    described = [_describe(problem) for problem in problems[:SHOWN_ERRORS]]
    if len(problems) > SHOWN_ERRORS:
        described.append(f"and {len(problems) - SHOWN_ERRORS} more")
    raise FormatError("; ".join(described))


def require_pydantic() -> None:
    """Raises ImportError, with what to install, unless there is pydantic."""
    try:
        import pydantic  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"what comes from outside is read with pydantic ({error}): "
            "pip install 'vstar_kernels[synopsis]'"
        ) from error


def _describe(problem: Any) -> str:
    """Returns one of pydantic's errors as "stages[1]: Input should be a valid string, got int"."""
    names = (
        f"[{step}]" if isinstance(step, int) else f".{shorten(step)}" for step in problem["loc"]
    )
    path = "".join(names).removeprefix(".")
    if problem["type"] == "value_error":  # of our own validators, which say what was given
        message = str(problem["ctx"]["error"])
    elif problem["type"] in WITHOUT_INPUT:
        message = WITHOUT_INPUT[problem["type"]]
    else:
        message = MESSAGES.get(problem["type"], problem["msg"])
        message += f", got {type(problem['input']).__name__}"
    return f"{path}: {message}" if path else message
