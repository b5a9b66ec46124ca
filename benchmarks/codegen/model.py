"""From a binary to resident programs and, for tiles, the predicted share of the bandwidth.

Nothing here is measured. A processor has a share (1 / processors) of the memory's bandwidth. Of one
program of the tile kernel, whose instructions all run once:

- *traffic*, bytes: queries, keys and values read, outputs written, without padding;
- *memory time* = traffic / share of the bandwidth: the floor;
- *issue time* = instructions · warps / (instructions issued in a cycle) / clock;
- *matrix time* = operations, padding included / share of the matrix instructions' rate (half of it
  for TF32; IEEE float32 on NVIDIA is in the issue time, and a sixteenth on AMD);
- *turn* = latency of one load + instructions · ``CYCLES`` / clock: how long a program takes by
  itself, during which its traffic passes once. ``resident`` programs take turns side by side, so a
  processor needs turn / resident for each of them: Little's law.

The *headroom* is memory time / the longest of the others; the predicted share of the bandwidth is
the headroom, at most 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case
from benchmarks.codegen.targets import Target
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import TileConfig

CYCLES = 4.0  # from one instruction of a warp to its next, on average; assumed
MATRIX_RATES = {"16-bit": 1.0, "tf32": 0.5, "ieee": 1 / 16}


@dataclass(frozen=True)
class Prediction:
    """Of one tile. ``limit`` names what takes longest beside the memory."""

    sequence_bytes: int
    sequence_operations: int
    headroom: float
    limit: str

    @property
    def share(self) -> float:
        """Of the memory's bandwidth."""
        return min(self.headroom, 1.0)


def resident(binary: Binary, warps: int, target: Target) -> int:
    """Programs that one processor holds at a time."""
    each = math.ceil(max(binary.registers, 1) / target.register_unit) * target.register_unit
    limits = [
        target.registers // (each * target.lanes * warps),
        target.warps // warps,
        target.programs,
        target.shared_processor // max(binary.shared + target.shared_reserved, 1),
    ]
    return min(limits)


def predict(case: Case, binary: Binary, target: Target) -> Prediction:
    """For a case of the tile kernel."""
    config = case.row.config
    assert isinstance(config, TileConfig)
    assert case.row.frames is not None
    size = case.dtypes[0].itemsize
    frames, padded = case.row.frames, sum(configs.split(case.head_dim))
    sequence_bytes = 4 * frames * case.head_dim * size
    operations = 4 * frames**2 * case.head_dim
    padded_operations = 4 * frames**2 * padded * config.sequences
    programs = max(resident(binary, config.warps, target), 1)
    traffic = config.sequences * sequence_bytes
    matrix_rate = target.matrix * MATRIX_RATES[case.row.kind] / target.processors
    memory = traffic / (target.bandwidth / target.processors)
    times = {
        "issue": binary.instructions * config.warps / target.issue / target.clock,
        "matrix": padded_operations / matrix_rate if binary.matrix else 0.0,
        "latency": (target.latency + binary.instructions * CYCLES / target.clock) / programs,
    }
    limit = max(times, key=lambda name: times[name])
    return Prediction(sequence_bytes, operations, memory / times[limit], limit)
