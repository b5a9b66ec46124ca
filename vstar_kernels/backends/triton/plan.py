"""What to launch for a call: the kernel, its grid, and every argument but the tensors.

A plan depends on a call's :class:`Facts` only, so that it is made once for each kind of call and
found again in the time that hashing them takes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

from vstar_kernels.backends.triton import configs
from vstar_kernels.backends.triton.configs import StreamConfig, TileConfig
from vstar_kernels.backends.triton.stream import map_max_kernel, stream_kernel
from vstar_kernels.backends.triton.tile import tile_kernel

LOG2E = math.log2(math.e)
NEGLIGIBLE = 2.0**-26  # of a statistic, in units of itself: below float32's resolution
VECTOR_BYTES = 16  # the widest load of one thread
INT32_MAX = 2**31 - 1
PROGRAMS_PER_PROCESSOR = 8  # of a persistent grid; more than are resident at a time

Strides = tuple[int, ...]


class Device(NamedTuple):
    """What matters of a GPU: ``shared`` bytes of memory for one program, ``processors``."""

    architecture: str
    shared: int
    processors: int


class Facts(NamedTuple):
    """All that a plan depends on."""

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    shape: tuple[int, ...]
    strides: tuple[Strides, Strides, Strides, Strides]  # of query, key, value and output
    scale: float
    strength: float
    form: str  # "none", "gaussian", "symmetric", "signed" or "dense"
    sigma: float
    values_strides: Strides  # see regularization()
    stat: str
    stat_strides: Strides
    clamp: bool


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid; calling it with its tensors launches it."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self, *tensors: torch.Tensor) -> None:
        self.kernel[(self.programs,)](*tensors, *self.arguments, **self.constants)


@dataclass(frozen=True)
class Plan:
    """A call's launches. ``map_max``, if any, comes first and leaves one number a program."""

    forward: Launch
    map_max: Launch | None = None


@functools.lru_cache(maxsize=4096)
def make(facts: Facts) -> Plan:
    """The plan of a call."""
    frames, head_dim = facts.shape[-3], facts.shape[-1]
    kind = kind_of(facts.dtype, facts.ieee)
    tile = configs.tile(facts.device.architecture, kind, frames, head_dim)
    if tile is not None and tile.shared <= facts.device.shared:
        return Plan(tile_launch(facts, tile))
    stream = configs.stream(facts.device.architecture, kind, head_dim)
    map_max = map_max_launch(facts, stream) if facts.stat == "map_max" else None
    return Plan(stream_launch(facts, stream), map_max)


def kind_of(dtype: torch.dtype, ieee: bool) -> str:
    """How products are computed, one of ``configs.KINDS``."""
    if dtype != torch.float32:
        return "16-bit"
    return "ieee" if ieee else "tf32"


def grid(facts: Facts) -> int:
    """How many programs the largest launch has."""
    plan = make(facts)
    return max(launch.programs for launch in (plan.forward, plan.map_max) if launch)


