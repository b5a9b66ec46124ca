"""The architectures' limits, and the rates of one GPU of each.

The limits decide whether a kernel runs and how many of its programs are resident. The rates serve
predictions only: they are from the makers' data sheets, and the latencies are assumptions.
"Processor" is a multiprocessor (NVIDIA) or a compute unit (AMD), whose four SIMDs have 512
registers a lane for up to 8 waves of 64 lanes each, and take four cycles over an instruction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from triton.backends.compiler import GPUTarget

REGISTER_UNIT = 8  # a warp's registers come in multiples of so many, of 32 bits a lane
VECTOR_BYTES = 16  # the widest load of one thread


@dataclass(frozen=True, kw_only=True)
class Target:
    """The limits of an architecture, NVIDIA's where not given, and the rates of one GPU of it."""

    triton: GPUTarget
    shared_processor: int  # bytes that all programs of a processor have together
    shared_reserved: int = 1024  # bytes that the driver adds to each program
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

    def most_registers(self, warps: int) -> int:
        """Returns what a thread of so many warps may be told to take at most; 0 where it cannot."""
        nvidia = self.triton.backend == "cuda"
        return min(255, self.registers // (self.lanes * warps)) if nvidia else 0


def read_targets() -> dict[str, Target]:
    """Returns the targets that ``targets.json`` describes, by architecture."""
    lines = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {name: Target(triton=GPUTarget(*x.pop("triton")), **x) for name, x in lines.items()}


TARGETS = read_targets()
