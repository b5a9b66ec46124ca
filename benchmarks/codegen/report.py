"""What was found in each compiled case: whether it may ship, and what it is predicted to reach.

Nothing is measured. A processor has its part, 1 / processors, of the memory's bandwidth and of
the matrix instructions' rate. Of one tile, a pass of the tile kernel's loop:

- *traffic*, bytes: queries, keys and values read, outputs written, without padding;
- *memory time* = traffic / the processor's bandwidth: the floor;
- *issue time* = instructions · warps / (instructions issued in a cycle) / clock;
- *matrix time* = operations, padding included / the processor's matrix rate (half of it for TF32;
  IEEE float32 on NVIDIA is in the issue time, and a sixteenth on AMD);
- *turn*: how long a program takes by itself, during which its traffic passes once. That is its
  instructions · ``CYCLES`` / clock, and before these the latency of each group of loads, which wait
  for one another; or the longer of the two times, where all loads run a tile ahead. ``resident``
  programs take turns side by side, so a processor needs turn / resident for each of them: Little's
  law.

The *headroom* is memory time / the longest of the others; the kernel is predicted to reach that
fraction of the memory's bandwidth, and at most all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import triton

from benchmarks.codegen import cases, column_cases, frame_cases, without_tile
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case, Key
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.frame_cases import FrameEntry
from benchmarks.codegen.targets import REGISTER_UNIT, TARGETS, VECTOR_BYTES, Target
from vstar_kernels.attention.triton import configs

Result = dict[str, Any]
COLUMNS = column_cases.COMMON
TEMPLATE = Path(__file__).with_name("report.md.jinja")
CYCLES = 4.0  # from one instruction of a warp to its next, on average; assumed
OTHER_SPILL = 96  # bytes that a thread may spill where another Triton compiles a configuration
MATRIX_RATES = {"16-bit": 1.0, "tf32": 0.5, "ieee": 1 / 16}  # by kind, of the 16-bit rate


def examine(case: Case, *, other: bool = False) -> Result:
    """Compiles a case and says what came out; ``faults`` is empty where it may be shipped.

    ``other`` says that the configurations were chosen with another Triton than this one.
    """
    entry, target = case.entry, TARGETS[case.entry.architecture]
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:
        reason = f"does not compile: {type(error).__name__}: {str(error)[:200]}"
        return {"name": case.name, "faults": [reason]}
    found = faults(case, binary, target, spill=OTHER_SPILL if other else 0)
    if binary.shared > case.config.shared and not other:
        found.append(f"takes {binary.shared} bytes of shared memory, {case.config.shared} stated")
    result = {
        "name": case.name,
        "architecture": entry.architecture,
        "kernel": case.kernel,
        "variant": case.variant.name,
        "kind": entry.kind,
        "frames": entry.frames,
        "head_dim": case.head_dim,
        "config": config_of(case),
        **asdict(binary),
        "resident": resident(binary, case.config.warps, target),
        "faults": found,
    }
    if case.kernel == "tile":
        result |= asdict(predict(case, binary, target))
    return result


def read(path: Path) -> list[Result]:
    """Returns the results that a file holds. JSON has made texts of the widths, its keys."""
    results = json.loads(path.read_text())["kernels"]
    for result in results:
        for name in ("loads", "other_loads", "stores"):
            if name in result:
                result[name] = {int(width): n for width, n in result[name].items()}
    return list(results)


def merged(before: Iterable[Result], results: list[Result], every: Iterable[Case]) -> list[Result]:
    """Returns results and those from before of other kernels, in the order of every case.

    Left out is what was found of other configurations than are shipped.
    """
    known = {x["name"]: x for x in before} | {x["name"]: x for x in results}
    examined = {x["name"] for x in results}
    return [
        found
        for case in every
        if (found := known.get(case.name))
        and (case.name in examined or found.get("config") == config_of(case))
    ]


def config_of(case: Case) -> dict[str, int]:
    """Returns the numbers of a case's configuration, and what it goes without."""
    numbers = {name: n for name, n in vars(case.config).items() if isinstance(n, int)}
    return {name: n for name, n in numbers.items() if n is not True}


def offenders(results: Iterable[Result]) -> list[str]:
    """Returns what may not be shipped, and why."""
    return [f"{x['name']}: {'; '.join(x['faults'])}" for x in results if x["faults"]]


def tables(results: list[Result]) -> str:
    """Returns the tables of each architecture: the commonest calls, and the others in short.

    Where there are tiles among them, then also the sizes that have none.
    """
    missing: dict[str, list[tuple[Key, str]]] = {}
    for key, reason in without_tile.read().items():
        missing.setdefault(key.architecture, []).append((key, reason))
    # The tables are text for a terminal, in which HTML's escapes would stand as they are.
    environment = jinja2.Environment(  # nosec B701
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        triton=triton.__version__,
        results=results,
        targets=TARGETS,
        without_tile=missing,
        common=(cases.GAUSSIAN.name, cases.GRADIENTS.name, *frame_cases.COMMON, *COLUMNS),
    )


@dataclass(frozen=True)
class Prediction:
    """What a tile is predicted to reach. ``limit`` names what takes longest beside the memory."""

    sequence_bytes: int
    sequence_operations: int
    headroom: float
    limit: str
    share: float  # of the memory's bandwidth


