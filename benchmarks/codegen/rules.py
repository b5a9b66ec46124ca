"""What no shipped configuration may do."""

from __future__ import annotations

from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case
from benchmarks.codegen.targets import Target
from vstar_kernels.attention.triton.facts import VECTOR_BYTES


def faults(case: Case, binary: Binary, target: Target) -> list[str]:
    """Why a kernel is not fit to ship; empty if it is.

    Scalar registers in lanes of vector ones (``Binary.in_lanes``) are no fault: no memory is used.
    """
    found = []
    if binary.spilled:
        found.append(f"spills {binary.spilled} bytes")
    if binary.shared > target.shared_program:
        limit = target.shared_program
        found.append(f"takes {binary.shared} bytes of shared memory, {target.name} has {limit}")
    if not binary.loads:
        found.append("no load of queries, keys or values was recognised")
    aligned = min(VECTOR_BYTES, case.launch.constants["UNIT"] * case.dtypes[0].itemsize)
    if case.row.backward:
        aligned = min(aligned, _share(case, target))
    if binary.loads and min(binary.loads) < aligned:
        found.append(f"loads {min(binary.loads)} bytes at a time where {aligned} are aligned")
    if not binary.matrix and not (case.row.kind == "ieee" and target.triton.backend == "cuda"):
        found.append("has no matrix instruction")
    return found


def _share(case: Case, target: Target) -> int:
    """Bytes of the narrowest block for each thread, which cannot load more.

    Only gradients may have less than a vector: it takes many warps to hold their small blocks.
    """
    constants = case.launch.constants
    width = min(filter(None, (constants["MAIN"], constants["REST"])))
    if "FRAMES" in constants:
        rows = constants["FRAMES"] * constants["SEQUENCES"]
    else:
        rows = min(constants["ROWS"], constants["KEYS"])
    threads = constants["num_warps"] * target.lanes
    return rows * width * case.dtypes[0].itemsize // threads
