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
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import candidates
from benchmarks.codegen import cases, model, rules
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case, Row
from benchmarks.codegen.compile import in_processes, inspect
from benchmarks.codegen.targets import KIB, TARGETS
from vstar_kernels.backends.triton import configs
from vstar_kernels.backends.triton.configs import StreamConfig, TileConfig
from vstar_kernels.backends.triton.facts import INT32_MAX

ENOUGH = 1.0  # of headroom: then the memory is what limits a tile
# sm_80's rows serve architectures with less shared memory too: 8.6, 8.9 and 12.x.
SMALLEST_SHARED = {"sm_80": 99 * KIB}


class Cell(NamedTuple):
    """What one configuration is for, and found by. ``frames`` is None for the stream kernel."""

    architecture: str
    kind: str
    frames: int | None
    width: int
    backward: bool = False

    @property
    def kernel(self) -> str:
        """The kernel that it is for."""
        return "stream" if self.frames is None else "tile"


def cells(architectures: list[str]) -> list[Cell]:
    """What needs a configuration."""
    frames = (None, *configs.TILE_FRAMES)
    parts = (architectures, configs.KINDS, frames, configs.WIDTHS, (False, True))
    return list(itertools.starmap(Cell, itertools.product(*parts)))


def options(cell: Cell) -> list[Row]:
    """The cell with each of its candidates."""
    found: Sequence[TileConfig | StreamConfig]
    if cell.frames is None:
        streams = candidates.backward_streams if cell.backward else candidates.streams
        found = streams(cell.architecture, cell.kind, cell.width)
    else:
        tiles = candidates.backward_tiles if cell.backward else candidates.tiles
        found = tiles(cell.architecture, cell.kind, cell.frames, cell.width)
    return [Row(**cell._asdict(), config=config) for config in found]


def headroom(row: Row) -> float | None:
    """Of a tile in its commonest variant, a Gaussian, if that has no fault.

    Infinite where the model says nothing: of streams and gradients.
    """
    if row.kernel == "stream" or row.backward:
        return math.inf
    case = cases.cases(row, cases.GAUSSIAN)[0]
    binary = inspect_fit(case)
    if binary is None:
        return None
    return model.predict(case, binary, TARGETS[row.architecture]).headroom


def fit(row: Row) -> Row | None:
    """The row with the shared memory that it needs, if none of its variants has a fault."""
    shared: dict[str, int] = {}
    for case in cases.shipped(row):
        binary = inspect_fit(case)
        if binary is None:
            return None
        shared[case.kernel] = max(shared.get(case.kernel, 0), binary.shared)
    return with_shared(row, shared)


def with_shared(row: Row, shared: Mapping[str, int]) -> Row:
    """The row with the shared memory that each of its kernels takes."""
    config = row.config
    if isinstance(config, TileConfig):
        return replace(row, config=replace(config, shared=max(shared.values())))
    most = max(taken for kernel, taken in shared.items() if kernel not in config.own)
    own = {kernel: replace(x, shared=shared[kernel]) for kernel, x in config.own.items()}
    return replace(row, config=replace(config, shared=most, own=own))


def inspect_fit(case: Case) -> Binary | None:
    """What is in a case that compiles without a fault."""
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:  # the compiler's, for what it cannot do
        tqdm.write(f"{case.name} {case.row.config}: {type(error).__name__}: {str(error)[:100]}")
        return None
    return None if rules.faults(case, binary, TARGETS[case.row.architecture]) else binary


def runs_everywhere(row: Row) -> bool:
    """Whether the row runs on all the GPUs that it serves."""
    return row.config.shared <= shared_everywhere(row.architecture)


def shared_everywhere(architecture: str) -> int:
    """Bytes that a program may take on all the GPUs that an architecture's rows serve."""
    return SMALLEST_SHARED.get(architecture, INT32_MAX)


def predicted(cell: Cell) -> Row | None:
    """The best of a cell's candidates by their compiled code."""
    ranked: list[tuple[float, Row]] = []
    second_best: Row | None = None
    for row in options(cell):
        room = headroom(row)
        if room is None:
            continue
        if room < ENOUGH:
            ranked.append((room, row))
        elif found := fit(row):
            if runs_everywhere(found):
                return found
            second_best = second_best or found
    for _, row in sorted(ranked, key=lambda pair: -pair[0]):
        if found := fit(row):
            if runs_everywhere(found):
                return found
            second_best = second_best or found
    return in_parts(cell) or second_best


