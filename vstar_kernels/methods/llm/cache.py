"""Answers on disk, so that the same question is asked once."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vstar_kernels.files import write_atomically
from vstar_kernels.reading import FormatError, decode, read_text, validate

if TYPE_CHECKING:
    from pydantic import BaseModel

FOLDER_VARIABLE = "VSTAR_KERNELS_CACHE"
LARGEST_ENTRY = 2**21  # bytes; entries have thousands
Form = TypeVar("Form", bound="BaseModel")


def default_folder() -> Path:
    """Returns ``$VSTAR_KERNELS_CACHE``, or ``vstar_kernels/synopses`` in ``$XDG_CACHE_HOME``.

    The latter is ``~/.cache`` where it is not set or, as its specification has it, not absolute.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "vstar_kernels" / "synopses"


class Cache:
    """A folder with a JSON file for each request, named by the request's hash.

    The cache is a convenience: what cannot be read or written is a warning, and what is not an
    answer of the form that is asked for is as good as not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def get(self, request: dict[str, Any], form: type[Form]) -> Form | None:
        """Returns what :meth:`put` was given for this request, validated by its form, or None."""
        path = self._path(request)
        try:
            entry = decode(read_text(path, LARGEST_ENTRY))
            # Its own request is in it: a file that was put there by hand is not believed.
            if not isinstance(entry, dict) or entry.get("request") != decode(json.dumps(request)):
                raise FormatError("it is not an entry of this request")
            return validate(form, entry.get("answer"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} in the cache cannot be read: {error}", stacklevel=2)
            return None

    def put(self, request: dict[str, Any], answer: BaseModel) -> None:
        """Keeps the answer to a request."""
        path = self._path(request)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            entry = {"request": request, "answer": answer.model_dump()}
            write_atomically(path, json.dumps(entry, ensure_ascii=False))
        except OSError as error:
            warnings.warn(f"{path} in the cache cannot be written: {error}", stacklevel=2)

    def _path(self, request: dict[str, Any]) -> Path:
        canonical = json.dumps(request, sort_keys=True)
        return self._folder / f"{hashlib.sha256(canonical.encode()).hexdigest()}.json"
