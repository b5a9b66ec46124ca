"""What the commands' options have in common. Nothing here is slow to import."""

from __future__ import annotations

import argparse
import importlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_STEPS = 1000  # of the schedulers' training


class CommandError(Exception):
    """A command cannot go on; the message says why in one line."""


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """What parses an integer within limits."""
    allowed = f"an integer of at least {least}" + (f", at most {most}" if most else "")

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def size(least: int) -> Callable[[str], tuple[int, int]]:
    """What parses a height and a width in pixels, both at least this."""

    def parse(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        height, width = (int(match[1]), int(match[2])) if match else (0, 0)
        if min(height, width) < least or height % 8 or width % 8:
            raise argparse.ArgumentTypeError(
                f"must be HEIGHTxWIDTH in multiples of 8 from {least}, such as 320x512, "
                f"got {text!r}"
            )
        return height, width

    return parse


def check_model(model: str) -> None:
    """Raise CommandError unless it is a folder with a pipeline or may be a name on the hub."""
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
    """Raise CommandError unless tensors can be made on a device."""
    import torch

    try:
        torch.empty(1, device=name)
    # RuntimeError for an unknown name or a broken driver, AssertionError for a build without it.
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_packages(names: Iterable[str], *, extra: str) -> None:
    """Raise CommandError unless packages can be imported, which an extra of ours installs."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CommandError(
                f"{extra} needs {name} ({error}): pip install 'vstar_kernels[{extra}]'"
            ) from error
