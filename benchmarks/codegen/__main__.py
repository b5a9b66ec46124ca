"""``python -m benchmarks.codegen``: compiles every shipped configuration and reports on it.

Exits with 1, naming every offender, where a kernel spills, takes more shared memory than its target
has (or than its configuration says), loads queries, keys or values in narrower pieces than their
alignment allows, or has no matrix instruction.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import triton
from tqdm import tqdm

from benchmarks.codegen import cases, report
from benchmarks.codegen.cases import Case
from benchmarks.codegen.compile import in_processes
from vstar_kernels.attention.triton import configs


def chosen(targets: list[str], kinds: list[str], widths: list[int]) -> list[Case]:
    """Every shipped configuration with what it must run, and the pairs of options for some."""
    found = []
    for row in cases.rows():
        if row.architecture in targets and row.kind in kinds and row.width in widths:
            found += cases.shipped(row)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write them and the data with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen")
    architectures, kinds = list(configs.ARCHITECTURES), list(configs.KINDS)
    parser.add_argument("--target", nargs="+", choices=architectures, default=architectures)
    parser.add_argument("--kind", nargs="+", choices=kinds, default=kinds)
    widths = list(configs.WIDTHS)
    parser.add_argument("--width", nargs="+", type=int, choices=widths, default=widths)
    parser.add_argument("--subset", action="store_true", help="what `make test` compiles")
    parser.add_argument("--json", type=Path, help="writes the tables beside it, as .md")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args(arguments)
    todo = chosen(args.target, args.kind, args.width)
    if args.subset:
        todo = cases.subset(todo)
    examined = in_processes(report.examine, todo, args.jobs)
    results = list(tqdm(examined, total=len(todo), unit="kernel"))
    text = f"Triton {triton.__version__}, {len(results)} kernels.\n\n{report.tables(results)}"
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(x) for x in results)
        args.json.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
        args.json.with_suffix(".md").write_text(f"# Compiled kernels\n\n{text}")
    if offenders := report.offenders(results):
        sys.exit("\n".join(["Not fit to ship:", *offenders]))


if __name__ == "__main__":
    main()
