"""What is saved in a file as JSON of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vstar_kernels.files import write_atomically
from vstar_kernels.reading import LARGEST_FILE, read_text

if TYPE_CHECKING:
    from typing_extensions import Self


class Document:
    """Something with :meth:`to_json` and :meth:`from_json`, which files keep.

    Attributes:
        largest_file: Bytes; a larger file is not read.
    """

    largest_file: ClassVar[int] = LARGEST_FILE

    def to_json(self) -> str:
        """Returns it as JSON."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what :meth:`to_json` gave."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file, which then holds all of it or is as it was.

        Raises:
            ValueError: See :meth:`to_json`.
            OSError: The file cannot be written.
        """
        write_atomically(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: The file cannot be read, or is no regular file.
            ValueError, ImportError: See :meth:`from_json`.
        """
        return cls.from_json(read_text(path, cls.largest_file))
