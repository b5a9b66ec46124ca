"""What commands print on standard output, which may be closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout


def say(line: str, write: Callable[[str], object] = print) -> None:
    """Prints a line at once; nothing stops where nobody reads it, or it finds no place.

    Whoever has read so far may have gone, as ``head`` does, and the disk of a log may be full.

    Args:
        line: What to print, on standard output.
        write: Prints it.
    """
    if sys.stdout is None:  # closed
        return
    try:
        write(line)
        sys.stdout.flush()
    except OSError:
        _write_nowhere()


@contextmanager
def whole_output() -> Iterator[None]:
    """Ends the process where what the body prints is lost: with 0 if nobody reads on, or with 1.

    It is for what is printed as the result of a command, as :func:`say` is for its log. Standard
    output that was closed from the start wants nothing, and ends nothing.
    """
    if sys.stdout is None:  # closed; tyro asks it even so whether it is a terminal
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
        return
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        _write_nowhere()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from error
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _write_nowhere() -> None:
    """Drops what the process has not written yet, and what it prints later."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
