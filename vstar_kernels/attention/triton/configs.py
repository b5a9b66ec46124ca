"""Launch configurations: plain data, one line for each architecture, type, length and head size.

``python -m benchmarks.tune`` writes them to ``configs.json``: of a list of candidates the fastest
where there is a GPU to measure, and else the one that its compiled code predicts to be.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("configs.json")
BACKWARD_FILE = Path(__file__).with_name("configs_backward.json")
FRAMES_FILE = Path(__file__).with_name("configs_frames.json")
COLUMNS_FILE = Path(__file__).with_name("configs_columns.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = ("16-bit", "tf32", "ieee")  # how products are computed
TILE_FRAMES = (16, 32, 64, 128)
# Head sizes, as the two parts of a head add up; others take the configuration of the next.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 256)


@dataclass(frozen=True)
class TileConfig:
    """How :mod:`tile` covers a problem, with so many ``programs`` on a processor.

    With ``stages`` of 2 the next tile is loaded while one is computed. Forward, without
    ``hoists``, LLVM leaves in the loop over tiles what all of them have in common, which takes
    fewer registers. ``shared`` is the memory it takes, in bytes. ``unfit`` names what it has no
    registers for beside a Gaussian weighted by the row maximum: "map", the mean map or its
    gradient, "delta", a Δ that is read, "map_max", the statistic of that name, which Triton 3.6 and
    3.7 do not compile for sm_100 beyond 32 frames, and "wide", offsets of 64 bits.
    """

    queries: int
    sequences: int
    warps: int
    stages: int = 1
    hoists: bool = True
    programs: int = 1
    shared: int = 0
    unfit: tuple[str, ...] = ()

    def chunks(self, processors: int, ranges: int, sequences: int) -> int:
        """Returns among how many programs each of the ``ranges`` of ``sequences`` is shared out.

        They are as many as are resident at a time, but one for each range at least, and at most one
        for each tile.
        """
        resident = processors * self.programs // ranges
        return max(1, min(resident, -(-sequences // self.sequences)))


@dataclass(frozen=True)
class StreamConfig:
    """How :mod:`stream` covers a problem; ``shared`` is the memory it takes, in bytes.

    Some kernels may have configurations of their own in ``overrides``: forward "pointers", without
    descriptors; of the gradients', "map_max", "grad_delta", "maps" for the mean map's, and
    "grad_query" and "grad_key", which are "…_full" in calls that take more registers
    (:func:`stream_backward.sweep_name`).
    """

    queries: int
    keys: int
    warps: int
    stages: int
    shared: int
    overrides: Mapping[str, StreamConfig] = field(default_factory=dict, hash=False)

    def of_kernel(self, kernel: str) -> StreamConfig:
        """Returns a kernel's override, or else this configuration."""
        return self.overrides.get(kernel, self)


@dataclass(frozen=True)
class FramesConfig:
    """How :mod:`frames_forward` covers a problem, with so many ``programs`` on a processor.

    ``registers`` is the most that a thread may take, 0 where the compiler knows best. NVIDIA's aims
    at several programs on a processor, and may spill where it could just take more.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int
    shared: int
    registers: int = 0

    def constants(self) -> dict[str, int]:
        """Returns what a launch compiles in."""
        found = {"ROWS": self.rows, "KEYS": self.keys, "STAGES": self.stages}
        found["num_warps"] = self.warps
        return found | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class ColumnsConfig:
    """How :mod:`columns_forward` and :mod:`columns_backward` cover a problem.

    ``keys`` is 0 where a program has all keys at a time; ``shared`` is the memory it takes.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    shared: int


def stream_config(
    overrides: Mapping[str, dict[str, Any]] | None = None, **sizes: int
) -> StreamConfig:
    """Returns the configuration that a line of the file describes."""
    made = {kernel: StreamConfig(**config) for kernel, config in (overrides or {}).items()}
    return StreamConfig(**sizes, overrides=made)


def tile_config(unfit: Iterable[str] = (), *, hoists: bool = True, **sizes: int) -> TileConfig:
    """Returns the configuration that a line of the file describes."""
    return TileConfig(**sizes, hoists=hoists, unfit=tuple(unfit))


def split(head_dim: int) -> tuple[int, int]:
    """Returns a head's two parts, powers of two of at least 16, as matrix instructions take, or 0.

    >>> split(64), split(40), split(72), split(160), split(56)
    ((64, 0), (32, 16), (64, 16), (128, 32), (64, 0))
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    if head_dim <= main:
        return main, 0
    rest = max(16, 1 << (head_dim - main - 1).bit_length())
    return (main, rest) if rest < main else (2 * main, 0)


def padded_frames(frames: int) -> int:
    """Returns the size of the tile that holds so many frames, if one does."""
    return next((size for size in TILE_FRAMES if size >= frames), frames)


def tile(architecture: str, kind: str, frames: int, head_dim: int) -> TileConfig | None:
    """Returns the configuration for so many frames; None where no tile holds them."""
    key = (architecture, kind, padded_frames(frames), width(head_dim))
    return _table(FILE, "tile", tile_config).get(key)


def stream(architecture: str, kind: str, head_dim: int) -> StreamConfig:
    """Returns the configuration for any number of frames."""
    return _table(FILE, "stream", stream_config)[architecture, kind, None, width(head_dim)]


def tile_backward(architecture: str, kind: str, frames: int, head_dim: int) -> TileConfig | None:
    """Returns the gradients' configuration for so many frames; None where no tile holds them."""
    key = (architecture, kind, padded_frames(frames), width(head_dim))
    return _table(BACKWARD_FILE, "tile", tile_config).get(key)


def stream_backward(architecture: str, kind: str, head_dim: int) -> StreamConfig:
    """Returns the gradients' configuration for any number of frames."""
    return _table(BACKWARD_FILE, "stream", stream_config)[architecture, kind, None, width(head_dim)]


def frames(architecture: str, kind: str, head_dim: int, table: str) -> FramesConfig:
    """Returns a configuration for attention over frames of tokens, from one of its tables."""
    return _table(FRAMES_FILE, table, FramesConfig)[architecture, kind, None, width(head_dim)]


def columns(architecture: str, kind: str, head_dim: int, table: str) -> ColumnsConfig | None:
    """Returns a configuration for attention with maps of columns, from one of its tables.

    None where no tile holds so many keys.
    """
    key = (architecture, kind, None, width(head_dim))
    return _table(COLUMNS_FILE, table, ColumnsConfig).get(key)


def revisit_below(architecture: str, kind: str) -> float:
    """Returns how many keys a slot must have for its partial output to cost less than a revisit.

    :mod:`frames_forward` says what these are.
    """
    return _revisits()[architecture, kind]


def width(head_dim: int) -> int:
    """Returns which of ``WIDTHS`` serves a head size."""
    return next(size for size in WIDTHS if size >= sum(split(head_dim)))


@functools.cache
def _table(file: Path, kernel: str, config: Callable[..., Any]) -> dict[tuple[object, ...], Any]:
    rows = json.loads(file.read_text())[kernel]
    keys = ("architecture", "kind", "frames", "width")
    return {tuple(row.pop(key, None) for key in keys): config(**row) for row in rows}


@functools.cache
def _revisits() -> dict[tuple[str, str], float]:
    rows = json.loads(FRAMES_FILE.read_text())["revisit_below"]
    return {(row["architecture"], row["kind"]): row["keys"] for row in rows}
