"""What a study is of: prompts × variants × seeds, read from its file, each a job."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_kernels.cli.generate.options import MAX_SEED, GenerateOptions
from vstar_kernels.cli.generate.prompts import lines_of, make_job, without_alternatives
from vstar_kernels.cli.jobs import Job
from vstar_kernels.cli.options import CommandError
from vstar_kernels.methods.starvid.trajectory import Trajectory
from vstar_kernels.methods.vstar.synopsis import Synopsis, synopses_of
from vstar_kernels.models.config import TARConfig
from vstar_kernels.reading import (
    FormatError,
    decode,
    decode_yaml,
    read_text,
    require_pydantic,
    shorten,
    validate,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

# The paper's columns (Table 2, Fig. S.9): with TAR or without, with stages or without.
COLUMNS: dict[str, dict[str, Any]] = {
    "baseline": {"no_tar": True, "synopsis": False},
    "VSP": {"no_tar": True},
    "TAR": {"synopsis": False},
    "both": {},
}
SYMBOLS = {"sigma": "σ", "tar_steps": "steps of TAR"}
BY_TYPE = {"tar_steps"}  # options whose 1 and 1.0 are not the same
# Lists that are one value, not one after another.
WHOLE_LISTS = {"map_steps"}
OF_STUDIES = {"prompt": "prompts", "seed": "seeds"}
SOURCES = ("writer", "writer_url", "writer_local")  # of stages that no file has
WRITERS = (*SOURCES, "stages", "key_frames", "refresh")
PROMPT_COLUMNS = ("prompt", "name", "caption")  # of a table; ChronoMagic-Bench's is name
MOST_VIDEOS = 100_000


@dataclass(frozen=True)
class Prompt:
    """A text that videos are made of.

    Attributes:
        text: The video in a sentence.
        synopsis: Its stages, None where there are none.
        plan: Its subjects and their boxes, for StarVid.
        expected: How many of each subject there should be, by noun.
    """

    text: str
    synopsis: Synopsis | None = None
    plan: Trajectory | None = None
    expected: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Variant:
    """A way to make a video.

    Attributes:
        name: What it is called.
        changes: Options, as lines of ``generate --prompts`` have them.
        staged: Whether the prompt's stages are used.
        swept: Of those fields that were given as lists, its values.
        fixed: What those have in common that are of the same lists, in words.
    """

    name: str
    changes: Mapping[str, Any]
    staged: bool = True
    swept: Mapping[str, Any] = field(default_factory=dict)
    fixed: str = ""


@dataclass(frozen=True)
class Video:
    """One video of a study.

    Attributes:
        prompt, variant, seed: What it is of.
        job: What makes it.
    """

    prompt: Prompt
    variant: Variant
    seed: int
    job: Job


@dataclass(frozen=True)
class StudyPlan:
    """What a study's file says.

    Attributes:
        prompts, variants, seeds: Of which every combination is a video.
        options: Of all videos, as lines of ``generate --prompts`` have them.
        scores: The settings of each score, by its name.
        folder: The file's, from which others are looked for.
    """

    prompts: Sequence[Prompt]
    variants: Sequence[Variant]
    seeds: Sequence[int]
    options: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    folder: Path

    def videos(self, base: GenerateOptions) -> list[Video]:
        """Returns all videos, seed by seed within variants within prompts.

        Args:
            base: The options of the command.

        Raises:
            CommandError: A variant does not fit its prompt or the options, or there are too many.
        """
        count = len(self.prompts) * len(self.variants) * len(self.seeds)
        if count > MOST_VIDEOS:
            raise CommandError(f"a study has at most {MOST_VIDEOS} videos, this one {count}")
        videos = []
        for prompt, variant in itertools.product(self.prompts, self.variants):
            options = without_alternatives(self.options, variant.changes)
            changes = {**options, **variant.changes, "keep_frames": True}
            changes["prompt"] = prompt.text
            has_writer = any(changes.get(x, getattr(base.synopsis, x)) for x in SOURCES)
            method = changes.get("method", base.video.method)
            if method == "starvid" and prompt.plan is not None:
                changes |= {"plan": json.loads(prompt.plan.to_json()), **dict.fromkeys(WRITERS)}
            elif method == "vstar" and variant.staged and prompt.synopsis is not None:
                changes["synopsis"] = json.loads(prompt.synopsis.to_json())
                changes |= dict.fromkeys(WRITERS)
            elif method == "vstar" and not variant.staged:
                changes |= dict.fromkeys(WRITERS)
            elif method == "vstar" and not has_writer:
                raise CommandError(
                    f"variant {variant.name!r} has stages, and {prompt.text!r} has none: give "
                    "them, a --writer, or synopsis: false in the variant"
                )
            for seed in self.seeds:
                name = f"{variant.name} seed {seed} {prompt.text}"
                try:
                    more = {"seed": seed, "name": name}
                    job = make_job(base, changes | more, self.folder)
                except (CommandError, ValueError, TypeError) as error:
                    raise CommandError(f"variant {variant.name!r}: {error}") from error
                videos.append(Video(prompt, variant, seed, job))
        return videos


def read_study(
    path: Path,
    *,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    scores: Sequence[str] | None = None,
) -> StudyPlan:
    """Reads a study.

    The file is YAML or JSON with ``prompts``, ``variants``, ``seeds``, ``options`` and ``scores``;
    or prompts alone: the official ``prompt_list.json``, a text of one a line, or a table (CSV) such
    as ChronoMagic-Bench's.

    Args:
        path: The file.
        variants, seeds, scores: Of the command, before those of the file.

    Raises:
        CommandError: It cannot be read, or is not a study; the message names the field.
    """
    try:
        content = _load(path)
        if not isinstance(content, dict):
            content = {"prompts": content}
        given = {"variants": variants, "seeds": seeds, "scores": scores}
        content |= {name: list(x) for name, x in given.items() if x is not None}
        return _from_fields(content, path.parent)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise CommandError(f"{path}: {error}") from error


def _from_fields(content: dict[str, Any], folder: Path) -> StudyPlan:
    read: Any = validate(_study_form(), content)
    listed = read.prompts
    if isinstance(listed, str):
        try:
            listed = _load(folder / listed)
        except FormatError as error:
            raise FormatError(f"prompts: {read.prompts}: {error}") from None
        if not isinstance(listed, list):
            raise FormatError(
                f"prompts: {read.prompts} must hold a list, got {type(listed).__name__}"
            )
    prompts = [_prompt(item, folder, f"prompts[{i}]") for i, item in enumerate(listed)]
    if not prompts:
        raise FormatError("prompts must hold at least one, got none")
    if (twice := _twice([prompt.text for prompt in prompts])) is not None:
        raise FormatError(f"prompts must have each once, got {twice!r} twice")
    wanted = read.variants
    if wanted is None:
        are_staged = all(prompt.synopsis is not None for prompt in prompts)
        wanted = list(COLUMNS) if are_staged else ["baseline", "TAR"]
    variants = [x for i, item in enumerate(wanted) for x in _variants(item, f"variants[{i}]")]
    if (twice := _twice([variant.name for variant in variants])) is not None:
        raise FormatError(f"variants must have different names, got {twice!r} twice")
    seeds = list(range(read.seeds)) if isinstance(read.seeds, int) else read.seeds
    if (twice := _twice(seeds)) is not None:
        raise FormatError(f"seeds must have each once, got {twice} twice")
    _check_free("options", read.options)
    scores = read.scores
    if isinstance(scores, list):
        scores = {name: {} for name in scores}
    return StudyPlan(prompts, variants, seeds, read.options, scores, folder)


def _check_free(where: str, changes: Mapping[str, Any]) -> None:
    """Raises FormatError for options of which a study has lists of its own."""
    for name, field_of_study in OF_STUDIES.items():
        if name in changes:
            raise FormatError(f"{where}: {name} cannot be here: the study has {field_of_study}")


def _twice(values: Sequence[Hashable]) -> Any:
    """Returns a value that is there more than once; None if there is none."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _study_form() -> type[BaseModel]:
    """Returns the form of a study's file, a pydantic model."""
    require_pydantic()
    from typing import Annotated

    from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator

    def allowed(text: str) -> WrapValidator:
        """Says what is allowed in a sentence, where pydantic has one for each form of several."""

        def check(value: Any, handler: Callable[[Any], Any]) -> Any:
            try:
                return handler(value)
            except ValidationError:
                raise ValueError(f"it must be {text}, got {shorten(repr(value), 80)}") from None

        return WrapValidator(check)

    seed = Annotated[int, Field(ge=0, le=MAX_SEED)]

    class StudyFields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        prompts: Annotated[str | list[Any], allowed("a list, or the name of a file")]
        variants: list[Annotated[str | dict[str, Any], allowed("a name or an object")]] | None = (
            Field(default=None, min_length=1)
        )
        seeds: Annotated[
            Annotated[int, Field(ge=1, le=MOST_VIDEOS)]
            | Annotated[list[seed], Field(min_length=1)],
            allowed(f"a number from 1 to {MOST_VIDEOS}, or a list of seeds from 0 to {MAX_SEED}"),
        ] = Field(default_factory=lambda: [0])
        options: dict[str, Any] = Field(default_factory=dict)
        scores: Annotated[
            list[str] | dict[str, dict[str, Any]],
            allowed("a list of names, or an object with an object of settings for each"),
        ] = Field(default_factory=dict)

    return StudyFields


