"""Files of JSON lines that grow as a run goes on, and that an interruption may tear."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line; what an interruption left of one before it is cut off."""
    if path.exists():
        drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path, understand: Callable[[Any], T]) -> list[T]:
    """Returns what is understood of each line; none of a file that is not there.

    A last line that an interruption left incomplete does not count.

    Raises:
        ValueError: A line is not JSON, or not understood; the message names file and line.
    """
    found = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(understand(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}: {reason}") from None
    return found


def drop_torn_line(path: Path) -> None:
    """Cuts off what an interruption left of a line, so that the next begins a new one."""
    with path.open("rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":  # as nearly always: there is no need to read the rest
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
