"""Reads what comes from outside: text is cleaned, JSON decoded and its fields validated strictly.

Answers of language models, files and cache entries all come in here. What is wrong with one of them
is a :class:`FormatError` with the path to the field, whatever it was that came.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

SHOWN = 300  # characters of somebody else's text in a message
SHOWN_ERRORS = 3  # of a document with many
SHOWN_STEPS, SHOWN_STEP = 8, 40  # of a path, the last ones; characters of each
LARGEST_FILE = 2**26  # bytes
MOST_REPEATED = 10**7  # characters and values that a YAML document's anchors may add to it
LONGEST_INTEGER = 309  # characters; those of the largest float
KEY = "[key]"  # what pydantic adds to the path where a key, not its value, is wrong
# What pydantic says in other words.
WITHOUT_INPUT = {"missing": "it is missing", "extra_forbidden": "there is no such field"}
MESSAGES = {"model_type": "it must be a JSON object"}
Clean = Callable[[str], str]
Form = TypeVar("Form", bound="BaseModel")
Built = TypeVar("Built")

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
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
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


class _Problem:
    """Stands in decoded JSON in the place of what cannot be read, so that its path can be told."""

    def __init__(self, message: str) -> None:
        self.message = message


def read_bytes(path: str | Path, largest: int = LARGEST_FILE) -> bytes:
    """Returns the content of a file, and does not wait for whoever writes into a pipe.

    Raises:
        OSError: It cannot be read, is no regular file, or has more bytes than the largest.
    """
    with open(path, "rb", opener=_open_regular) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(f"{path} has more than {largest} bytes")
    return content


def read_text(path: str | Path, largest: int = LARGEST_FILE) -> str:
    """Returns the text of a file, as :func:`read_bytes` its content.

    Raises:
        OSError: See there.
        FormatError: It is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is not a regular file")


def decode(text: str, clean: Clean = clean) -> Any:
    """Decodes JSON, and cleans all texts and names in it.

    Raises:
        FormatError: It is not JSON, is nested too deeply, has a name twice in one object, or a
            number that no float can hold; the message has the path to it.
    """
    problems = []

    def refuse(message: str) -> _Problem:
        problems.append(_Problem(message))
        return problems[-1]

    def cleaned(value: Any) -> Any:
        """Cleans the texts in a value; objects in it have been cleaned when they were made."""
        if isinstance(value, str):
            return clean(value)
        if isinstance(value, list):
            return [cleaned(item) if isinstance(item, str | list) else item for item in value]
        return value

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            name = clean(name)
            made[name] = refuse("it is there twice") if name in made else cleaned(value)
        return made

    def make_integer(digits: str) -> Any:
        if len(digits) <= LONGEST_INTEGER:
            return int(digits)
        return refuse(f"{shorten(digits, 20)} is a number of too many digits")

    def make_float(digits: str) -> Any:
        value = float(digits)
        return value if math.isfinite(value) else refuse(f"{shorten(digits, 20)} is too large")

    try:
        decoded = cleaned(
            json.loads(
                text,
                object_pairs_hook=make_object,
                parse_int=make_integer,
                parse_float=make_float,
                parse_constant=lambda name: refuse(f"{name} is not a number in JSON"),
            )
        )
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"it is not JSON: {error}") from None
    if problems:
        raise FormatError(_first_problem(decoded))
    return decoded


def decode_yaml(text: str) -> Any:
    """Decodes YAML of what JSON has too, as strictly as :func:`decode`.

    Raises:
        ImportError: PyYAML is not installed.
        FormatError: See :func:`decode`; of a key that is there twice, the message has the lines.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"YAML needs PyYAML ({error}); JSON needs nothing") from error
    loader: Any = None
    try:
        loader = _yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(loader, node)
        _check_anchors(node)
        return decode(json.dumps(loader.construct_document(node)))
    except RecursionError:
        raise FormatError("it is nested too deeply") from None
    except FormatError:
        raise
    # PyYAML raises whatever comes of a text that is not what its tag says; dates are not of JSON.
    except (
        yaml.YAMLError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise FormatError(f"it is not YAML of texts, numbers, lists and objects: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


@functools.cache
def _yaml_loader() -> Any:
    """Returns PyYAML's safe loader, which reads 1e30 as a number, as YAML 1.2 and JSON have it."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return loader


