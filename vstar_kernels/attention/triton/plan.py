"""What every family's kernels are planned from, and what they are told."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.call import Call, Forward, Gradients, Options, Wanted
from vstar_kernels.attention.triton import configs, devices
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.devices import Device
from vstar_kernels.attention.triton.launches import VECTOR_BYTES

LOG2E = math.log2(math.e)
NEGLIGIBLE = 2.0**-26  # of a statistic, in units of itself: below float32's resolution
INT32_MAX = 2**31 - 1
Strides = tuple[int, ...]


class PlanKey(NamedTuple):
    """All that the plan of a call depends on, by which it is found again.

    Backward, ``options`` ask for no map where it has no gradient.
    """

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    shape: tuple[int, ...]  # of the query
    options: Options
    query: Strides
    key: Strides
    value: Strides
    out: Strides
    delta: Strides = ()
    delta_shape: tuple[int, ...] = ()
    stat: Strides = ()
    save: bool = False  # row statistics, for the backward pass
    # Backward only:
    grad_out: Strides = ()
    grad_query: Strides = ()
    grad_key: Strides = ()
    grad_value: Strides = ()
    grad_stat: Strides = ()
    wants_delta: bool = False
    saved: bool = False  # the forward pass saved row statistics

    @property
    def shape_5d(self) -> tuple[int, ...]:
        """The shape with a space, which is 1 in the 4-D layout."""
        return self.shape if len(self.shape) == 5 else (self.shape[0], 1, *self.shape[1:])

    @property
    def frames(self) -> int:
        """N, how many frames attend to each other."""
        return self.shape[-3]

    @property
    def heads(self) -> int:
        """H, how many heads there are."""
        return self.shape[-2]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.shape[-1]

    @property
    def space(self) -> int:
        """S, how many positions there are."""
        return self.shape_5d[1]

    @property
    def sequences(self) -> int:
        """How many sequences there are: batch · space · heads."""
        return math.prod(self.shape[:-3]) * self.heads

    @property
    def kind(self) -> str:
        """How products are computed, one of ``configs.KINDS``."""
        return product_kind(self.dtype, ieee=self.ieee)

    @property
    def has_bias(self) -> bool:
        """Whether anything is added to the logits."""
        return self.options.form != "none"

    @property
    def reads_delta(self) -> bool:
        """Whether Δ is read from a table or matrix."""
        return self.options.form not in ("none", "gaussian")

    @property
    def per_head(self) -> bool:
        """Whether every head has its own Δ."""
        return len(self.delta_shape) == (3 if self.options.form == "dense" else 2)

    @property
    def matrices(self) -> int:
        """How many different Δ there are: one, or one for each head."""
        return self.heads if self.per_head else 1

    @property
    def has_map(self) -> bool:
        """Whether the mean map is wanted, or backward, has a gradient."""
        return self.options.map_block > 0

    @property
    def map_heads(self) -> int:
        """How many mean maps a batch element has: one, or one for each head."""
        return self.heads if self.options.map_heads else 1

    @property
    def map_sequences(self) -> int:
        """How many sequences a mean map is the mean of."""
        return self.space * self.heads // self.map_heads

    @property
    def given_stat(self) -> bool:
        """Whether the statistic is a tensor of the call."""
        return self.options.stat == "tensor"

    @property
    def through_stat(self) -> bool:
        """Whether logits or a given statistic have a gradient through Δ's factor."""
        return self.has_bias and self.options.stat != "none" and not self.options.detach_stat

    @property
    def through_maximum(self) -> bool:
        """Whether logits have a gradient through the maximum that is Δ's factor."""
        return self.through_stat and not self.given_stat