def in_parts(cell: Cell) -> Row | None:
    """The candidate that is fit for most of the gradients' kernels, and others for the rest."""
    if not cell.backward or cell.frames is not None:
        return None
    rows = options(cell)
    taken = [fit_kernels(row) for row in rows]
    best = max(range(len(rows)), key=lambda n: len(taken[n]))
    kernels = {case.kernel for case in cases.shipped(rows[best])}
    shared, own = dict(taken[best]), {}
    for kernel in sorted(kernels - taken[best].keys()):
        n = next((n for n, fits in enumerate(taken) if kernel in fits), None)
        if n is None:
            return None
        own[kernel], shared[kernel] = rows[n].config, taken[n][kernel]
    return with_shared(replace(rows[best], config=replace(rows[best].config, own=own)), shared)


def fit_kernels(row: Row) -> dict[str, int]:
    """Those of a row's kernels that no variant makes unfit, with the shared memory they take."""
    found: dict[str, int] = {}
    unfit = set()
    for case in cases.shipped(row):
        binary = inspect_fit(case)
        if binary is None or binary.shared > shared_everywhere(row.architecture):
            unfit.add(case.kernel)
        else:
            found[case.kernel] = max(found.get(case.kernel, 0), binary.shared)
    return {kernel: shared for kernel, shared in found.items() if kernel not in unfit}


def measured(cell: Cell) -> Row | None:
    """The fastest of a cell's fit candidates on this GPU."""
    from benchmarks.gpu.candidate import seconds

    found = [row for option in options(cell) if (row := fit(option))]
    found = [row for row in found if runs_everywhere(row)] or found
    if cell.backward:
        return found[0] if found else in_parts(cell)
    return min(found, key=seconds, default=None)


def broken(cell: Cell, shipped: dict[Cell, Row]) -> bool:
    """Whether a cell's shipped row is not fit, or lacks though there are candidates for it."""
    row = shipped.get(cell)
    return bool(options(cell)) if row is None else fit(row) != row


def choose(
    todo: list[Cell], function: Callable[[Cell], Row | None], jobs: int
) -> dict[Cell, Row | None]:
    """Each cell's choice."""
    chosen = in_processes(function, todo, jobs)
    return dict(zip(todo, tqdm(chosen, total=len(todo), unit="cell"), strict=True))


def write(chosen: dict[Cell, Row | None]) -> None:
    """Replace the rows of the chosen cells; the others stay."""
    merged = {cell_of(row): row for row in cases.rows()} | chosen
    rows = sorted((row for row in merged.values() if row), key=order)
    for file, backward in ((configs.FILE, False), (configs.BACKWARD_FILE, True)):
        parts = []
        for kernel in ("tile", "stream"):
            lines = [
                json.dumps(fields(row))
                for row in rows
                if (row.kernel, row.backward) == (kernel, backward)
            ]
            parts.append(f'  "{kernel}": [\n    ' + ",\n    ".join(lines) + "\n  ]")
        file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def cell_of(row: Row) -> Cell:
    """What a row is for."""
    return Cell(row.architecture, row.kind, row.frames, row.width, row.backward)


def order(row: Row) -> tuple:
    """Of the file's rows."""
    place = (configs.ARCHITECTURES.index(row.architecture), configs.KINDS.index(row.kind))
    return (*place, row.frames or 0, row.width)


def fields(row: Row) -> dict[str, object]:
    """A row of the file."""
    found = {name: getattr(row, name) for name in cases.KEYS if getattr(row, name) is not None}
    config = asdict(row.config)
    if not config.get("own", True):
        del config["own"]
    for own in config.get("own", {}).values():
        del own["own"]
    return {**found, **config}


def main(arguments: list[str] | None = None) -> None:
    """Rewrite the files of configurations, after each architecture."""
    args = parse(arguments)
    function: Callable[[Cell], Row | None] = predicted
    if not args.predict:
        from benchmarks.gpu.candidate import architecture

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
