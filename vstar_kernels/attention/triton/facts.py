"""What a launch depends on besides the data, and the kernels' arguments made of it."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton.language as tl

from vstar_kernels.attention.triton import configs

LOG2E = math.log2(math.e)
NEGLIGIBLE = 2.0**-26  # of a statistic, in units of itself: below float32's resolution
VECTOR_BYTES = 16  # the widest load of one thread
INT32_MAX = 2**31 - 1

Strides = tuple[int, ...]


class Device(NamedTuple):
    """What matters of a GPU: ``shared`` bytes of memory for one program, ``processors``."""

    architecture: str
    shared: int
    processors: int


class Facts(NamedTuple):
    """All that a plan depends on; hashable, so that plans can be found again by it."""

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    shape: tuple[int, ...]
    strides: tuple[Strides, ...]  # of query, key, value, output; then grad_out and gradients
    scale: float
    strength: float
    form: str  # "none", "gaussian", "symmetric", "signed" or "dense"
    sigma: float
    values_strides: Strides  # see regularization()
    per_head: bool
    stat: str
    stat_strides: Strides
    clamp: bool
    map_block: int = 0  # of the mean map or its gradient; 0 where there is none
    # Of a backward pass:
    detach: bool = False
    grad_values: bool = False
    grad_stat_strides: Strides = ()


# The tensors whose strides are in ``Facts.strides``, as the kernels name them.
STRIDED = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


def five(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with its space, which is 1 in the 4-D layout."""
    return shape if len(shape) == 5 else (shape[0], 1, *shape[1:])


def sequences(facts: Facts) -> int:
    """How many sequences there are: batch · space · heads."""
    batch, space, _, heads, _ = five(facts.shape)
    return batch * space * heads


def kind(facts: Facts) -> str:
    """How products are computed, one of ``configs.KINDS``."""
    if facts.dtype != torch.float32:
        return "16-bit"
    return "ieee" if facts.ieee else "tf32"


def constants(facts: Facts) -> dict[str, Any]:
    """What is compiled into every kernel of a call, by the parameters' names."""
    main, rest = configs.split(facts.shape[-1])
    return {
        "HEAD_DIM": facts.shape[-1],
        "MAIN": main,
        "REST": rest,
        "UNIT": _unit(facts),
        "OFFSET": tl.int64 if _largest_offset(facts) > INT32_MAX else tl.int32,
        "NEGATIVE": facts.scale < 0,
        "PRECISION": "tf32" if kind(facts) == "tf32" else "ieee",
        "FORM": facts.form,
        "PER_HEAD": facts.per_head,
        "STAT": facts.stat,
        "CLAMP": facts.clamp,
        "DETACH": facts.detach,
        "GRAD_VALUES": facts.grad_values,
        "GRAD_MAP": facts.map_block > 0,
    }


def arguments(facts: Facts) -> dict[str, Any]:
    """What the kernels take besides tensors, by the parameters' names."""
    _, space, frames, heads, _ = five(facts.shape)
    unit = _unit(facts)
    strides = {
        f"{name}_strides": tuple(stride // unit for stride in _four(tensor_strides, facts.shape))
        for name, tensor_strides in zip_longest(STRIDED, facts.strides, fillvalue=())
    }
    # A scale of zero makes all logits zero; so does a negligible one, by which they can be divided.
    scale = max(abs(facts.scale), 1e-30)
    blocks = -(-frames // max(facts.map_block, 1))
    return {
        **strides,
        "values_strides": facts.values_strides,
        "stat_strides": _four(facts.stat_strides, facts.shape),
        "grad_stat_strides": _four(facts.grad_stat_strides, facts.shape),
        "map_strides": (blocks * blocks, blocks, 1),
        "sequences": sequences(facts),
        "space": space,
        "heads": heads,
        "frames": frames,
        "map_block": max(facts.map_block, 1),
        "scale": scale * LOG2E,
        "signed_scale": math.copysign(scale, facts.scale),
        "strength": float(facts.strength),
        # Likewise σ = 0 and one that leaves nothing of Δ beside the diagonal.
        "rate": math.sqrt(LOG2E / 2) / max(facts.sigma, 1e-6),
        "window": _window(facts),
        "share": 1.0 / (space * heads),
    }


def _window(facts: Facts) -> int:
    """The distance in frames beyond which strength · Δ is negligible."""
    frames = facts.shape[-3]
    if facts.form != "gaussian":
        return frames
    reach = math.sqrt(2 * math.log(max(abs(facts.strength), 1.0) / NEGLIGIBLE))
    return math.ceil(min(facts.sigma * reach, frames))


def _unit(facts: Facts) -> int:
    """The largest number of elements, of those in one vector, that divides every stride."""
    longest = VECTOR_BYTES // facts.dtype.itemsize
    return math.gcd(longest, *(s for x in facts.strides for s in _four(x, facts.shape)))


def _largest_offset(facts: Facts) -> int:
    """In elements, of the last row of the tensor that reaches furthest, and a head beyond."""
    sizes = five(facts.shape)
    reaches = (
        sum((size - 1) * stride for size, stride in zip(sizes, _four(x, facts.shape), strict=False))
        for x in (*facts.strides, facts.stat_strides, facts.grad_stat_strides)
    )
    return max(reaches) + sizes[-1]


def _four(strides: Strides, shape: tuple[int, ...]) -> Strides:
    """Strides of (batch, space, frames, heads); 0 where the size is 1 and any stride would do."""
    if not strides:
        return (0, 0, 0, 0)
    strides = strides if len(shape) == 5 else (strides[0], 0, *strides[1:])
    pairs = zip(strides, five(shape), strict=False)
    return tuple(stride if size > 1 else 0 for stride, size in pairs)[:4]