def ieee_products(dtype: torch.dtype) -> bool:
    """Returns whether products of a type are of float32, and PyTorch wants no TF32 for them.

    The name follows ``torch.set_float32_matmul_precision``, whose own getter raises once this one
    was set.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def prepared(
    key: Any, run: Callable[[Any], Forward], forward: Callable[[Any], Forward]
) -> Callable[[Any], Forward]:
    """Returns ``run``, which goes by a plan's key, as long as torch wants the key's products."""
    if key.dtype != torch.float32:
        return run
    return lambda call: (run if ieee_products(key.dtype) == key.ieee else forward)(call)


def product_kind(dtype: torch.dtype, *, ieee: bool) -> str:
    """Returns how products of a type are computed, one of ``configs.KINDS``."""
    if dtype != torch.float32:
        return "16-bit"
    return "ieee" if ieee else "tf32"


def forward_key(call: Call, out: Tensor, *, save: bool = False) -> PlanKey:
    """Returns the key of a forward pass."""
    query, delta, stat = call.query, call.delta, call.stat
    dtype = query.dtype
    return PlanKey(  # by place, which is faster
        devices.device_of(query.device),
        dtype,
        ieee_products(dtype),
        query.shape,
        call.options,
        query.stride(),
        call.key.stride(),
        call.value.stride(),
        out.stride(),
        () if delta is None else delta.stride(),
        () if delta is None else delta.shape,
        () if stat is None else stat.stride(),
        save,
    )


def backward_key(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor,
    grad_map: Tensor | None,
    gradients: Gradients,
    wanted: Wanted,
) -> PlanKey:
    """Returns the key of a backward pass, which fills these ``gradients``."""
    options = call.options
    return forward_key(call, out)._replace(
        options=options if grad_map is not None else options._replace(map_block=0, map_heads=False),
        grad_out=grad_out.stride(),
        grad_query=gradients.query.stride(),
        grad_key=gradients.key.stride(),
        grad_value=gradients.value.stride(),
        grad_stat=() if gradients.stat is None else gradients.stat.stride(),
        wants_delta=wanted.delta,
        saved=bool(saved),
    )


class Head(NamedTuple):
    """The constants of every kernel: a head's size, and how tensors of them are read."""

    HEAD_DIM: int
    MAIN: int
    REST: int  # 0: there is none
    UNIT: int
    OFFSET: Any  # tl.int32, or tl.int64 where the tensors are large
    EVEN: bool  # the frames fill their blocks
    NEGATIVE: bool  # the scale is below zero
    PRECISION: str  # of float32 products
    FRAME_OFFSET: Any  # that of a frame from its sequence's first, likewise


class Bias(NamedTuple):
    """The constants of kernels that add strength · statᵢ · Δᵢⱼ to the logits."""

    FORM: str
    PER_HEAD: bool
    CLAMP: bool
    UNIT: int  # of a matrix's strides, in elements


class Numbers(NamedTuple):
    """What a call's options come to; none of it is compiled in."""

    exp2_scale: float  # |scale| · log₂e, which turns the product qᵀk into a logarithm to base 2
    scale: float
    strength: float
    falloff: float  # √(log₂e / 2) / σ, of a Gaussian Δ
    map_weight: float  # of one sequence's map in the mean map


def head(key: PlanKey, *, block: int, parts: tuple[int, int] | None = None) -> Head:
    """Returns the constants for frames in blocks of so many, and parts unlike the usual ones."""
    import triton.language as tl

    main, rest = parts or configs.split(key.head_dim)
    return Head(
        HEAD_DIM=key.head_dim,
        MAIN=main,
        REST=rest,
        UNIT=_unit(key),
        OFFSET=tl.int64 if is_wide(key) else tl.int32,
        EVEN=key.frames % block == 0,
        NEGATIVE=key.options.scale < 0,
        PRECISION="tf32" if key.kind == "tf32" else "ieee",
        FRAME_OFFSET=tl.int64 if _largest_frame_offset(key) > INT32_MAX else tl.int32,
    )


def is_wide(key: PlanKey) -> bool:
    """Returns whether a call takes offsets of 64 bits."""
    return _largest_offset(key) > INT32_MAX


