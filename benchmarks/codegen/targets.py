"""The architectures' limits, and the rates of one GPU of each.

The limits decide whether a kernel runs and how many of its programs are resident. The rates serve
predictions only: they are from the makers' data sheets, and the latencies are assumptions.
"Processor" is a multiprocessor (NVIDIA) or a compute unit (AMD).
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024
REGISTER_UNIT = 8  # a warp's registers come in multiples of so many, of 32 bits a lane
VECTOR_BYTES = 16  # the widest load of one thread


@dataclass(frozen=True, kw_only=True)
class Target:
    """The limits of an architecture, NVIDIA's where not given, and the rates of one GPU of it."""

    triton: GPUTarget
    shared_processor: int  # bytes that all programs of a processor have together
    shared_reserved: int = KIB  # bytes that the driver adds to each program
    registers: int = 65536  # of 32 bits, of one processor
    warps: int = 64  # resident on a processor
    programs: int = 32  # resident on a processor

    gpu: str  # whose rates follow
    processors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    latency: float  # s from a load to its data in a busy memory; assumed
    issue: float = 4  # instructions of a warp that a processor issues in a cycle
    matrix: float  # operations/s of 16-bit matrix instructions, dense

    @property
    def shared_program(self) -> int:
        """The bytes of shared memory that one program may have."""
        return self.shared_processor - self.shared_reserved

    @property
    def lanes(self) -> int:
        """The threads of a warp."""
        return self.triton.warp_size


TARGETS = {
    "sm_80": Target(
        triton=GPUTarget("cuda", 80, 32), shared_processor=164 * KIB, gpu="A100 SXM 80 GB",
        processors=108, clock=1.41e9, bandwidth=2.039e12, latency=0.7e-6, matrix=312e12,
    ),
    "sm_90": Target(
        triton=GPUTarget("cuda", 90, 32), shared_processor=228 * KIB, gpu="H200 SXM",
        processors=132, clock=1.98e9, bandwidth=4.8e12, latency=0.8e-6, matrix=989e12,
    ),
    "sm_100": Target(
        triton=GPUTarget("cuda", 100, 32), shared_processor=228 * KIB, gpu="B200",
        processors=148, clock=1.85e9, bandwidth=8.0e12, latency=0.8e-6, matrix=2250e12,
    ),
    # Four SIMDs, each with 512 registers a lane for up to 8 waves of 64 lanes; a SIMD takes four
    # cycles over an instruction.
    "gfx942": Target(
        triton=GPUTarget("hip", "gfx942", 64), shared_processor=64 * KIB, shared_reserved=0,
        registers=131072, warps=32, programs=16, gpu="MI300X", processors=304, clock=2.1e9,
        bandwidth=5.3e12, latency=0.9e-6, issue=1, matrix=1307e12,
    ),
}  # fmt: skip
