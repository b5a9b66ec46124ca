"""Limits of the architectures, and the rates of one GPU of each.

The limits decide whether a kernel runs and how many programs are resident. The rates are the
makers' data sheets' and serve predictions only; the latencies are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """An architecture. "Processor" is a multiprocessor or compute unit."""

    name: str
    triton: GPUTarget
    shared_program: int  # bytes that one program may have
    shared_processor: int  # bytes that all programs of a processor share
    shared_reserved: int  # bytes that the driver adds to each program
    registers: int  # of 32 bits, of one processor
    register_unit: int  # a warp's registers come in multiples of so many, of 32 bits a lane
    warps: int  # resident on a processor
    programs: int  # likewise

    gpu: str  # whose rates follow
    processors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    latency: float  # s from a load to its data in a busy memory; assumed
    issue: float  # instructions of a warp that a processor issues in a cycle
    matrix: float  # operations/s of 16-bit matrix instructions, dense

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return self.triton.warp_size


TARGETS = {
    target.name: target
    for target in (
        Target(
            *("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, KIB, 65536, 8, 64, 32),
            *("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 0.7e-6, 4, 312e12),
        ),
        Target(
            *("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, KIB, 65536, 8, 64, 32),
            *("H200 SXM", 132, 1.98e9, 4.8e12, 0.8e-6, 4, 989e12),
        ),
        Target(
            *("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, KIB, 65536, 8, 64, 32),
            *("B200", 148, 1.85e9, 8.0e12, 0.8e-6, 4, 2250e12),
        ),
        # Four SIMDs, each with 512 registers a lane for up to 8 waves of 64 lanes; a SIMD takes
        # four cycles over an instruction.
        Target(
            *("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 0, 131072, 8, 32, 16),
            *("MI300X", 304, 2.1e9, 5.3e12, 0.9e-6, 1, 1307e12),
        ),
    )
}