def left_by_tile(key: PlanKey, config: TileConfig) -> bool:
    """Returns whether a tile leaves a call to the stream kernels.

    It leaves what it is unfit for, and what the gate of the compiled code tries of no tile: the
    map's maximum of tensors that take offsets of 64 bits, and frames that do within a sequence.
    """
    asked = {
        "map": key.has_map,
        "delta": key.reads_delta,
        "map_max": key.options.stat == "map_max",
        "wide": is_wide(key),
    }
    is_tried = not (asked["map_max"] and asked["wide"]) and _largest_frame_offset(key) <= INT32_MAX
    return not is_tried or any(asked[name] for name in config.unfit)


def halves(key: PlanKey) -> tuple[int, int] | None:
    """Returns a large head's parts for kernels of gradients and maps, or None for the usual ones.

    Without matrix instructions a thread multiplies whole rows of a part. Those of a whole head stay
    in registers from one block of the map to the next and leave too few; halves are read again.
    """
    main, rest = configs.split(key.head_dim)
    if key.device.is_nvidia and key.kind == "ieee" and main >= 128 and not rest:
        return main // 2, main // 2
    return None


def block_constants(
    key: PlanKey, config: StreamConfig, parts: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Returns the constants of kernels that go through the map by blocks."""
    return {
        "HEAD": head(key, block=max(config.queries, config.keys), parts=parts),
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def bias(key: PlanKey) -> Bias:
    """Returns the constants of Δ."""
    return Bias(key.options.form, key.per_head, key.options.clamp_negative, _delta_unit(key))


def numbers(key: PlanKey) -> Numbers:
    """Returns the numbers of a call."""
    # A scale of zero makes all logits zero; so does a negligible one, by which they can be divided.
    scale = max(abs(key.options.scale), 1e-30)
    return Numbers(
        exp2_scale=scale * LOG2E,
        scale=math.copysign(scale, key.options.scale),
        strength=float(key.options.strength),
        # A negligible σ likewise leaves as little of Δ beside the diagonal as σ = 0.
        falloff=math.sqrt(LOG2E / 2) / max(key.options.sigma, 1e-6),
        map_weight=1.0 / key.map_sequences,
    )


def row_strides(key: PlanKey, strides: Strides) -> Strides:
    """Returns strides of (batch, space, frames, heads) as kernels take them, in units."""
    return hidden(stride // _unit(key) for stride in strides_4d(strides, key))


def stat_strides(key: PlanKey, strides: Strides) -> Strides:
    """Returns a statistic's strides of (batch, space, frames, heads) as kernels take them."""
    return hidden(strides_4d(strides, key))


def delta_strides(key: PlanKey) -> Strides:
    """Returns Δ's strides as :func:`primitives.delta_block` takes them.

    They are those of heads and query frames, in units; a table has the place of its distance 0
    instead of the second. Key frames, and distances, lie side by side.
    """
    if not key.reads_delta:
        return hidden((0, 0))
    unit = _delta_unit(key)
    of_heads = key.delta[0] // unit if key.per_head else 0
    if key.options.form == "dense":
        return hidden((of_heads, key.delta[-2] // unit))
    return hidden((of_heads, key.delta_shape[-1] // 2 if key.options.form == "signed" else 0))


def map_strides(key: PlanKey) -> Strides:
    """Returns the mean map's strides of (batch, heads, query blocks) as kernels take them."""
    blocks = -(-key.frames // max(key.options.map_block, 1))
    size = blocks * blocks
    return hidden((key.map_heads * size, size if key.map_heads > 1 else 0, blocks))


def hidden(strides: Iterable[int]) -> Strides:
    """Returns strides as numbers that Triton compiles nothing for; primitives.stride shows them.

    Whatever a kernel asks for, Triton compiles it anew for tuples that have a 1 or a multiple of 16
    at other places, such as strides of other numbers of heads. No negative odd number is either.
    """
    return tuple(-1 - 2 * stride for stride in strides)


def window(key: PlanKey) -> int:
    """Returns the distance in frames beyond which strength · Δ is negligible."""
    if key.options.form != "gaussian":
        return key.frames
    reach = math.sqrt(2 * math.log(max(abs(key.options.strength), 1.0) / NEGLIGIBLE))
    return math.ceil(min(key.options.sigma * reach, key.frames))


@functools.lru_cache(maxsize=4)  # the launches of a plan ask for it once for each tensor
def _unit(key: PlanKey) -> int:
    """Returns the largest number of a vector's elements that divides every stride."""
    longest = VECTOR_BYTES // key.dtype.itemsize
    return math.gcd(longest, *(s for x in _tensors(key) for s in strides_4d(x, key)))


def _delta_unit(key: PlanKey) -> int:
    """Returns the largest number of a vector's elements that divides every stride of a matrix Δ."""
    if key.options.form != "dense":
        return 1
    return math.gcd(VECTOR_BYTES // torch.float32.itemsize, *key.delta[:-1])


@functools.lru_cache(maxsize=4)
def _largest_offset(key: PlanKey) -> int:
    """Returns the offset of the last element of the tensor that reaches furthest, and beyond."""
    reach = max(_reach(key.shape_5d[:4], x) for x in _every_strides_4d(key))
    return max(reach + key.head_dim, _reach(key.delta_shape, key.delta) + 1)


@functools.lru_cache(maxsize=4)
def _largest_frame_offset(key: PlanKey) -> int:
    """Returns :func:`_largest_offset`, but from where a sequence, or a matrix of Δ, begins."""
    reach = max(_reach((key.frames,), x[2:3]) for x in _every_strides_4d(key))
    own = slice(int(key.per_head), None)
    return max(reach + key.head_dim, _reach(key.delta_shape[own], key.delta[own]) + 1)


def _every_strides_4d(key: PlanKey) -> list[Strides]:
    """Returns strides of (batch, space, frames, heads), of all tensors that have these."""
    return [strides_4d(x, key) for x in (*_tensors(key), key.stat, key.grad_stat)]


def _reach(sizes: Iterable[int], strides: Strides) -> int:
    """Returns the offset of the element that lies last."""
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _tensors(key: PlanKey) -> tuple[Strides, ...]:
    """Returns the strides of all tensors of query's shape."""
    forward = (key.query, key.key, key.value, key.out)
    return (*forward, key.grad_out, key.grad_query, key.grad_key, key.grad_value)


def strides_4d(strides: Strides, key: PlanKey) -> Strides:
    """Returns strides of (batch, space, frames, heads); 0 for sizes of 1, where any would do."""
    if not strides:
        return (0, 0, 0, 0)
    if len(key.shape) == 4:
        strides = (strides[0], 0, *strides[1:])
    return tuple(
        stride if size > 1 else 0
        for stride, size in zip(strides[:4], key.shape_5d[:4], strict=True)
    )


def strides_3d(tensor: Tensor) -> Strides:
    """Returns strides of the first three dimensions; 0 for sizes of 1, where any would do."""
    sizes, strides = tensor.shape[:3], tensor.stride()[:3]
    if min(sizes) > 1:
        return strides
    return tuple(stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True))


def map_weight(call: Call) -> float:
    """Returns the weight of one sequence's map in the mean map."""
    maps = call.shape[0] * (call.heads if call.options.map_heads else 1)
    return maps * call.frames * call.head_dim / call.query.numel()


def row_shape(call: Call) -> tuple[int, int]:
    """Returns (sequences, frames), the shape of what is kept of each row of the maps."""
    return call.query.numel() // (call.frames * call.head_dim), call.frames


def new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor for a kernel to fill."""
    return torch.empty(shape, dtype=dtype, device=like.device)
