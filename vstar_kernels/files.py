"""Files and folders of results that are complete whenever they are there."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part of either.

    The file is made beside its place and renamed, so it is also complete when several processes
    write it. A link is followed. A new file gets the permissions that ``open`` would give it, and
    one that was there keeps its own.

    Args:
        path: The file; its folder must exist.
        data: Its whole content; text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: It cannot be written, or something is there that is not a regular file. What was
            there is unchanged.
    """
    place = resolve(path)
    existed = place.exists()
    if existed and not place.is_file():
        raise OSError(f"{place} is not a regular file")
    scratch = _free_name(place)
    try:
        # Not tempfile: it makes files for their owner only, whatever the umask says.
        with scratch.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # or a new name could outlive a power cut without its content
        if existed:
            shutil.copymode(place, scratch)
        os.replace(scratch, place)
    except BaseException as error:
        with suppress(OSError):  # its folder may be what is missing, or is no folder
            scratch.unlink()
        # The error is for the caller, who knows nothing of the other name.
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
            del error.filename2  # a None would be shown
        raise


class IncompleteError(OSError):
    """Some results could not be written, or put into their place; the others are to be kept."""


@contextmanager
def results_folder(
    path: str | Path,
    names: Collection[str],
    *,
    overwrite: bool = False,
    scratch: str | Path | None = None,
) -> Iterator[Path]:
    """Gives an empty folder to write results into, which are all put into their place at the end.

    A new folder appears with all of its files at once. In one that is there already, the files of
    an earlier run are exchanged for the new ones, all or none, and other files stay. Signals wait
    until that is done. If the body raises, nothing has changed, and what it wrote is deleted. If
    the results are complete and cannot be put into their place, or if the body raises an
    IncompleteError, they are kept, and the error says where.

    Args:
        path: The folder of the results; missing folders above it are made. A link is followed.
        names: The names that files of results may have, in this run or an earlier one.
        overwrite: Whether the folder may hold something already.
        scratch: The empty folder's own path, on the same file system, where nothing must be yet;
            None is a free one.

    Raises:
        OSError: The results cannot be written, which is found before the body runs as far as it can
            be.
        IncompleteError: They cannot be put into their place, or the body raised one.
    """
    place = resolve(path)
    existed = place.exists()
    if existed:
        _check_exchange(place, names, overwrite=overwrite)
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    if scratch is None:
        # Within a folder that is there: it may be a mounted one, or the one we are in.
        scratch = _free_name(place / "results" if existed else place)
    scratch = Path(scratch)
    scratch.mkdir()
    complete = False
    try:
        yield scratch
        complete = True
        with _signals_wait():
            if existed or (overwrite and place.exists()):
                _exchange_files(scratch, place, names, overwrite=overwrite)
            else:
                _take_place(scratch, place)
    except BaseException as error:
        if not scratch.exists():
            raise
        if not complete and not isinstance(error, IncompleteError):
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):  # somebody else may have put something there
                for parent in missing:
                    parent.rmdir()
            raise
        if not any(scratch.iterdir()):
            scratch.rmdir()  # they are elsewhere, as the error says
            raise
        kept = f"the results are in {_without_dot(scratch)}"
        if isinstance(error, OSError):
            raise IncompleteError(f"{error}; {kept}") from error
        error.args = (*error.args, kept)
        raise


def _take_place(scratch: Path, place: Path) -> None:
    """Renames a folder, which fails where another with files has been made meanwhile."""
    try:
        os.rename(scratch, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OSError(f"{place} has been filled meanwhile, by another run") from error


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Has interrupts, and requests to end, wait until the body is done.

    Only the main thread has handlers, and only it is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(name) is not None:  # None: it is not Python's
                handlers[name] = signal.signal(name, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _without_dot(scratch: Path) -> Path:
    """Returns where a hidden folder now is in sight, if it can be renamed."""
    kept = scratch.with_name(scratch.name.lstrip("."))
    try:
        os.rename(scratch, kept)
    except OSError:
        return scratch
    return kept


def _check_exchange(
    folder: Path, names: Collection[str], *, overwrite: bool, besides: Path | None = None
) -> list[Path]:
    """Returns what else is in a folder; raises OSError where results cannot take its place."""
    entries = [entry for entry in folder.iterdir() if entry != besides]
    if entries and not overwrite:
        raise OSError(f"{folder} is not empty")
    for entry in entries:
        if entry.name in names and entry.is_dir() and not entry.is_symlink():
            raise OSError(f"{entry} is a folder, not a file of an earlier run")
    return entries


def _exchange_files(
    scratch: Path, folder: Path, names: Collection[str], *, overwrite: bool
) -> None:
    """Moves the files of ``scratch`` into ``folder``, and those of an earlier run away.

    The old files are deleted when all of the new ones are there. Until then any exception moves
    everything back.
    """
    others = _check_exchange(folder, names, overwrite=overwrite, besides=scratch)
    old = _free_name(folder / "old")
    old.mkdir()
    moves = [(entry, old / entry.name) for entry in others if entry.name in names]
    moves += [(entry, folder / entry.name) for entry in scratch.iterdir()]
    try:
        for source, target in moves:
            os.rename(source, target)
    except BaseException:
        for source, target in reversed(moves):
            # Not counted: an interrupt may come between a rename and its being noted. What has
            # vanished meanwhile cannot go back, and must not keep the others from it.
            if os.path.lexists(target) and not os.path.lexists(source):
                with suppress(OSError):
                    os.rename(target, source)
        with suppress(OSError):
            old.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def resolve(path: str | Path) -> Path:
    """Returns the path with its links followed; raises OSError where they lead in a circle."""
    try:
        return Path(path).resolve()
    except RuntimeError as error:  # what Python before 3.13 raises
        raise OSError(str(error)) from error


def _free_name(path: Path) -> Path:
    """Returns a hidden name beside a path, which nothing has."""
    return path.with_name(f".{path.name[:32]}-{secrets.token_hex(4)}")
