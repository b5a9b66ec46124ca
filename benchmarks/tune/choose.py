"""Which of the candidates a configuration file gets, by time or by the compiled code."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import vstar_kernels as vk
from benchmarks import units
from benchmarks.check import Oracle
from benchmarks.clock import GpuClock, TimedCall, time_in_turn
from benchmarks.codegen import cases, report
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import GAUSSIAN, Case, Entry, Key
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.targets import TARGETS
from benchmarks.tune.candidates import candidates, holds_outputs, itemsize
from vstar_kernels.attention.call import Call
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.files import write_atomically
from vstar_kernels.testing import largest_error, oracle

ENOUGH = 1.0  # headroom: then the memory is what limits a tile
# The least shared memory of the GPUs that an architecture's entries serve; sm_80's serve 8.6, 8.9
# and 12.x too.
LEAST_SHARED = {name: x.shared_program for name, x in TARGETS.items()} | {"sm_80": 99 * 1024}
UNFIT = sys.maxsize  # bytes of shared memory
UNFIT_SETS = {False: ((), ("map",), ("map", "delta")), True: ((), ("map", "delta"))}  # by backward
# Of what is measured:
TRAFFIC = 512 * 2**20  # bytes of one call
ROUNDS = 15
SECONDS = 2.0  # for the rounds
TF32_ERROR = 2e-2  # products keep ten bits of their operands


def keys(architecture: str) -> list[Key]:
    """Returns what needs a configuration."""
    frames = (None, *configs.TILE_FRAMES)
    choices = ([architecture], configs.KINDS, frames, configs.WIDTHS, (False, True))
    return list(itertools.starmap(Key, itertools.product(*choices)))


def predicted(key: Key) -> Entry | None:
    """Returns the best of a key's candidates by their compiled code."""
    if key.has_sweeps:
        return combined(key)
    large = []
    for entry in filter(None, itertools.starmap(fit, ranked(candidates(key)))):
        if small(entry):
            return entry
        large.append(entry)
    return next(iter(large), None)


def measured(key: Key) -> tuple[Entry | None, dict[Entry, float]]:
    """Returns the fastest of a key's fit candidates on this GPU, and their times.

    Of gradients it is the predicted one, and nothing is timed.
    """
    if key.backward:
        return predicted(key), {}
    for unfit in unfit_sets(key):
        found = list(filter(None, (fit(entry, unfit) for entry in candidates(key))))
        if found:
            times = {entry: seconds(entry) for entry in list(filter(small, found)) or found}
            return min(times, key=lambda entry: times[entry]), times
    return None, {}


def compiled(key: Key) -> None:
    """Compiles a key's candidates, which are then found on the disk."""
    if not key.has_sweeps:  # whose kernels are chosen one by one, and none is timed
        for entry in candidates(key):
            fit(entry)


def small(entry: Entry) -> bool:
    """Tells whether all GPUs that an entry serves have the shared memory."""
    overrides = getattr(entry.config, "overrides", {})
    most = max(x.shared for x in (entry.config, *overrides.values()))
    return most <= LEAST_SHARED[entry.architecture]