def _check_keys(loader: Any, root: Any) -> None:
    """Raises FormatError where an object has a key twice, of which PyYAML takes the last."""
    import yaml

    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # by an anchor, also within itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        if not isinstance(node, yaml.MappingNode):
            continue
        waiting += reversed([value for _, value in node.value])
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name of an object in JSON: refused later
            is_merge = key.tag == "tag:yaml.org,2002:merge"  # of another object, <<
            name = key.value if is_merge else loader.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                raise FormatError(
                    f"line {line}: {shorten(key.value)} is there twice, first in line {lines[name]}"
                )
            lines[name] = line


def _check_anchors(root: Any) -> None:
    """Raises FormatError where anchors of anchors make a huge document of a small text."""
    sizes: dict[int, int] = {}  # of nodes with all within them, in values and their characters
    written = 0  # of what was met so far, each counted once
    waiting = [(root, False)]
    while waiting:
        node, is_counted_within = waiting.pop()
        if is_counted_within:
            sizes[id(node)] += sum(sizes[id(within)] for within in _within(node))
            if sizes[id(node)] - written > MOST_REPEATED:
                raise FormatError(f"its anchors repeat more than {MOST_REPEATED:,} characters")
        elif id(node) not in sizes:  # what is within itself is refused later
            sizes[id(node)] = 1 + (len(node.value) if node.id == "scalar" else 0)
            written += sizes[id(node)]
            waiting.append((node, True))
            waiting += [(within, False) for within in _within(node)]


def _within(node: Any) -> list[Any]:
    """Returns the nodes of a list, and the keys and values of an object."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _first_problem(decoded: Any) -> str:
    """Returns the first problem that is found in decoded JSON, behind its path."""
    waiting: list[tuple[Any, Any]] = [((), decoded)]  # a path is a pair: the path above, a step
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _Problem):
            steps: list[str | int] = []
            while path:
                path, step = path
                steps.append(step)
            return _located(steps[::-1], value.message)
        if isinstance(value, dict):
            waiting += [((path, name), item) for name, item in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [((path, index), value[index]) for index in reversed(range(len(value)))]
    raise AssertionError("there is no problem")


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
        raise format_error(error) from None


def build(make: Callable[..., Built], fields: Mapping[str, Any]) -> Built:
    """Returns what is made of fields that were read.

    Raises:
        FormatError: It cannot be made of them.
    """
    try:
        return make(**fields)
    except ValueError as error:
        raise FormatError(shorten(str(error))) from None


def format_error(error: ValidationError) -> FormatError:
    """Returns one of pydantic's errors in one line, with the paths to the fields."""
    problems = error.errors(include_url=False)
    described = [_describe(problem) for problem in problems[:SHOWN_ERRORS]]
    if len(problems) > SHOWN_ERRORS:
        described.append(f"and {len(problems) - SHOWN_ERRORS} more")
    return FormatError("; ".join(described))


def require_pydantic() -> None:
    """Raises ImportError, with what to install, unless there is pydantic."""
    try:
        import pydantic  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"what comes from outside is read with pydantic ({error}): "
            "pip install 'vstar_kernels[synopsis]'"
        ) from error


def hidden(tag: str) -> str:
    """Returns a tag for a choice of forms, in which paths leave it out.

    No name in a document is like it: names are cleaned of control characters.
    """
    return f"\0{tag}"


def _describe(problem: Any) -> str:
    """Returns one of pydantic's errors, as "stages[1]: Input should be a valid string, got int"."""
    if problem["type"] == "value_error":  # of our own validators, which say what was given
        message = str(problem["ctx"]["error"])
    elif problem["type"] in WITHOUT_INPUT:
        message = WITHOUT_INPUT[problem["type"]]
    else:
        message = MESSAGES.get(problem["type"], problem["msg"])
        message += f", got {type(problem['input']).__name__}"
    steps = [step for step in problem["loc"] if not str(step).startswith("\0")]
    if problem["type"] == "value_error" and steps[-1:] == [KEY]:
        steps.pop()
    return _located(steps, message)


def _located(steps: Sequence[str | int], message: str) -> str:
    """Returns a message behind the path to what it is about, in one short line."""
    names = (
        f"[{step}]" if isinstance(step, int) else f".{shorten(step, SHOWN_STEP)}"
        for step in steps[-SHOWN_STEPS:]
    )
    path = "".join(names).removeprefix(".")
    if len(steps) > SHOWN_STEPS:
        path = f"….{path}"
    return shorten(f"{path}: {message}" if path else message)
