"""``python -m benchmarks.tune``: chooses the launch configurations, ``configs*.json``.

With a GPU it measures the candidates that compile without fault and keeps the fastest, for that
GPU's architecture. ``--predict`` needs no GPU: of tiles it keeps the one with the most headroom
over the memory's bandwidth in ``benchmarks.codegen.model``, or the first with enough of it; of
streams and of all gradients the first in order of preference (those of gradients are chosen by that
alone, with a GPU too). Neither keeps a configuration that breaks a rule of
``benchmarks.codegen.rules``: sizes without a fit tile get no row, so that their calls go to the
stream kernel; where no candidate is fit for all the kernels of a stream's gradients, the one that
is for most of them is kept, and the others get their own.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from tqdm import tqdm

from benchmarks.codegen import cases
from benchmarks.codegen.cases import Row
from benchmarks.codegen.compile import in_processes
from benchmarks.tune.choose import (
    Cell,
    broken,
    cell_of,
    cells,
    choose,
    measured,
    predicted,
    write,
)
from vstar_kernels.attention.triton import configs


def main(arguments: list[str] | None = None) -> None:
    """Rewrite the files of configurations, after each architecture."""
    args = parse(arguments)
    function: Callable[[Cell], Row | None] = predicted
    if not args.predict:
        from benchmarks.tune.timing import architecture

        function, args.target, args.jobs = measured, [architecture()], 1
    for target in args.target:
        todo = [
            cell
            for cell in cells([target])
            if cell.kind in args.kind
            and cell.kernel in args.kernel
            and cell.width in args.width
            and ("backward" if cell.backward else "forward") in args.direction
        ]
        if args.repair:
            shipped = {cell_of(row): row for row in cases.rows()}
            flags = in_processes(functools.partial(broken, shipped=shipped), todo, args.jobs)
            flags = tqdm(flags, total=len(todo), desc="check", unit="cell")
            todo = [cell for cell, flag in zip(todo, flags, strict=True) if flag]
        chosen = choose(todo, function, args.jobs)
        missing = [cell for cell, row in chosen.items() if not row and not cell.frames]
        write({cell: row for cell, row in chosen.items() if cell not in missing})
        if missing:
            raise SystemExit(f"no stream configuration is fit for {missing}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune")
    parser.add_argument("--predict", action="store_true", help="by compiled code, without a GPU")
    parser.add_argument("--repair", action="store_true", help="only rows that are not fit")
    every = list(configs.ARCHITECTURES)
    parser.add_argument("--target", nargs="+", choices=every, default=every, help="with --predict")
    kinds, kernels = list(configs.KINDS), ["tile", "stream"]
    parser.add_argument("--kind", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels)
    widths = list(configs.WIDTHS)
    parser.add_argument("--width", nargs="+", type=int, choices=widths, default=widths)
    directions = ["forward", "backward"]
    parser.add_argument("--direction", nargs="+", choices=directions, default=directions)
    parser.add_argument("--jobs", type=int, default=1, help="processes, with --predict")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