def tile_launch(facts: Facts, config: TileConfig) -> Launch:
    """The tile kernel with a configuration, which need not be the one in the table."""
    batch, space, frames, heads, _ = five(facts.shape)
    sequences = batch * space * heads
    padded = configs.padded_frames(frames)
    programs = -(-sequences // config.sequences)
    # A table that all heads share stays in registers where it is small; a Gaussian is computed
    # anew in less time than it would take from the others.
    keep = facts.form in ("symmetric", "signed", "dense") and not facts.values_strides[0]
    keep = keep and config.rows == padded <= 64
    if keep:
        programs = min(programs, facts.device.processors * PROGRAMS_PER_PROCESSOR)
    constants = {
        **_constants(facts),
        **_bias_constants(facts),
        "FRAMES": padded,
        "ROWS": config.rows,
        "SEQUENCES": config.sequences,
        "PERSISTENT": keep,
        "EVEN": frames == padded,
        "num_warps": config.warps,
    }
    sizes = (sequences, space, heads, frames)
    return Launch(tile_kernel, programs, (*_strides(facts), *sizes, *_numbers(facts)), constants)


def stream_launch(facts: Facts, config: StreamConfig) -> Launch:
    """The stream kernel with a configuration, which need not be the one in the table."""
    _, space, frames, heads, _ = five(facts.shape)
    constants = {**_constants(facts), **_bias_constants(facts), **_stream_constants(facts, config)}
    numbers = (*_numbers(facts), _window(facts))
    arguments = (*_strides(facts), space, heads, frames, *numbers)
    return Launch(stream_kernel, _stream_programs(facts, config), arguments, constants)


def map_max_launch(facts: Facts, config: StreamConfig) -> Launch:
    """The maxima that a stream kernel of the same configuration needs with "map_max"."""
    _, space, frames, heads, _ = five(facts.shape)
    constants = {**_constants(facts), **_stream_constants(facts, config)}
    arguments = (*_strides(facts)[:2], space, heads, frames)
    return Launch(map_max_kernel, _stream_programs(facts, config), arguments, constants)


def _stream_programs(facts: Facts, config: StreamConfig) -> int:
    batch, space, frames, heads, _ = five(facts.shape)
    return batch * space * heads * -(-frames // config.rows)


def _constants(facts: Facts) -> dict[str, Any]:
    main, rest = configs.split(facts.shape[-1])
    return {
        "HEAD_DIM": facts.shape[-1],
        "MAIN": main,
        "REST": rest,
        "UNIT": _unit(facts),
        "OFFSET": tl.int64 if _largest_offset(facts) > INT32_MAX else tl.int32,
        "NEGATIVE": facts.scale < 0,
        "PRECISION": "tf32" if kind_of(facts.dtype, facts.ieee) == "tf32" else "ieee",
    }


def _bias_constants(facts: Facts) -> dict[str, Any]:
    return {
        "FORM": facts.form,
        "PER_HEAD": facts.values_strides[0] != 0,
        "STAT": facts.stat,
        "CLAMP": facts.clamp,
    }


def _stream_constants(facts: Facts, config: StreamConfig) -> dict[str, Any]:
    return {
        "ROWS": config.rows,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "EVEN": facts.shape[-3] % max(config.rows, config.keys) == 0,
        "num_warps": config.warps,
    }


def _numbers(facts: Facts) -> tuple[float, float, float]:
    """scale, strength and rate, as the kernels take them."""
    # A scale of zero makes all logits zero; so does a negligible one, by which they can be divided.
    scale = max(abs(facts.scale) * LOG2E, 1e-30)
    # Likewise σ = 0 and one that leaves nothing of Δ beside the diagonal.
    rate = math.sqrt(LOG2E / 2) / max(facts.sigma, 1e-6)
    return scale, float(facts.strength), rate


def _window(facts: Facts) -> int:
    """The distance in frames beyond which strength · Δ is negligible."""
    frames = facts.shape[-3]
    if facts.form != "gaussian":
        return frames
    reach = math.sqrt(2 * math.log(max(abs(facts.strength), 1.0) / NEGLIGIBLE))
    return math.ceil(min(facts.sigma * reach, frames))


def _strides(facts: Facts) -> tuple[Strides, ...]:
    unit = _unit(facts)
    strides = [tuple(s // unit for s in _four(x, facts.shape)) for x in facts.strides]
    return (*strides, facts.values_strides, _four(facts.stat_strides, facts.shape))


def _unit(facts: Facts) -> int:
    """The largest number of elements, of those in one vector, that divides every stride."""
    longest = VECTOR_BYTES // facts.dtype.itemsize
    return math.gcd(longest, *(s for x in facts.strides for s in _four(x, facts.shape)))


def _largest_offset(facts: Facts) -> int:
    """In elements, of the last row of the tensor that reaches furthest, and a head beyond."""
    sizes = five(facts.shape)
    reaches = (
        sum((size - 1) * stride for size, stride in zip(sizes, _four(x, facts.shape), strict=False))
        for x in (*facts.strides, facts.stat_strides)
    )
    return max(reaches) + sizes[-1]


def _four(strides: Strides, shape: tuple[int, ...]) -> Strides:
    """Strides of (batch, space, frames, heads); 0 where the size is 1 and any stride would do."""
    if not strides:
        return (0, 0, 0, 0)
    strides = strides if len(shape) == 5 else (strides[0], 0, *strides[1:])
    pairs = zip(strides, five(shape), strict=False)
    return tuple(stride if size > 1 else 0 for stride, size in pairs)[:4]


def five(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with its space, which is 1 in the 4-D layout."""
    return shape if len(shape) == 5 else (shape[0], 1, *shape[1:])