def seconds(entry: Entry) -> float:
    """Returns the median time of a Gaussian call with this configuration, checked first."""
    key = cases.plan_key(entry, GAUSSIAN, entry.width)
    of_batch = 4 * math.prod(key.shape[1:]) * key.dtype.itemsize
    shape = (max(1, TRAFFIC // of_batch), *key.shape[1:])
    plan = cases.make_plan(entry, key._replace(shape=shape, device=cases.this_gpu()))
    clock = GpuClock()
    inputs = [
        tuple(torch.randn(3, *shape, device="cuda").to(key.dtype).unbind())
        for _ in range(clock.sets(TRAFFIC))
    ]
    out = torch.full_like(inputs[0][0], float("nan"))

    def run(*qkv: Tensor) -> None:
        plan.run(Call(*qkv, None, None, key.options), out)

    run(*inputs[0])
    check(out, inputs[0], entry.kind)
    try:
        ready = clock.warm_up(TimedCall("candidate", run), inputs)
    except RuntimeError:
        return float("inf")
    (times,) = time_in_turn(clock, [ready], len(inputs), rounds=ROUNDS, seconds=SECONDS).values()
    return statistics.median(times)


def check(out: Tensor, inputs: tuple[Tensor, ...], kind: str) -> None:
    """Refuses to time a wrong result."""
    bias = vk.GaussianBias(1.0)
    try:
        if kind == "tf32":
            error = largest_error(out[:2].cpu(), oracle(*(x[:2].cpu() for x in inputs), bias))
            assert error <= TF32_ERROR, f"error {error}"
        else:
            Oracle(inputs, bias).check_forward(out)
    except AssertionError as error:
        raise SystemExit(f"wrong result for {tuple(out.shape)}, {kind}: {error}") from None


def unfit_sets(key: Key) -> tuple[tuple[str, ...], ...]:
    """Returns what an entry may leave to the stream kernels, by preference: nothing first."""
    return UNFIT_SETS[key.backward] if key.family == "tile" else ((),)


def ranked(entries: list[Entry]) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """Yields entries, each with what it may leave to the stream kernels.

    Those with enough headroom come in their order, first to do all calls, then to do fewer; then
    the others, the most roomy first. Before all others come tiles of gradients that load the next
    one ahead, and forward those that hoist, whatever they leave.
    """
    if entries and entries[0].family == "tile" and entries[0].backward:
        for stages in (2, 1):
            alike = [entry for entry in entries if entry.config.stages == stages]
            for unfit in unfit_sets(entries[0]):
                yield from ((entry, unfit) for entry in alike)
        return
    for _, alike in itertools.groupby(entries, lambda entry: getattr(entry.config, "hoists", True)):
        yield from by_headroom(list(alike))


def by_headroom(entries: list[Entry]) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """Yields entries that hoist alike as :func:`ranked` does."""
    enough, others = list[Entry](), list[tuple[float, Entry]]()
    for entry in entries:
        room = headroom(entry)
        if room >= ENOUGH:
            enough.append(entry)
            yield entry, ()
        elif room > 0:
            others.append((room, entry))
    fewer = unfit_sets(entries[0])[1:]
    yield from itertools.product(enough, fewer)
    for _, entry in sorted(others, key=lambda pair: -pair[0]):
        yield from ((entry, unfit) for unfit in ((), *fewer))


def headroom(entry: Entry) -> float:
    """Returns that of a tile in its commonest variant, a Gaussian; 0 where that has a fault.

    It is infinite where the model says nothing: for streams and gradients.
    """
    if entry.family == "stream" or entry.backward:
        return math.inf
    case = cases.cases(entry, GAUSSIAN)[0]
    binary = inspect_fit(case)
    return report.predict(case, binary, TARGETS[entry.architecture]).headroom if binary else 0.0


def fit(entry: Entry, unfit: tuple[str, ...] = ()) -> Entry | None:
    """Returns the entry with what it needs, if none of its cases has a fault.

    ``unfit`` is what it leaves to the stream kernels, besides those of ``cases.RARE`` that have a
    fault.
    """
    if isinstance(entry.config, TileConfig):
        entry = replace(entry, config=replace(entry.config, unfit=unfit))
        entry = replace(entry, config=replace(entry.config, unfit=(*unfit, *unfit_rare(entry))))
    fits = all(map(inspect_fit, cases.shipped(entry)))
    return with_needs(entry, needs(entry)) if fits else None


def unfit_rare(entry: Entry) -> list[str]:
    """Returns those of ``cases.RARE`` that a tile does not do without a fault."""
    return [
        name
        for name, variant in cases.rare(entry).items()
        if not all(map(inspect_fit, cases.cases(entry, variant)))
    ]


def needs(entry: Entry, *kernels: str) -> dict[str, int]:
    """Returns the shared memory of an entry's kernels, or of some, UNFIT where one has a fault."""
    needed: Counter[str] = Counter()
    for case in cases.shipped(entry):
        if kernels and case.kernel not in kernels:
            continue
        binary = inspect_fit(case)
        needed[case.kernel] = max(needed[case.kernel], binary.shared if binary else UNFIT)
    return needed


def combined(key: Key) -> Entry | None:
    """Returns an entry in which each kernel of a stream's gradients has its best fit candidate.

    The entry's own numbers are those of the statistics, the others' that differ are ``overrides``.
    """
    entries = candidates(key)
    names = {case.kernel for case in cases.shipped(entries[0])}
    chosen, needed = dict[str, StreamConfig](), dict[str, int]()
    for name, ordered in units.orders_of_sweeps(entries, names).items():
        for entry in filter(lambda x: holds_outputs(x, name), ordered):
            needed[name] = needs(entry, name)[name]
            if needed[name] <= LEAST_SHARED[key.architecture]:
                chosen[name] = entry.config
                break
        else:
            return None
    own = chosen["statistics"]
    overrides = {name: x for name, x in sorted(chosen.items()) if x != own}
    return with_needs(Entry(**vars(key), config=replace(own, overrides=overrides)), needed)


@functools.cache
def inspect_fit(case: Case) -> Binary | None:
    """Returns what is in a case that compiles without a fault."""
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:  # the compiler's, for what it cannot do
        tqdm.write(f"{case.name} {case.entry.config}: {type(error).__name__}: {str(error)[:100]}")
        return None
    return None if report.faults(case, binary, TARGETS[case.entry.architecture]) else binary


def with_needs(entry: Entry, needed: Mapping[str, int]) -> Entry:
    """Returns the entry with the shared memory that each of its kernels takes.

    Of a tile it also says how many programs a processor holds in the commonest variant.
    Where it holds fewer of another variant, the rest of them start when those have ended.
    """
    config = entry.config
    if isinstance(config, TileConfig):
        config = replace(config, shared=max(needed.values()))
        first = inspect(cases.shipped(entry)[0])
        programs = report.resident(first, config.warps, TARGETS[entry.architecture])
        return replace(entry, config=replace(config, programs=programs))
    own = {name: replace(x, shared=needed[name]) for name, x in config.overrides.items()}
    most = max(shared for kernel, shared in needed.items() if kernel not in own)
    return replace(entry, config=replace(config, shared=most, overrides=own))


def repaired(key: Key) -> Entry | None:
    """Returns the shipped entry, with the memory it takes now, if it is fit, or the predicted."""
    shipped = next((entry for entry in cases.entries() if entry.key == key), None)
    found = None
    if shipped is not None:
        unfit = getattr(shipped.config, "unfit", ())
        found = fit(shipped, tuple(name for name in unfit if name not in cases.RARE))
    # A GPU without the memory for a tile streams, but nothing is behind the streams.
    return found if found and (key.frames or small(found)) else predicted(key)


def reason(key: Key) -> str:
    """Returns why no candidate for a tile is fit: what is wrong with the one that spills least."""
    target, entries = TARGETS[key.architecture], candidates(key)
    if not entries:
        loaded = 3 * key.frames * key.width * itemsize(key)
        return f"loads {loaded} bytes, a program has {target.shared_program}"
    found = []
    for case in (cases.cases(entry, GAUSSIAN)[0] for entry in entries):
        try:
            binary = inspect(case)
        except (RuntimeError, ValueError):
            continue
        config = case.config
        faults = "; ".join(report.faults(case, binary, target))
        found.append((binary.spilled, f"{_described(config)}: {faults}"))
    return min(found)[1] if found else "no candidate compiles"


def _described(config: TileConfig) -> str:
    """Returns a candidate in words."""
    ahead = "loads a tile ahead" if config.stages > 1 else "loads no tile ahead"
    hoists = "" if config.hoists else ", hoists nothing"
    of = "a sequence" if config.sequences == 1 else f"{config.sequences} sequences"
    return f"{config.queries} queries of {of} in {config.warps} warps, {ahead}{hoists}"


def write(chosen: Mapping[Key, Entry | None]) -> None:
    """Replaces the entries of the chosen keys in the files; the others stay."""
    merged = {entry.key: entry for entry in cases.entries()} | chosen
    entries = [entry for name in TARGETS for key in keys(name) if (entry := merged.get(key))]
    for file, backward in ((configs.FILE, False), (configs.BACKWARD_FILE, True)):
        tables = {
            family: [line(x) for x in entries if (x.family, x.backward) == (family, backward)]
            for family in ("tile", "stream")
        }
        write_tables(file, tables)


def write_tables(file: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Replaces a file of configurations: tables by name, each of lines of JSON."""
    texts = (
        f'  "{name}": [\n    ' + ",\n    ".join(lines) + "\n  ]" for name, lines in tables.items()
    )
    write_atomically(file, "{\n" + ",\n".join(texts) + "\n}\n")


def line(entry: Entry) -> str:
    """Returns an entry's line in its file, without what does not apply."""
    found = asdict(entry, dict_factory=lambda x: {k: v for k, v in x if v not in (None, {}, ())})
    config = found.pop("config")
    del found["backward"]
    if isinstance(entry.config, TileConfig):
        defaults = {field.name: field.default for field in fields(TileConfig)}
        config = {name: value for name, value in config.items() if value != defaults[name]}
    return json.dumps(found | config)