def faults(case: Case, binary: Binary, target: Target, *, spill: int = 0) -> list[str]:
    """Returns why a kernel is not fit to ship; nothing if it is. It may ``spill`` so many bytes.

    Scalar registers in lanes of vector ones (``Binary.in_lanes``) are no fault: no memory is used.
    """
    found = []
    if binary.spilled > spill:
        found.append(f"spills {binary.spilled} bytes")
    if binary.shared > target.shared_program:
        limit = target.shared_program
        found.append(
            f"takes {binary.shared} bytes of shared memory, {case.entry.architecture} has {limit}"
        )
    constants = case.launch.constants
    aligned = min(VECTOR_BYTES, constants["HEAD"].UNIT * case.dtype.itemsize)
    of_columns = case.entry.family == "columns"
    if may_load_less(case.entry):
        aligned = min(aligned, _bytes_of_a_thread(case, target))
    if not binary.loads:
        found.append("no load of queries, keys or values was recognised")
    elif min(binary.loads) < aligned:
        found.append(f"loads {min(binary.loads)} bytes at a time where {aligned} are aligned")
    multiplies = case.launch.needed.k  # unlike statistics that the forward pass saved
    ahead = binary.asynchronous or case.config.stages == 1 or not multiplies
    if target.triton.backend == "cuda" and not ahead:  # each block would wait for its own loads
        found.append(f"has {case.config.stages} stages, but no load runs ahead of its use")
    one_group = case.entry.family == "frames" and not case.entry.backward
    if case.entry.family == "tile" and target.triton.backend == "cuda":
        # Gradients of some sizes have no registers for addresses of a tile ahead.
        in_turn = case.entry.backward and case.config.stages == 1
        one_group = not in_turn and _two_tiles_fit(case, target)
    if of_columns and "KEYS_REST" in constants:
        # What AMD's loads in stages wait for is the pass before.
        one_group = target.triton.backend == "cuda" or case.config.stages == 1
    if one_group and case.entry.kind == "16-bit" and binary.load_groups > 1:
        found.append(f"waits {binary.load_groups} times for loads in one pass")
    without_matrix = case.entry.kind == "ieee" and target.triton.backend == "cuda"
    if multiplies and not binary.matrix and not without_matrix:
        found.append("has no matrix instruction")
    return found


def may_load_less(entry: Key) -> bool:
    """Tells whether a thread may have less than a vector to load of a block.

    It takes many warps to hold the small blocks of gradients, and over frames those of float32 and
    of all rules together; columns have blocks of 16 keys, and tiles a narrower part of a head.
    Neighbours' loads join into whole rows.
    """
    many_warps = isinstance(entry, FrameEntry) and (
        entry.kind != "16-bit" or entry.table.endswith("_full")
    )
    return entry.backward or entry.family in ("columns", "tile") or many_warps


def _two_tiles_fit(case: Case, target: Target) -> bool:
    """Tells whether all that is loaded of two tiles fits a program's shared memory."""
    constants, head_dim = case.launch.constants, sum(configs.split(case.head_dim))
    tensors = 4 if case.entry.backward else 3  # of gradients, those of the outputs too
    rows = tensors * constants["FRAMES"] * constants["SEQUENCES"]
    return 2 * rows * head_dim * case.dtype.itemsize <= target.shared_program


def _bytes_of_a_thread(case: Case, target: Target) -> int:
    """Returns the bytes that a thread has of the narrowest block, and cannot load more of."""
    constants = case.launch.constants
    width = min(filter(None, (constants["HEAD"].MAIN, constants["HEAD"].REST)))
    if "FRAMES" in constants:
        height = constants["FRAMES"] * constants["SEQUENCES"]
    else:
        names = ("QUERIES", "ROWS", "KEYS", "KEYS_REST")
        height = min(constants[x] for x in names if constants.get(x))
    return height * width * case.dtype.itemsize // (constants["num_warps"] * target.lanes)


def resident(binary: Binary, warps: int, target: Target) -> int:
    """Returns how many programs one processor holds at a time."""
    each = math.ceil(max(binary.registers, 1) / REGISTER_UNIT) * REGISTER_UNIT
    return min(
        target.registers // (each * target.lanes * warps),
        target.warps // warps,
        target.programs,
        target.shared_processor // max(binary.shared + target.shared_reserved, 1),
    )


def predict(case: Case, binary: Binary, target: Target) -> Prediction:
    """Predicts a case of the tile kernel."""
    config, frames = case.entry.config, case.entry.frames
    sequence_bytes = 4 * frames * case.head_dim * case.dtype.itemsize
    operations = 4 * frames**2 * case.head_dim
    padded_operations = 4 * frames**2 * sum(configs.split(case.head_dim)) * config.sequences
    programs = max(resident(binary, config.warps, target), 1)
    matrix_rate = target.matrix * MATRIX_RATES[case.entry.kind] / target.processors
    memory = config.sequences * sequence_bytes / (target.bandwidth / target.processors)
    own, waits = binary.in_pass * CYCLES / target.clock, target.latency * max(binary.load_groups, 1)
    ahead = binary.asynchronous and binary.load_groups == 1
    times = {
        "issue": binary.in_pass * config.warps / target.issue / target.clock,
        "matrix": padded_operations / matrix_rate if binary.matrix else 0.0,
        "latency": (max(own, waits) if ahead else own + waits) / programs,
    }
    limit = max(times, key=lambda name: times[name])
    headroom = memory / times[limit]
    return Prediction(sequence_bytes, operations, headroom, limit, min(headroom, 1.0))
