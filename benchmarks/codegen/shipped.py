"""The shipped configurations of every family of kernels, and what is compiled of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.codegen import cases, column_cases, frame_cases

MODULES = (cases, frame_cases, column_cases)
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
    return [entry for module in MODULES for entry in module.entries()]


def kernels(*, subset: bool = False) -> list[Any]:
    """Returns the cases of every shipped configuration, or a few of each family."""
    found = []
    for module in MODULES:
        every = [case for entry in module.entries() for case in module.shipped(entry)]
        found += module.subset(every) if subset else every
    return found
