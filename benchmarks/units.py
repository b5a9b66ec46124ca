"""``python -m benchmarks.units``: how long a GPU's units are busy with the shipped configurations.

Each runs its commonest call on an emulated GPU of NVIDIA's that counts what the kernels ask for
(``emulator.counts``). Of a processor there are, in cycles,

- *issue*: instructions of warps, as PTX has them / those issued in a cycle;
- *exp*: exponentials / 16;
- *matrix*: operations / those of the matrix instructions in a cycle;
- *shared*: shared memory's cycles, with what conflicts of its banks add;
- *cache*: bytes that warps ask global memory for / 32, assumed of the second-level cache;
- *memory*: the bytes of all tensors, once / the memory's bandwidth.

The table has them over the memory's, which is the floor of tiles and columns. Each kernel of a
stream's gradients has a row, over the memory's of all three. Calls are small (as below); over
frames and in streams the ratios grow with their length, and only configurations for the same size
compare. A kernel is hardly faster than the unit that is busy longest; what of their time does not
pass side by side, and what it waits for besides, this does not say. Nothing is measured.

``benchmarks.tune`` tries candidates in the order of that unit's time (:func:`in_order`,
:func:`orders_of_sweeps`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from benchmarks.codegen import calls, cases, frame_cases, shipped
from benchmarks.codegen.calls import PublicCall
from benchmarks.codegen.cases import Entry
from benchmarks.codegen.column_cases import ColumnEntry
from benchmarks.codegen.frame_cases import FrameEntry
from benchmarks.codegen.report import MATRIX_RATES
from benchmarks.codegen.targets import TARGETS
from benchmarks.emulator.counts import SECTOR, Counts
from benchmarks.emulator.driver import SHARED, EmulatedGPU
from benchmarks.emulator.memory import FaultError
from benchmarks.report.tables import Table
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.cli.options import read_options

EXPONENTIALS = 16  # of a processor in a cycle
CACHE = 32  # bytes of a processor in a cycle, from the second-level cache; assumed
ALIKE, WAITS = 1.05, 1.5  # what counts as alike; assumed
# Of streams, a few blocks; of their calls with all options, which take long, more than a tile has.
FRAMES, FRAMES_IN_FULL = 256, 128
SMALL = StreamConfig(queries=32, keys=32, warps=4, stages=1, shared=0)  # every kernel runs with it
OF_COLUMNS = {"batch": 1, "queries": 256, "heads": 4}
OF_FRAMES = {"frames": 2, "tokens": 128, "text": 64}
LONGER = 384  # tokens of such a frame, for what a forward kernel does for each key
# Of one call's gradients, the kernels that have configurations of their own, and what they write.
KERNELS = {"grad_query": ("query",), "grad_key": ("key", "value")}
GPU: list[EmulatedGPU] = []  # of this process


@dataclass(frozen=True)
class Options(shipped.Selection):
    """Which configurations to run."""

    target: tuple[Literal[tuple(SHARED)], ...] = ("sm_90",)
    """Architectures."""
    kind: tuple[Literal[configs.KINDS], ...] = ("16-bit",)
    """Kinds of products."""
    tokens: int = OF_FRAMES["tokens"]
    """Of each of the two frames of a call of frame_attention, which has 64 of text besides."""


@dataclass(frozen=True)
class Cycles:
    """How many cycles of a processor its units are busy with a call."""

    issue: float
    exp: float
    matrix: float
    shared: float
    cache: float
    memory: float

    @property
    def longest(self) -> float:
        """Those of the unit that is busy longest."""
        return max(vars(self).values())

    def __sub__(self, other: Cycles) -> Cycles:
        return Cycles(**{name: n - getattr(other, name) for name, n in vars(self).items()})


def common_call(entry: Any, tokens: int = OF_FRAMES["tokens"]) -> tuple[PublicCall, Any]:
    """Returns the commonest call of an entry's kernels, and its variant.

    ``tokens`` are those of a frame.
    """
    if isinstance(entry, FrameEntry):
        variants = frame_cases.VARIANTS[entry.table]
        variant = next((x for x in variants if x.name in frame_cases.COMMON), variants[0])
        sizes = OF_FRAMES | {"tokens": tokens}
        lengths = [sizes["frames"] * tokens]
        return calls.of_frames(entry, variant, entry.width, **sizes, lengths=lengths), variant
    if isinstance(entry, ColumnEntry):
        variant = entry.variants[0]
        return calls.of_columns(entry, variant, entry.width, **OF_COLUMNS), variant
    variant = cases.GRADIENTS if entry.backward else cases.GAUSSIAN
    if not entry.frames:
        call = calls.tar(entry, variant, entry.width, batch=1, frames=FRAMES, heads=1)
        return call, variant
    batch, heads = entry.config.programs, 2 * entry.config.sequences
    call = calls.tar(entry, variant, entry.width, batch=batch, frames=entry.frames, heads=heads)
    return call, variant


def count(entry: Any, *sizes: int) -> dict[str, Cycles]:
    """Returns what an entry's kernels ask for in their commonest call, on this emulated GPU.

    There is one, named by its table, or of a stream's gradients each by its configuration's name.
    ``sizes`` are those of :func:`common_call`.
    """
    call, variant = common_call(entry, *sizes)
    of_kernels, written = run(entry, variant, call)[entry.backward]
    table = getattr(entry, "table", "")
    kernel = next((x for x in KERNELS if x in table), "")
    own = [x for name, x in written.items() if name in KERNELS.get(kernel, written)]
    tensors = [*call.tensors.values(), *call.weights, *own]
    traffic = sum(x.numel() * x.element_size() for x in tensors)
    if entry.has_sweeps:
        launches = cases.launches(entry, variant, entry.width)
        names = {name: launch.kernel.__name__ for name, launch in launches.items()}
    else:
        names = {table or ("gradients" if entry.backward else "forward"): kernel}
    found = {
        name: sum((x for function, x in of_kernels.items() if part in function), Counts())
        for name, part in names.items()
    }
    if missing := [name for name, x in found.items() if not x.instructions]:
        raise KeyError(f"{missing} of {entry.config} have not run, but {', '.join(of_kernels)}")
    return {name: cycles(entry, x, traffic) for name, x in found.items()}


def run(entry: Any, variant: Any, call: PublicCall) -> list[tuple[dict[str, Counts], Any]]:
    """Runs a call; returns what its kernels ask for, by their names, and what they wrote.

    Forward comes first, then backward, if it is an entry for gradients.
    """
    (gpu,) = GPU
    torch.manual_seed(0)
    attention = functools.partial(call.attention, backend="triton")
    with calls.circumstances(entry, variant), calls.configured(entry):
        leaves = {name: x.requires_grad_(name in call.wanted) for name, x in call.tensors.items()}
        gpu.counts = {}
        results = call.forward(attention, leaves)
        found: list[tuple[dict[str, Counts], Any]] = [(gpu.counts, dict(enumerate(results)))]
        if entry.backward:
            gpu.counts = {}
            written = call.gradients(leaves, results)
            found.append((gpu.counts, written))
    return found


def cycles(entry: cases.Key, found: Counts, traffic: int) -> Cycles:
    """Returns the cycles of what was counted, and of so many bytes of tensors."""
    target = TARGETS[entry.architecture]
    of_processor = target.processors * target.clock
    rate = MATRIX_RATES[entry.kind] * target.matrix / of_processor
    return Cycles(
        issue=found.instructions / target.issue,
        exp=found.exponentials / EXPONENTIALS,
        matrix=found.operations / rate,
        shared=found.shared,
        cache=found.sectors * SECTOR / CACHE,
        memory=traffic / (target.bandwidth / of_processor),
    )


def emulated(architecture: str, jobs: int = 1) -> ProcessPoolExecutor:
    """Returns new processes that have an emulated GPU; this one may want another, or a real one."""
    return ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_enter, initargs=(architecture,)
    )


def _enter(architecture: str) -> None:
    stack, gpu = ExitStack(), EmulatedGPU(architecture, processors=1)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="units-"))
    stack.enter_context(gpu.installed(Path(folder)))
    GPU.append(gpu)
    multiprocessing.util.Finalize(None, stack.close, exitpriority=0)
    torch.set_num_threads(1)


def in_order(entries: list[Any]) -> list[Any]:
    """Returns a key's candidates, those first whose busiest unit has least to do.

    What loads nothing ahead waits for it, which is taken for ``WAITS`` times as much. Candidates
    that are alike to a part in twenty stay in their order, and so do all on AMD's GPUs, which are
    not emulated. Last are those that do not run.
    """
    if not entries or entries[0].architecture not in SHARED:
        return entries
    with emulated(entries[0].architecture) as process:
        return ordered(entries, list(process.map(_cost, entries)))


def sweeps_are_counted(key: cases.Key) -> bool:
    """Tells whether the candidates for a stream's gradients are put in an order by their work."""
    return key.kind == "16-bit" and key.architecture in SHARED


