"""How commands read their options, which are dataclasses, and how they refuse them.

Only the modules that declare options import this one: it needs tyro, and the package does not.
"""

from __future__ import annotations

import importlib
import math
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from vstar_kernels.cli.output import whole_output
from vstar_kernels.files import IncompleteError, results_folder
from vstar_kernels.reading import shorten

T = TypeVar("T")
STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
SHOWN = 2000  # characters of a message
MAX_STEPS = 1000  # of the schedulers' training
MOST_DIGITS = 20  # of an integer: what Python reads has its own limit, and names no option


class CommandError(Exception):
    """A command cannot go on; the message says why in one line."""


class Command(Protocol):
    """A command: a dataclass of its options, which its fields' types and docstrings describe."""

    def run(self) -> int:
        """Does it; returns the exit status."""


def read_options(options: type[T], arguments: Sequence[str] | None = None, *, prog: str) -> T:
    """Reads the options of a program that has no commands.

    It ends the process as `run_command` does where they cannot be read, and for ``--help``.

    Args:
        options: A dataclass of them.
        arguments: The command line, or None for the process's own.
        prog: How the program is called.
    """
    with whole_output():  # of --help
        return tyro.cli(options, prog=prog, args=arguments, config=STYLE)


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
    try:
        with whole_output():  # of --help
            command: Command = tyro.extras.subcommand_cli_from_dict(
                dict(commands), prog=prog, description=description, args=arguments, config=STYLE
            )
        with _ended_in_order():
            return command.run()
    except CommandError as error:
        print(f"{prog} {arguments[0]}: error: {shorten(str(error), SHOWN)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        where = "".join(f"; {shorten(str(part), SHOWN)}" for part in error.args)
        print(f"{prog} {arguments[0]}: interrupted{where}", file=sys.stderr)
        return 130


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Has a request to end, as batch systems send it, end the body as an exception does."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def folder(text: str) -> Path:
    """Reads the name of a folder."""
    if not text.strip() or "\0" in text:
        raise ValueError(f"must be the name of a folder, got {text!r}")
    return Path(text)


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


def optional(metavar: str, alone: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Has an option's text be left out, which then is another one."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{metavar}]",
        instance_from_str=lambda texts: texts[0] if texts else alone,
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
        value = int(text) if re.fullmatch(rf"[+-]?\d{{1,{MOST_DIGITS}}}", text) else None
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


def amount(text: str) -> float:
    """Reads a finite number that is not negative."""
    value = number(text)
    if value < 0:
        raise ValueError(f"must be at least 0, got {text!r}")
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


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises CommandError unless a folder of results may be there."""
    try:
        if path.exists() and not path.is_dir():
            raise CommandError(f"--output must be a folder, {path} is a file")
        if not overwrite and path.exists() and any(path.iterdir()):
            raise CommandError(
                f"--output: {path} is not empty: choose another folder, or give --overwrite"
            )
    except OSError as error:
        raise CommandError(f"--output: {error}") from error


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


def write_results(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files of results, each by a function of its path.

    What has been computed is not thrown away where some of it cannot be written: the other files
    are, and the one that finds no place in the folder is written to the system's for such files.

    Raises:
        IncompleteError: Not all files are in the folder; the message says why, and where they are.
    """
    failed = {name: _write_one(folder / name, write) for name, write in writers.items()}
    failed = {name: problem for name, problem in failed.items() if problem}
    if not failed:
        return
    elsewhere = Path(tempfile.mkdtemp(prefix="vstar-kernels-"))
    saved = [name for name in failed if not _write_one(elsewhere / name, writers[name])]
    problems = [f"{name}: {problem}" for name, problem in failed.items()]
    if saved:
        problems.append(f"{', '.join(saved)} {'is' if len(saved) == 1 else 'are'} in {elsewhere}")
    else:
        elsewhere.rmdir()
    raise IncompleteError("; ".join(problems))


def _write_one(path: Path, write: Callable[[Path], object]) -> str:
    """Writes a file that is complete or not there; returns why it is not."""
    try:
        write(path)
    except Exception as error:  # whatever the libraries for videos and pictures raise
        path.unlink(missing_ok=True)
        return shorten(str(error)) or type(error).__name__
    return ""


def check_model(model: str) -> None:
    """Raises CommandError unless it is a folder with a pipeline or may be a name on the hub."""
    path = Path(model)
    looks_like_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    try:
        if path.exists() or not looks_like_id:
            if not path.is_dir():
                raise CommandError(f"--model: there is no folder {model}")
            if not (path / "model_index.json").is_file():
                raise CommandError(
                    f"--model: {model} is not a saved pipeline: it has no model_index.json"
                )
    except OSError as error:  # of a name that is too long
        raise CommandError(f"--model: {error}") from error


def check_device(name: str) -> None:
    """Raises CommandError unless tensors can be made on a device."""
    import torch

    try:
        torch.empty(1, device=name).tolist()  # which the device "meta" cannot do
    # RuntimeError for an unknown name or a broken driver, AssertionError for a build without it,
    # ImportError for what another package would bring.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_packages(names: Iterable[str], *, extra: str) -> None:
    """Raises CommandError unless packages can be imported, which an extra of ours installs."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):  # in an extension by pybind11
                raise error.__cause__ from None
            raise CommandError(
                f"{extra} needs {name} ({error}): pip install 'vstar_kernels[{extra}]'"
            ) from error