def _load(path: Path) -> Any:
    """Returns what a file of prompts or of a study holds, as JSON has it."""
    text = read_text(path)
    kind = path.suffix.lower()
    if kind == ".json":
        return decode(text)
    if kind == ".jsonl":
        return [_decode_line(number, line) for number, line in lines_of(text)]
    if kind in (".yaml", ".yml"):
        return decode_yaml(text)
    if kind == ".csv":
        try:
            return list(_column(text))
        except csv.Error as error:
            raise FormatError(f"it is not a table (CSV): {error}") from None
    return [line for _, line in lines_of(text)]


def _decode_line(number: int, line: str) -> Any:
    try:
        return decode(line)
    except FormatError as error:
        raise FormatError(f"line {number}: {error}") from None


def _column(text: str) -> Iterator[str]:
    table = csv.DictReader(io.StringIO(text, newline=None))  # of whatever line ends
    columns = table.fieldnames or ()
    name = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if name is None:
        raise FormatError(
            f"a table must have a column {', '.join(PROMPT_COLUMNS)}, got {', '.join(columns)}"
        )
    for row in table:
        yield row[name]


def _prompt(item: Any, folder: Path, where: str) -> Prompt:
    """Returns a prompt of a text, or of an object with stages, a plan, numbers of subjects."""
    try:
        if isinstance(item, str):
            return Prompt(item)
        if not isinstance(item, dict):
            raise FormatError(f"it must be a text or an object, got {type(item).__name__}")
        fields = dict(item)
        plan, expected = fields.pop("plan", None), fields.pop("expected", None)
        if plan is not None:
            text = read_text(folder / plan) if isinstance(plan, str) else json.dumps(plan)
            plan = Trajectory.from_json(text)
            fields.setdefault("prompt", plan.prompt)
        if expected is not None:
            expected = _numbers(expected)
        if fields.keys() == {"prompt"} and isinstance(fields["prompt"], str):
            return Prompt(fields["prompt"], None, plan, expected)
        (synopsis,) = synopses_of(fields)
        return Prompt(synopsis.prompt, synopsis, plan, expected)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None


