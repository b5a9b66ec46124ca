"""``python -m benchmarks.codegen``: compiles every shipped configuration and reports on it.

Exits with 1, naming every offender, where a kernel spills, takes more shared memory than its target
has (or than its configuration says), loads queries, keys or values in narrower pieces than their
alignment allows, or has no matrix instruction; and every size that has no tile, and no reason in
``without_tile.json``.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import triton

from benchmarks.codegen import report, shipped, without_tile
from benchmarks.codegen.compile import in_processes
from vstar_kernels.cli.options import read_options


@dataclass(frozen=True)
class Options(shipped.Selection):
    """What to compile, and where the results go."""

    subset: bool = False
    """Compile only those that `make test` compiles."""
    json: Path | None = None
    """Write the data here, and the tables beside it, as .md."""
    update: bool = False
    """Keep what that file has of other kernels, if their configurations are shipped still."""
    other_triton: bool = False
    """This Triton is another than the configurations were chosen with. It may spill a few bytes
    more, and take more shared memory than they say, within what the target has."""


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables, and writes them and the data with ``--json``."""
    options = read_options(Options, arguments, prog="python -m benchmarks.codegen")
    every = shipped.kernels(subset=options.subset)
    todo = [case for case in every if options.has(case.entry)]
    examine = functools.partial(report.examine, other=options.other_triton)
    results = list(in_processes(examine, todo, options.jobs, unit="kernel"))
    if options.update and options.json:
        results = report.merged(report.read(options.json), results, every)
    text = report.tables(results)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(x) for x in results)
        options.json.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
        options.json.with_suffix(".md").write_text(f"# Compiled kernels\n\n{text}")
    unexplained = without_tile.unexplained() if "tile" in options.family else []
    if offenders := [*report.offenders(results), *unexplained]:
        sys.exit("\n".join(["Not fit to ship:", *offenders]))


if __name__ == "__main__":
    main()
