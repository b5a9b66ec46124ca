"""The shipped configurations of every family of kernels, and what is compiled of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.codegen import cases, column_cases, frame_cases

FAMILIES = ("tile", "stream", "frames", "columns")
TABLES = (*frame_cases.VARIANTS, *column_cases.TABLES)


@dataclass(frozen=True)
class Selection(cases.Selection):
    """Which of them a command is for."""

    family: tuple[Literal[FAMILIES], ...] = FAMILIES
    """Families of kernels."""
    table: tuple[Literal[TABLES], ...] = TABLES
    """Of the frames' and the columns' kernels, the tables of configurations."""

    def has(self, key: cases.Key) -> bool:
        """Tells whether a key's configuration is one of them."""
        of_table = getattr(key, "table", None) in (None, *self.table)
        return super().has(key) and key.family in self.family and of_table


def entries() -> list[Any]:
    """Returns every shipped configuration."""
    return [
        entry for of_family in (cases, frame_cases, column_cases) for entry in of_family.entries()
    ]


def kernels(*, subset: bool = False) -> list[Any]:
    """Returns the cases of every shipped configuration, or a few of each family."""
    found = []
    for of_family in (cases, frame_cases, column_cases):
        every = [case for entry in of_family.entries() for case in of_family.shipped(entry)]
        found += of_family.subset(every) if subset else every
    return found