def _numbers(expected: Any) -> dict[str, int]:
    is_right = isinstance(expected, dict) and all(
        type(n) is int and n >= 0 for n in expected.values()
    )
    if not is_right:
        raise FormatError(f"expected must map nouns to numbers from 0 on, got {expected!r}")
    return dict(expected)


def _variants(item: str | dict[str, Any], where: str) -> Iterator[Variant]:
    """Yields the variants of one entry: several where a field of it is a list."""
    try:
        if isinstance(item, str):
            if item in COLUMNS:
                item = {"name": item, **COLUMNS[item]}
            else:
                TARConfig.preset(item)
                item = {"name": item, "preset": item}
        fields = dict(item)
        _check_free("a variant", fields)
        name, staged = fields.pop("name", None), fields.pop("synopsis", True)
        if name is not None and not isinstance(name, str):
            raise FormatError(f"name must be a text, got {name!r}")
        if not isinstance(staged, bool):
            raise FormatError(f"synopsis must be true or false, got {staged!r}")
        lists = [n for n, x in fields.items() if isinstance(x, list) and n not in WHOLE_LISTS]
        if empty := next((n for n in lists if not fields[n]), None):
            raise FormatError(f"{empty} must have at least one value, got []")
        others = {n: x for n, x in fields.items() if n not in lists}
        fixed = name or ", ".join(
            [*([_title(others)] if others else []), *([] if staged else ["without stages"])]
        )
        for values in itertools.product(*(fields[n] for n in lists)):
            swept = dict(zip(lists, values, strict=True))
            parts = [_said(n, x) for n, x in swept.items()]
            if name is not None or not parts:
                parts.insert(0, name or _title(fields) or ("both" if staged else "TAR"))
            yield Variant(", ".join(parts), {**fields, **swept}, staged, swept, fixed)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: {error}") from None


def _title(fields: Mapping[str, Any]) -> str:
    named = [_said(n, x) for n, x in fields.items() if x is not True]
    return ", ".join([*(n for n, x in fields.items() if x is True), *named])


def _said(name: str, value: Any) -> str:
    """Returns an option and its value in words."""
    if value is None:
        value = "default"
    elif isinstance(value, float) and name not in BY_TYPE:
        value = f"{value:g}"
    return f"{SYMBOLS.get(name, name)} = {value}"
