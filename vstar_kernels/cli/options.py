"""How commands read their options, which are dataclasses, and how they refuse them.

Only the modules that declare options import this one: it needs tyro, and the package does not.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from vstar_kernels.files import results_folder

T = TypeVar("T")
MAX_STEPS = 1000  # of the schedulers' training


class CommandError(Exception):
    """A command cannot go on; the message says why in one line."""


class Command(Protocol):
    """A command: a dataclass of its options, which its fields' types and docstrings describe."""

    def run(self) -> int:
        """Does it; returns the exit status."""


def run_command(
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
) -> int:
    """Reads a command and its options, and runs it; returns the exit status.

    Options that cannot be read end the process with status 2, as ``--help`` does with 0. A command
    that cannot go on has status 2 too, one that Ctrl-C interrupts 130.
    """
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
    try:
        command: Command = tyro.extras.subcommand_cli_from_dict(
            dict(commands), prog=prog, description=description, args=arguments, config=config
        )
        return command.run()
    except CommandError as error:
        print(f"{prog} {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog} {arguments[0]}: interrupted", file=sys.stderr)
        return 130


def option(metavar: str | None = None, *, default: str | None = None) -> Any:
    """Describes an option beyond its type: its value's name, and what None stands for."""

    def hint(found: str) -> str:
        return "" if not default and found == "None" else f"(default: {default or found})"

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def parsed(parse: Callable[[str], T], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Has an option's value read by a function, whose ValueError says what is allowed."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def several(parse: Callable[[str], T], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Has an option's values, at least one, read into a tuple by a function as for `parsed`."""

    def parse_all(texts: list[str]) -> tuple[T, ...]:
        if not texts:
            raise ValueError("must have at least one value, got none")
        return tuple(map(parse, texts))

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar} [{metavar} ...]",
        instance_from_str=parse_all,
        is_instance=lambda value: True,
        str_from_instance=lambda values: [str(value) for value in values or ()],
    )


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a function that reads an integer within limits."""
    allowed = f"an integer of at least {least}" + (f", at most {most}" if most else "")

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
        if value is None or value < least or (most is not None and value > most):
            raise ValueError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def number(text: str) -> float:
    """Reads a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {text!r}")
    return value


def size(least: int) -> Callable[[str], tuple[int, int]]:
    """Returns a function that reads a height and a width in pixels, both at least this."""

    def parse(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        height, width = (int(match[1]), int(match[2])) if match else (0, 0)
        if min(height, width) < least or height % 8 or width % 8:
            raise ValueError(
                f"must be HEIGHTxWIDTH in multiples of 8 from {least}, such as 320x512, "
                f"got {text!r}"
            )
        return height, width

    return parse


@contextmanager
def output_folder(path: Path, names: Collection[str], *, overwrite: bool) -> Iterator[Path]:
    """Gives the folder to write results into, before they are computed: see `results_folder`.

    Raises:
        CommandError: The results cannot be written, or put into their place; the message says
            where they are if they are complete.
    """
    try:
        with results_folder(path, names, overwrite=overwrite) as folder:
            yield folder
    except OSError as error:
        raise CommandError(f"--output: {error}") from error


def check_model(model: str) -> None:
    """Raises CommandError unless it is a folder with a pipeline or may be a name on the hub."""
    path = Path(model)
    looks_like_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    if path.exists() or not looks_like_id:
        if not path.is_dir():
            raise CommandError(f"--model: there is no folder {model}")
        if not (path / "model_index.json").is_file():
            raise CommandError(
                f"--model: {model} is not a saved pipeline: it has no model_index.json"
            )


def check_device(name: str) -> None:
    """Raises CommandError unless tensors can be made on a device."""
    import torch

    try:
        torch.empty(1, device=name)
    # RuntimeError for an unknown name or a broken driver, AssertionError for a build without it.
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_packages(names: Iterable[str], *, extra: str) -> None:
    """Raises CommandError unless packages can be imported, which an extra of ours installs."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CommandError(
                f"{extra} needs {name} ({error}): pip install 'vstar_kernels[{extra}]'"
            ) from error
