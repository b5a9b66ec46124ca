"""Which of the candidates a configuration file gets, by time or by the compiled code."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.codegen import cases, model, rules
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case, Row
from benchmarks.codegen.compile import in_processes, inspect
from benchmarks.codegen.targets import KIB, TARGETS
from benchmarks.tune import candidates
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.facts import INT32_MAX

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
    from benchmarks.tune.timing import seconds

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
