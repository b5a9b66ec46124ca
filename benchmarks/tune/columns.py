"""``python -m benchmarks.tune.columns``: chooses ``configs_columns.json`` by the compiled code.

Of the candidates in ``column_candidates.json``, (rows, keys, warps of 32 threads, stages) by kind
of products and table, a table gets one that compiles without fault for all of its variants in
``benchmarks.codegen.column_cases``: the one that keeps a GPU's units least busy
(``benchmarks.units``), of those that are alike the first. Needs no GPU; the choice is to be
corrected by one. Where no tile is fit, it gets no entry, and calls go to the stream kernels.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks import units
from benchmarks.codegen import cases, column_cases
from benchmarks.codegen.column_cases import TABLES, ColumnEntry
from benchmarks.codegen.compile import in_processes
from benchmarks.codegen.targets import TARGETS
from benchmarks.tune.choose import LEAST_SHARED, inspect_fit, write_tables
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import ColumnsConfig
from vstar_kernels.cli.options import read_options

SIZES = json.loads(Path(__file__).with_name("column_candidates.json").read_text())

ColumnKey = tuple[str, str, int, str]  # architecture, kind, width and table


@dataclass(frozen=True)
class Options(cases.Selection):
    """Which configurations to choose."""

    table: tuple[Literal[TABLES], ...] = TABLES
    """Tables of the file."""


def candidates(architecture: str, kind: str, width: int, table: str) -> list[ColumnEntry]:
    """Returns the entries to try, best first; their ``shared`` is not known."""
    threads = TARGETS[architecture].lanes // 32
    return [
        column_cases.entry(
            architecture,
            kind,
            width,
            table,
            ColumnsConfig(
                rows, 0 if is_tile(table) else keys, max(1, warps // threads), stages, shared=0
            ),
        )
        for rows, keys, warps, stages in SIZES[f"{kind} {table}"]
    ]


def is_tile(table: str) -> bool:
    """Tells whether a table is of kernels that have all keys at a time."""
    return table.endswith(("80", "128"))


def predicted(key: ColumnKey) -> ColumnEntry | None:
    """Returns the least busy of a key's candidates that compile without fault."""
    return next(filter(None, map(fit, units.in_order(candidates(*key)))), None)


def fit(entry: ColumnEntry) -> ColumnEntry | None:
    """Returns the entry with the shared memory that it needs, if none of its cases has a fault."""
    shared = 0
    for case in column_cases.shipped(entry):
        binary = inspect_fit(case)
        if binary is None or binary.shared > LEAST_SHARED[entry.architecture]:
            return None
        shared = max(shared, binary.shared)
    return replace(entry, config=replace(entry.config, shared=shared))


def write(chosen: dict[ColumnKey, ColumnEntry | None]) -> None:
    """Replaces the entries of the chosen keys in the file; the others stay.

    Without a choice, a tile goes, and the entry of another kernel stays.
    """
    merged: dict[ColumnKey, ColumnEntry] = {_key(x): x for x in column_cases.entries()}
    for key, entry in chosen.items():
        if entry is not None:
            merged[key] = entry
        elif is_tile(key[-1]):
            merged.pop(key, None)
    tables = {
        table: [
            _line(merged[key])
            for architecture in configs.ARCHITECTURES
            for kind in configs.KINDS
            for width in configs.WIDTHS
            if (key := (architecture, kind, width, table)) in merged
        ]
        for table in TABLES
    }
    write_tables(configs.COLUMNS_FILE, tables)


def _key(entry: ColumnEntry) -> ColumnKey:
    return entry.architecture, entry.kind, entry.width, entry.table


def _line(entry: ColumnEntry) -> str:
    key = {"architecture": entry.architecture, "kind": entry.kind, "width": entry.width}
    return json.dumps(key | asdict(entry.config))


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the file, after each key."""
    options = read_options(Options, arguments, prog="python -m benchmarks.tune.columns")
    todo: list[ColumnKey] = list(
        itertools.product(options.target, options.kind, options.width, options.table)
    )
    missing, found = [], in_processes(predicted, todo, options.jobs, unit="key")
    for key, entry in zip(todo, found, strict=True):
        write({key: entry})
        if entry is None and not is_tile(key[-1]):
            missing.append(key)
    if missing:
        raise SystemExit(f"no configuration is fit for {missing}")


if __name__ == "__main__":
    main()
