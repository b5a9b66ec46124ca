"""``python -m benchmarks.tune.frames``: chooses ``configs_frames.json``.

Of the candidates in ``frame_candidates.json``, (rows, keys, warps of 32 threads, stages) by kind of
products and table, in the order of preference, those may be chosen that compile without fault for
all of a table's variants in ``benchmarks.codegen.frame_cases``. With a GPU it is the fastest, for
that GPU's architecture; with ``--predict``, without a GPU, the first for all, those before that
keep a GPU's units least busy (``benchmarks.units``). What cannot be fit is
not compiled: where outputs leave a thread no registers, which a compiler would find out at length,
or where a thread would load less of a head's narrower part than the gate lets it.

``revisit_below``, the keys of a slot with which its partial output costs less than a revisit, is
where the two take the same time: measured, or by the rates of ``benchmarks.codegen.targets``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import units
from benchmarks.codegen import cases, frame_cases, report
from benchmarks.codegen.compile import in_processes, inspect
from benchmarks.codegen.frame_cases import VARIANTS, FrameEntry
from benchmarks.codegen.targets import TARGETS, VECTOR_BYTES
from benchmarks.tune import frame_times
from benchmarks.tune.candidates import LEAST_BYTES, itemsize
from benchmarks.tune.choose import LEAST_SHARED, inspect_fit, write_tables
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.cli.options import read_options

SIZES = json.loads(Path(__file__).with_name("frame_candidates.json").read_text())

# Assumed: of the matrix instructions' rate, what attention reaches; the cache's bandwidth over the
# memory's.
SUSTAINED, CACHED = 0.65, 1.6

FrameKey = tuple[str, str, int, str]  # architecture, kind, width and table


@dataclass(frozen=True)
class Options(cases.Selection):
    """Which configurations to choose."""

    table: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)
    """Tables of the file."""
    predict: bool = False
    """Choose by compiled code, for every target, without a GPU."""
    repair: bool = False
    """Keep those that are fit; without a GPU."""


def candidates(architecture: str, kind: str, width: int, table: str) -> list[FrameEntry]:
    """Returns the entries to try, best first; ``shared`` and ``programs`` are not known."""
    sizes = table.replace("_query", "").replace("_key", "").replace("revisit", "forward")
    name = f"{kind} {sizes}"
    ratio = TARGETS[architecture].lanes // 32
    found = [
        frame_cases.entry(
            architecture,
            kind,
            width,
            table,
            FramesConfig(rows, keys, max(1, warps // ratio), stages, programs=1, shared=0),
        )
        for rows, keys, warps, stages in SIZES[name] + SIZES["small"]
    ]
    return [entry for entry in found if _holds(entry) and loads_enough(entry)]


def _holds(entry: FrameEntry) -> bool:
    """Tells whether the outputs of an entry's rows leave a thread any registers."""
    outputs = entry.config.rows * entry.width * (2 if "key" in entry.table else 1)
    threads = entry.config.warps * TARGETS[entry.architecture].lanes
    return outputs <= 128 * threads


def loads_enough(entry: FrameEntry) -> bool:
    """Tells whether each thread has enough to load of the narrower part of each block of heads.

    That is a vector, or ``LEAST_BYTES`` where the gate lets a thread have less. Gradients may have
    any: some blocks of theirs fit the registers of so many warps alone.
    """
    config, narrower = entry.config, min(filter(None, configs.split(entry.width)))
    elements = min(config.rows, config.keys) * narrower
    threads = config.warps * TARGETS[entry.architecture].lanes
    least = LEAST_BYTES if report.may_load_less(entry) else VECTOR_BYTES
    return entry.backward or elements * itemsize(entry) >= least * threads


def predicted(key: FrameKey) -> FrameEntry | None:
    """Returns the least busy of a key's candidates that compile without fault."""
    return next(filter(None, map(fit, units.in_order(candidates(*key)))), None)


def measured(key: FrameKey) -> FrameEntry | None:
    """Returns the fastest of a key's fit candidates on this GPU."""
    found = list(filter(None, map(fit, candidates(*key))))
    return min(found, key=frame_times.seconds, default=None)


def repaired(key: FrameKey) -> FrameEntry | None:
    """Returns the shipped entry if it is fit, or else a candidate after it, or else before it."""
    shipped = next((x for x in frame_cases.entries() if _key(x) == key), None)
    entries = candidates(*key)
    if shipped and loads_enough(shipped):
        places = [n for n, x in enumerate(entries) if _sizes(x) == _sizes(shipped)]
        first = places[0] if places else 0
        entries = [shipped, *entries[first:], *entries[:first]]
    return next(filter(None, map(fit, entries)), None)


def _sizes(entry: FrameEntry) -> FramesConfig:
    """Returns what was chosen of a configuration."""
    return replace(entry.config, programs=0, shared=0, registers=0)