def orders_of_sweeps(entries: list[Entry], names: Iterable[str]) -> dict[str, list[Entry]]:
    """Returns the order of :func:`in_order` for each of the kernels of a stream's gradients.

    ``names`` are those of ``cases.launches``. In 32 bits, too, candidates stay in their order.
    """
    if not sweeps_are_counted(entries[0]):
        return dict.fromkeys(names, entries)
    with emulated(entries[0].architecture) as process:
        costs = list(process.map(_costs, entries))
    return {name: ordered(entries, [x.get(name, math.inf) for x in costs]) for name in names}


def ordered(entries: list[Any], costs: list[float]) -> list[Any]:
    """Returns entries by what they cost; those that are alike stay in their order."""
    left, found = list(zip(costs, entries, strict=True)), list[Any]()
    while left:
        most = ALIKE * min(cost for cost, _ in left)
        found += [entry for cost, entry in left if cost <= most]
        left = [pair for pair in left if pair[0] > most]
    return found


def _cost(entry: Any) -> float:
    """Returns the cycles of an entry's busiest unit, infinity where it does not run.

    Of forward passes over frames, which are long, they are those of more keys and rows: what a
    program does once would weigh too much in so small a call.

    Raises:
        FaultError: It runs, and does what a GPU would fail at.
    """
    with _unless_impossible(entry):
        (found,) = count(entry).values()
        if isinstance(entry, FrameEntry) and entry.table.startswith(("forward", "known")):
            (longer,) = count(entry, LONGER).values()
            found = longer - found
        return _waiting(entry.config, found)
    return math.inf


