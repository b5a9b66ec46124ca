"""Many videos from one file: the options of each, and what decides its results."""

from __future__ import annotations

import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from vstar_kernels.cli.generate.options import GenerateOptions
from vstar_kernels.cli.generate.regularization import CHANGES, ConfigText, Regularization
from vstar_kernels.cli.jobs import Job
from vstar_kernels.cli.options import CommandError
from vstar_kernels.documents import Document
from vstar_kernels.methods.llm.endpoint import MODEL_VARIABLE
from vstar_kernels.methods.starvid.config import GuidanceConfig
from vstar_kernels.methods.starvid.trajectory import Trajectory
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.models.grid.embedding import LARGEST_EMBEDDING
from vstar_kernels.reading import FormatError, decode, read_bytes, read_text, shorten

GROUPS = ("video", "synopsis", "regularization", "grid", "plan", "output")
# Of all videos of a command, which a file's lines do not choose.
COMMON = {"model", "adapter", "device", "output", "overwrite"}
# What does not decide what comes out.
IRRELEVANT = {"device", "output", "overwrite", "refresh", "writer_url"}
# Of each at most one is given, and in a line it takes the place of the command's, whose changes of
# it are dropped, too.
ALTERNATIVES = {("preset", "config", "no_tar"): tuple(CHANGES), ("map_steps", "no_maps"): ()}
MOST_LINES = 100_000
# Of files whose lines are no prompts, by the ends of their names.
NOT_OF_LINES = {".json": "JSON", ".csv": "a table", ".tsv": "a table"} | dict.fromkeys(
    (".yaml", ".yml"), "YAML"
)
SHOWN = 200  # characters of a line's mistake


def read_prompts(path: Path, base: GenerateOptions) -> list[Job]:
    """Reads the videos that a file asks for.

    It is text, a prompt a line, or JSON Lines: objects whose fields are options, ``prompt`` and
    ``seed`` say, and ``name``. Options that a line leaves out are those of the command. Documents
    (``synopsis``, ``plan``, ``config``, ``guidance``) may be in the line itself. Files are looked
    for from the folder that the file is in.

    Raises:
        CommandError: It cannot be read, is empty, or a line is wrong; the message names the line.
    """
    try:
        numbered = lines_of(read_text(path))
    except (OSError, FormatError) as error:
        raise CommandError(f"--prompts: {path}: {error}") from error
    if not 0 < len(numbered) <= MOST_LINES:
        found = f"{len(numbered)} lines" if numbered else "no line with a prompt"
        raise CommandError(f"--prompts: {path} must have 1 to {MOST_LINES} lines, has {found}")
    is_json = path.suffix.lower() == ".jsonl" or numbered[0][1].startswith("{")
    if not is_json and (kind := NOT_OF_LINES.get(path.suffix.lower())):
        raise CommandError(
            f"--prompts: {path} is {kind}: it must be a text, a prompt a line, or JSON Lines, "
            "objects; vstar-kernels study reads others"
        )
    jobs = []
    for number, line in numbered:
        try:
            changes = decode(line) if is_json else {"prompt": line}
            if not isinstance(changes, dict):
                raise FormatError(f"a line must be a JSON object, got {shorten(line, 40)}")
            jobs.append(make_job(base, changes, path.parent))
        except (CommandError, ValueError, TypeError) as error:
            raise CommandError(f"--prompts: {path}, line {number}: {error}") from error
    return jobs


