"""What no shipped configuration may do."""

from __future__ import annotations

from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case
from benchmarks.codegen.targets import VECTOR_BYTES, Target


def faults(case: Case, binary: Binary, target: Target) -> list[str]:
    """Returns why a kernel is not fit to ship; nothing if it is.

    Scalar registers in lanes of vector ones (``Binary.in_lanes``) are no fault: no memory is used.
    """
    found = []
    if binary.spilled:
        found.append(f"spills {binary.spilled} bytes")
    if binary.shared > target.shared_program:
        limit = target.shared_program
        found.append(
            f"takes {binary.shared} bytes of shared memory, {case.entry.architecture} has {limit}"
        )
    constants = case.launch.constants
    aligned = min(VECTOR_BYTES, constants["HEAD"].UNIT * case.dtype.itemsize)
    if case.entry.backward:
        aligned = min(aligned, _bytes_of_a_thread(case, target))
    if not binary.loads:
        found.append("no load of queries, keys or values was recognised")
    elif min(binary.loads) < aligned:
        found.append(f"loads {min(binary.loads)} bytes at a time where {aligned} are aligned")
    if not binary.matrix and not (case.entry.kind == "ieee" and target.triton.backend == "cuda"):
        found.append("has no matrix instruction")
    return found


def _bytes_of_a_thread(case: Case, target: Target) -> int:
    """Returns the bytes that a thread has of the narrowest block, and cannot load more of.

    Only gradients may have less than a vector: it takes many warps to hold their small blocks.
    """
    constants = case.launch.constants
    width = min(filter(None, (constants["HEAD"].MAIN, constants["HEAD"].REST)))
    if "FRAMES" in constants:
        height = constants["FRAMES"] * constants["SEQUENCES"]
    else:
        height = min(constants["QUERIES"], constants["KEYS"])
    return height * width * case.dtype.itemsize // (constants["num_warps"] * target.lanes)