def fit(entry: FrameEntry) -> FrameEntry | None:
    """Returns the entry with what it needs, if none of its cases has a fault.

    Where the compiler spills though it could take more registers, the entry says that it may.
    """
    found = _with_needs(entry)
    most = TARGETS[entry.architecture].most_registers(entry.config.warps)
    if found is None and most and most != entry.config.registers and _spares(entry, most):
        found = _with_needs(replace(entry, config=replace(entry.config, registers=most)))
    return found


def _spares(entry: FrameEntry, most: int) -> bool:
    """Tells whether some cases of an entry spill, and these leave registers to take."""
    try:
        binaries = [inspect(case) for case in frame_cases.shipped(entry)]
    except (RuntimeError, ValueError):  # the compiler's, for what it cannot do
        return False
    # A few are kept back for what the compiler needs itself.
    spilling = [x for x in binaries if x.spilled]
    return bool(spilling) and all(x.registers < most - 8 for x in spilling)


def _with_needs(entry: FrameEntry) -> FrameEntry | None:
    found = []
    for case in frame_cases.shipped(entry):
        binary = inspect_fit(case)
        if binary is None or binary.shared > LEAST_SHARED[entry.architecture]:
            return None
        found.append(binary)
    target = TARGETS[entry.architecture]
    programs = min(report.resident(x, entry.config.warps, target) for x in found)
    shared = max(x.shared for x in found)
    return replace(entry, config=replace(entry.config, programs=programs, shared=shared))


def predicted_revisit(architecture: str, kind: str) -> int:
    """Returns ``revisit_below`` by the rates: of products, and of bytes of partial outputs.

    Each number of these is written and read, which for the most part the cache does.
    """
    target, size = TARGETS[architecture], 2 if kind == "16-bit" else 4
    rate = SUSTAINED * report.MATRIX_RATES[kind] * target.matrix
    return max(8, 8 * round(size * rate / (CACHED * target.bandwidth) / 8))


def measured_revisit(architecture: str, kind: str) -> int:
    """Returns ``revisit_below`` by the time that both take on this GPU, of heads of 64."""
    entries = {_key(x): x for x in frame_cases.entries()}
    described = frame_cases.has_lines("forward_described", architecture, kind)
    tables = ("forward_described" if described else "forward", "revisit")
    return frame_times.crossover(*(entries[architecture, kind, 64, table] for table in tables))


def write(
    chosen: Iterable[FrameEntry] = (), revisits: Mapping[tuple[str, str], int] | None = None
) -> None:
    """Replaces the entries of the chosen keys in the file, and ``revisit_below``; others stay."""
    merged = {_key(x): x for x in [*frame_cases.entries(), *chosen]}
    tables = {
        table: [
            _line(merged[key])
            for architecture in configs.ARCHITECTURES
            for kind in configs.KINDS
            for width in configs.WIDTHS
            if (key := (architecture, kind, width, table)) in merged
        ]
        for table in VARIANTS
    }
    below = {
        (x["architecture"], x["kind"]): x["keys"]
        for x in json.loads(configs.FRAMES_FILE.read_text())["revisit_below"]
    } | dict(revisits or {})
    tables["revisit_below"] = [
        json.dumps({"architecture": architecture, "kind": kind, "keys": keys})
        for (architecture, kind), keys in below.items()
    ]
    write_tables(configs.FRAMES_FILE, tables)


def _key(entry: FrameEntry) -> FrameKey:
    return entry.architecture, entry.kind, entry.width, entry.table


def _line(entry: FrameEntry) -> str:
    key = {"architecture": entry.architecture, "kind": entry.kind, "width": entry.width}
    config = asdict(entry.config)
    return json.dumps(key | {name: x for name, x in config.items() if x or name != "registers"})


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the file, after each key."""
    options = read_options(Options, arguments, prog="python -m benchmarks.tune.frames")
    choose, revisit, jobs = predicted, predicted_revisit, options.jobs
    if options.repair:
        choose = repaired
    elif not options.predict:
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU to measure; --predict and --repair need none")
        options = replace(options, target=(cases.this_gpu().architecture,))
        choose, revisit, jobs = measured, measured_revisit, 1
    every = itertools.product(options.target, options.kind, options.width, options.table)
    todo: list[FrameKey] = [x for x in every if frame_cases.has_lines(x[3], *x[:2])]
    missing = []
    for key, entry in zip(todo, in_processes(choose, todo, jobs, unit="key"), strict=True):
        if entry is None:
            missing.append(key)
        else:
            write([entry])
    if not options.repair:
        write(
            revisits={(x, kind): revisit(x, kind) for x in options.target for kind in options.kind}
        )
    if missing:
        raise SystemExit(f"no configuration is fit for {missing}")


if __name__ == "__main__":
    main()