def lines_of(text: str) -> list[tuple[int, str]]:
    """Returns the lines that are not empty, with their numbers.

    Line separators of Unicode (U+2028, U+0085 …) do not end a line: JSON may have them in texts.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def make_job(base: GenerateOptions, changes: Mapping[str, Any], folder: Path) -> Job:
    """Returns the job of one video.

    Args:
        base: The options that are not changed.
        changes: Options as JSON has them, by the names of their fields, and ``name``.
        folder: From which files are looked for.

    Raises:
        CommandError, ValueError, TypeError: An option is unknown or wrong; the message names it.
    """
    changes = dict(changes)
    name = changes.pop("name", None)
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ValueError(f"name must be a text, got {name!r}")
    options = with_changes(base, changes, folder)
    options.check_complete()
    Regularization.read(options.regularization)
    return Job(_title(options) if name is None else name, options, key_of(options))


def with_changes(
    base: GenerateOptions, changes: Mapping[str, Any], folder: Path
) -> GenerateOptions:
    """Returns options of which some are changed; arguments and errors as :func:`make_job`'s."""
    known = {
        name: (group, hint)
        for group in GROUPS
        for name, hint in typing.get_type_hints(
            type(getattr(base, group)), include_extras=True
        ).items()
        if name not in COMMON
    }
    if unknown := [name for name in changes if name not in known]:
        if unknown[0] in COMMON:
            raise ValueError(f"{unknown[0]} is one for all videos: give the command --{unknown[0]}")
        raise ValueError(f"there is no option {unknown[0]!r}; there are {', '.join(known)}, name")
    for names in ALTERNATIVES:
        given = [name for name in names if changes.get(name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one")
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for names, of_these in ALTERNATIVES.items():
        if not changes.keys().isdisjoint(names):
            for name in (*names, *of_these):
                groups[known[name][0]][name] = _default(base, known[name][0], name)
    for name, value in changes.items():
        group, hint = known[name]
        if value is None:
            groups[group][name] = _default(base, group, name)
            continue
        try:
            groups[group][name] = _read(name, hint, value, changes, folder)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} {error}") from error
    parts = {
        group: replace(getattr(base, group), **values) for group, values in groups.items() if values
    }
    return replace(_plain(base), **parts)


def without_alternatives(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options but those in whose place others come: a ``preset``, where ``no_tar`` does."""
    replaced = {
        name
        for names, of_these in ALTERNATIVES.items()
        if not given.keys().isdisjoint(names)
        for name in (*names, *of_these)
    }
    return {name: value for name, value in options.items() if name not in replaced}


def key_of(options: GenerateOptions) -> dict[str, Any]:
    """Returns all that decides a video as JSON; of files, their contents."""
    key = {
        field.name: _as_json(getattr(getattr(options, group), field.name))
        for group in GROUPS
        for field in fields(getattr(options, group))
        if field.name not in IRRELEVANT
    }
    # They came later than folders that have a key.
    key = {name: x for name, x in key.items() if x is not None or name not in CHANGES}
    if options.synopsis.has_endpoint and key["writer"] is None:
        key["writer"] = os.environ.get(MODEL_VARIABLE, "")  # --writer-url alone is a writer, too
    return key


def _plain(options: GenerateOptions) -> GenerateOptions:
    """Returns the options of one video alone, of a command that has others too."""
    return GenerateOptions(**{group: getattr(options, group) for group in GROUPS})


def _title(options: GenerateOptions) -> str:
    """Returns what a video is called: its text."""
    if options.video.prompt is not None:
        return options.video.prompt
    for document in (options.synopsis.synopsis, options.plan.plan):
        if document is not None:
            return document.stem if isinstance(document, Path) else document.prompt
    raise AssertionError("a job has a text")


def _default(base: GenerateOptions, group: str, name: str) -> Any:
    (found,) = (field for field in fields(getattr(base, group)) if field.name == name)
    return found.default


def _read(name: str, hint: Any, value: Any, changes: Mapping[str, Any], folder: Path) -> Any:
    """Returns an option's value of JSON, held to the limits that the command's own option has."""
    kinds, spec = _kinds(hint)
    document = next(filter(None, (_DOCUMENTS.get(kind) for kind in kinds)), None)
    if document is not None and not isinstance(value, str):
        try:
            return document(value, changes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"is wrong: {error}") from error
    if Path in kinds:
        if not isinstance(value, str):
            raise ValueError(f"must be the name of a file, got {shorten(repr(value), SHOWN)}")
        return folder / value
    if spec is not None:
        is_list = spec.nargs == "*"
        if is_list != isinstance(value, list):
            raise ValueError(f"must be {'a' if is_list else 'no'} list, got {value!r}")
        return spec.instance_from_str(list(map(_as_text, value if is_list else [value])))
    allowed = [text for kind in kinds for text in typing.get_args(kind)]
    if allowed:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        return value
    (kind,) = kinds
    if type(value) is not kind:
        expected = {bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"must be {expected}, got {shorten(repr(value), SHOWN)}")
    return value


def _as_text(value: Any) -> str:
    """Returns a value of JSON as the command line has it."""
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _kinds(hint: Any) -> tuple[list[Any], Any]:
    """Returns the types that an option may have, but None, and how its text is read."""
    metadata: Sequence[Any] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *metadata = typing.get_args(hint)
    spec = next((item for item in metadata if isinstance(item, PrimitiveConstructorSpec)), None)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    return [kind for kind in kinds if kind is not types.NoneType], spec


def _read_synopsis(value: Any, changes: Mapping[str, Any]) -> Synopsis:
    if isinstance(value, list):
        prompt = changes.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError("as a list of stages needs prompt")
        return Synopsis.from_json(json.dumps({"prompt": prompt, "stages": value}))
    return Synopsis.from_json(json.dumps(value))


# How the documents that options may be are read from JSON, given the other fields beside it.
_DOCUMENTS: dict[Any, Callable[[Any, Mapping[str, Any]], Any]] = {
    Synopsis: _read_synopsis,
    Trajectory: lambda value, _: Trajectory.from_json(json.dumps(value)),
    GuidanceConfig: lambda value, _: GuidanceConfig.from_json(json.dumps(value)),
    ConfigText: lambda value, _: ConfigText.from_json(json.dumps(value)),
}


def _as_json(value: Any) -> Any:
    if isinstance(value, Document):
        return json.loads(value.to_json())
    if isinstance(value, Path):
        try:
            return {"sha256": hashlib.sha256(read_bytes(value, LARGEST_EMBEDDING)).hexdigest()}
        except OSError as error:  # the job fails when it is made, and the others do not
            return {"error": str(error)}
    return list(value) if isinstance(value, tuple) else value
