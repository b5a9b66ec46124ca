"""Which of the candidates a configuration file gets, by time or by the compiled code."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

from tqdm import tqdm

from benchmarks.codegen import cases, model, rules
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case, Entry, Key
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.targets import KIB, TARGETS
from benchmarks.tune.candidates import candidates
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import TileConfig

ENOUGH = 1.0  # headroom: then the memory is what limits a tile
# The least shared memory of the GPUs that an architecture's entries serve; sm_80's serve 8.6, 8.9
# and 12.x too.
LEAST_SHARED = {name: x.shared_program for name, x in TARGETS.items()} | {"sm_80": 99 * KIB}


def keys(architecture: str) -> list[Key]:
    """Returns what needs a configuration."""
    frames = (None, *configs.TILE_FRAMES)
    choices = ([architecture], configs.KINDS, frames, configs.WIDTHS, (False, True))
    return list(itertools.starmap(Key, itertools.product(*choices)))


def predicted(key: Key) -> Entry | None:
    """Returns the best of a key's candidates by their compiled code."""
    second_best: Entry | None = None
    for entry in ranked(candidates(key)):
        if found := fit(entry):
            if found.config.shared <= LEAST_SHARED[key.architecture]:
                return found
            second_best = second_best or found
    return combined(key) or second_best


def measured(key: Key) -> Entry | None:
    """Returns the fastest of a key's fit candidates on this GPU."""
    from benchmarks.tune.timing import seconds

    found = [entry for candidate in candidates(key) if (entry := fit(candidate))]
    limit = LEAST_SHARED[key.architecture]
    found = [entry for entry in found if entry.config.shared <= limit] or found
    if key.backward:
        return found[0] if found else combined(key)
    return min(found, key=seconds, default=None)


def ranked(entries: list[Entry]) -> Iterator[Entry]:
    """Yields those with enough headroom in their order, then the others, the most roomy first."""
    others = []
    for entry in entries:
        room = headroom(entry)
        if room is not None and room >= ENOUGH:
            yield entry
        elif room is not None:
            others.append((room, entry))
    yield from (entry for _, entry in sorted(others, key=lambda pair: -pair[0]))


def headroom(entry: Entry) -> float | None:
    """Returns that of a tile in its commonest variant, a Gaussian, if that has no fault.

    It is infinite where the model says nothing: for streams and gradients.
    """
    if entry.family == "stream" or entry.backward:
        return math.inf
    case = cases.cases(entry, cases.GAUSSIAN)[0]
    binary = inspect_fit(case)
    return binary and model.predict(case, binary, TARGETS[entry.architecture]).headroom


def fit(entry: Entry) -> Entry | None:
    """Returns the entry with the shared memory that it needs, if none of its cases has a fault."""
    needed: dict[str, int] = {}
    for case in cases.shipped(entry):
        binary = inspect_fit(case)
        if binary is None:
            return None
        needed[case.kernel] = max(needed.get(case.kernel, 0), binary.shared)
    return with_shared(entry, needed)


def combined(key: Key) -> Entry | None:
    """Returns the candidate that is fit for most of the gradients' kernels, others for the rest.

    Only the stream kernels can have configurations of their own.
    """
    if not key.backward or key.frames is not None:
        return None
    entries = candidates(key)
    fits = [fit_kernels(entry) for entry in entries]
    best, needed = max(zip(entries, fits, strict=True), key=lambda pair: len(pair[1]))
    needed, overrides = dict(needed), {}
    for kernel in sorted({case.kernel for case in cases.shipped(best)} - needed.keys()):
        n = next((n for n, kernels in enumerate(fits) if kernel in kernels), None)
        if n is None:
            return None
        overrides[kernel], needed[kernel] = entries[n].config, fits[n][kernel]
    return with_shared(replace(best, config=replace(best.config, overrides=overrides)), needed)


def fit_kernels(entry: Entry) -> dict[str, int]:
    """Returns the shared memory of those kernels of an entry that no variant makes unfit."""
    needed: dict[str, float] = {}
    for case in cases.shipped(entry):
        binary = inspect_fit(case)
        needed[case.kernel] = max(needed.get(case.kernel, 0), binary.shared if binary else math.inf)
    limit = LEAST_SHARED[entry.architecture]
    return {kernel: int(shared) for kernel, shared in needed.items() if shared <= limit}


def inspect_fit(case: Case) -> Binary | None:
    """Returns what is in a case that compiles without a fault."""
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:  # the compiler's, for what it cannot do
        tqdm.write(f"{case.name} {case.entry.config}: {type(error).__name__}: {str(error)[:100]}")
        return None
    return None if rules.faults(case, binary, TARGETS[case.entry.architecture]) else binary


def with_shared(entry: Entry, needed: Mapping[str, int]) -> Entry:
    """Returns the entry with the shared memory that each of its kernels takes."""
    config = entry.config
    if isinstance(config, TileConfig):
        return replace(entry, config=replace(config, shared=max(needed.values())))
    most = max(shared for kernel, shared in needed.items() if kernel not in config.overrides)
    overrides = {
        kernel: replace(x, shared=needed[kernel]) for kernel, x in config.overrides.items()
    }
    return replace(entry, config=replace(config, shared=most, overrides=overrides))


def broken(key: Key, shipped: dict[Key, Entry]) -> bool:
    """Tells whether a key's entry is not fit, or is missing though there are candidates."""
    entry = shipped.get(key)
    return bool(candidates(key)) if entry is None else fit(entry) != entry


def write(chosen: Mapping[Key, Entry | None]) -> None:
    """Replaces the entries of the chosen keys in the files; the others stay."""
    merged = {entry.key: entry for entry in cases.entries()} | chosen
    entries = [entry for name in TARGETS for key in keys(name) if (entry := merged.get(key))]
    for file, backward in ((configs.FILE, False), (configs.BACKWARD_FILE, True)):
        tables = []
        for family in ("tile", "stream"):
            lines = (line(x) for x in entries if (x.family, x.backward) == (family, backward))
            tables.append(f'  "{family}": [\n    ' + ",\n    ".join(lines) + "\n  ]")
        file.write_text("{\n" + ",\n".join(tables) + "\n}\n")


def line(entry: Entry) -> str:
    """Returns an entry's line in its file, without what does not apply."""
    fields = asdict(entry, dict_factory=lambda x: {k: v for k, v in x if v not in (None, {})})
    config = fields.pop("config")
    del fields["backward"]
    return json.dumps(fields | config)
