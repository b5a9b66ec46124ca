"""Answers on disk, so that the same request is made once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "VSTAR_KERNELS_CACHE"


def default_folder() -> Path:
    """``$VSTAR_KERNELS_CACHE``, or ``vstar_kernels/synopses`` in ``$XDG_CACHE_HOME``.

    The latter is ``~/.cache`` where it is not set or, as its specification has it, not absolute.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "vstar_kernels" / "synopses"


class Cache:
    """A folder with a JSON file for each request, named by the request's hash.

    Files are complete whenever they are there, also with several processes at work. The cache is a
    convenience: what cannot be read or written is a warning.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def get(self, request: dict[str, Any]) -> Any:
        """What :meth:`put` was given for this request, or None."""
        path = self._path(request)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            # Its own request is in it: a file that was put there by hand is not believed.
            return entry["result"] if entry["request"] == request else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{path} in the cache cannot be read: {error}", stacklevel=2)
            return None

    def put(self, request: dict[str, Any], result: Any) -> None:
        """Keep the result of a request."""
        path = self._path(request)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps({"request": request, "result": result}, ensure_ascii=False))
        except OSError as error:
            warnings.warn(f"{path} in the cache cannot be written: {error}", stacklevel=2)

    def _path(self, request: dict[str, Any]) -> Path:
        canonical = json.dumps(request, sort_keys=True)
        return self._folder / f"{hashlib.sha256(canonical.encode()).hexdigest()}.json"


def _write(path: Path, text: str) -> None:
    """Under another name first, so that nobody reads half a file."""
    handle, scratch = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
