"""The cases: every row of workloads.json, and long sequences."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

WORKLOADS = Path(__file__).parents[1] / "workloads.json"
LARGE = 256 * 10**6  # bytes moved, from which a case counts for the requirements
FLEX_SIZES = {(16, 40), (16, 64), (16, 72), (16, 80), (16, 160), (64, 64), (128, 64)}
LONG_FRAMES = (1024, 2048, 4096, 8192)
LONG_BATCH, LONG_HEADS = 16, 8


@dataclass(frozen=True)
class Case:
    """One call in bfloat16; ``flex``: compared with FlexAttention too, which compiles for long."""

    model: str
    level: str
    batch: int
    frames: int
    heads: int
    head_dim: int
    flex: bool

    @property
    def traffic(self) -> int:
        """Bytes that must be read and written: four tensors of two-byte elements."""
        return 8 * self.batch * self.frames * self.heads * self.head_dim

    @property
    def operations(self) -> int:
        """Of QKᵀ and A′V."""
        return 4 * self.batch * self.heads * self.frames**2 * self.head_dim


def tile() -> list[Case]:
    """The models' calls at each number of frames, those that move much first."""
    table = json.loads(WORKLOADS.read_text())
    found: dict[tuple[int, ...], Case] = {}
    for model, description in table["models"].items():
        for level in description["levels"]:
            for frames in table["frames"]:
                sizes = (level["rows"], frames, level["heads"], level["head_dim"])
                found.setdefault(sizes, Case(model, str(level["level"]), *sizes, flex=False))
    return _with_flex(sorted(found.values(), key=lambda case: -case.traffic))


def _with_flex(cases: list[Case]) -> list[Case]:
    """Mark, of some numbers of frames and head sizes, the case that comes closest to 1 GB."""
    best: dict[tuple[int, int], Case] = {}
    for case in cases:
        key = (case.frames, case.head_dim)
        if key not in best or abs(case.traffic - 10**9) < abs(best[key].traffic - 10**9):
            best[key] = case
    chosen = {case for key, case in best.items() if key in FLEX_SIZES}
    return [replace(case, flex=case in chosen) for case in cases]


def stream() -> list[Case]:
    """One-pass temporal attention over long clips."""
    return [
        Case("long", "", LONG_BATCH, frames, LONG_HEADS, head_dim, flex=head_dim == 64)
        for head_dim in (64, 128)
        for frames in LONG_FRAMES
    ]


SUITES = {"tile": tile, "stream": stream}