def _costs(entry: Entry) -> dict[str, float]:
    """Returns the same of each kernel of a stream's gradients, without those that do not run."""
    found: dict[str, float] = {}
    for variant, frames in ((cases.VALUES, FRAMES_IN_FULL), (cases.GRADIENTS, FRAMES)):
        names = cases.launches(entry, variant, entry.width).keys() - found.keys()
        of_call = _costs_of(entry, names, variant, frames)
        for name in names - of_call.keys():  # a kernel that does not run ends the call
            one = replace(SMALL, overrides={name: entry.config})
            of_call |= _costs_of(replace(entry, config=one), {name}, variant, frames)
        found |= of_call
        if variant == cases.VALUES:  # of these the next call has less to do
            found |= {name: of_call.get(name, math.inf) for name in ("statistics", "map_max")}
    return found


def _costs_of(
    entry: Entry, names: Iterable[str], variant: cases.Variant, frames: int
) -> dict[str, float]:
    """Returns what these kernels of one call cost; nothing where the call cannot be run."""
    with _unless_impossible(entry):
        call = calls.tar(entry, variant, entry.width, batch=1, frames=frames, heads=1)
        (forward, _), (backward, _) = run(entry, variant, call)
        launches = cases.launches(entry, variant, entry.width)
        found = {}
        for name in names:
            counts = (forward if name == "maps" else backward)[launches[name].kernel.__name__]
            found[name] = _waiting(entry.config.of_kernel(name), cycles(entry, counts, 0))
        return found
    return {}


def _waiting(config: Any, found: Cycles) -> float:
    """Returns the cycles of the busiest unit, more where all wait for what is loaded."""
    return found.longest * (WAITS if config.stages == 1 else 1.0)


@contextlib.contextmanager
def _unless_impossible(entry: Any) -> Iterator[None]:
    try:
        yield
    except (FaultError, KeyError):
        raise
    except Exception as error:  # of Triton's own kinds, for what it cannot do
        tqdm.write(f"{entry.config}: {type(error).__name__}: {str(error)[:100]}")


def rows(entries: list[Any], found: Iterable[dict[str, Cycles]]) -> Iterable[list[str]]:
    """Yields the table's rows."""
    for entry, of_kernels in zip(entries, found, strict=True):
        size = f"{entry.frames} × {entry.width}" if entry.frames else str(entry.width)
        for kernel, x in of_kernels.items():
            config = entry.config.of_kernel(kernel) if entry.has_sweeps else entry.config
            block = "×".join(
                str(n) for name in ("queries", "rows", "sequences", "keys")
                if (n := getattr(config, name, 0))
            )  # fmt: skip
            units = [f"{n / x.memory:.2f}" for name, n in vars(x).items() if name != "memory"]
            yield [f"{entry.family}, {kernel}", size, block, str(config.warps), *units]


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each architecture; returns the exit status."""
    options = read_options(Options, arguments, prog="python -m benchmarks.units")
    head = ["kernels", "size", "block", "warps", "issue", "exp", "matrix", "shared", "cache"]
    every = shipped.entries()
    for target in options.target:
        chosen = [x for x in every if x.architecture == target and options.has(x)]
        with emulated(target, options.jobs) as process:
            counted = process.map(count, chosen, itertools.repeat(options.tokens))
            found = tqdm(counted, total=len(chosen), unit="line")
            print(Table(target, head, list(rows(chosen, found))).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
