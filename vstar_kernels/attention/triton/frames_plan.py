"""What the launches of :mod:`frames_forward` and :mod:`frames_backward` are planned from.

A :class:`FramesKey` is all that a call's plan depends on, the layout's runs and the rule's tables
by their contents, so that the next call with the same finds its plan. From it come the rule's
tables as kernels read them, and with :mod:`frames_slots` what each tile of rows sees.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.triton import configs, devices, launches, plan
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.attention.triton.devices import Contents, Device
from vstar_kernels.attention.triton.frames_slots import TEXT, RuleTables, TileTables, interleaved
from vstar_kernels.attention.triton.plan import Head, Strides

if TYPE_CHECKING:
    from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameOptions

SMALLEST_SCALE = 1e-25  # negligible; statistics and biases divided by it are in range
LARGEST_OFFSET = 1e38  # over the scale; sums of two are finite
# Of a weight of the statistic, as the statistic's share of it: below what its type resolves.
NEGLIGIBLE = {torch.float32: 2.0**-26, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}


class Rule(NamedTuple):
    """The constants of a call: which of the tables there are, and how keys are found."""

    STAT: str
    CLAMP: bool
    DELTA: bool
    OFFSET: bool
    FACTOR: bool
    SPAN: bool
    BAND: bool
    LENGTHS: bool
    ORDERED: bool  # rows and keys are found through row_order and key_order


class Tables(NamedTuple):
    """The layout and the rule of a call by their contents, as ``FrameCall`` names them."""

    query_runs: Contents
    key_runs: Contents
    delta: Contents | None = None
    offset: Contents | None = None
    factor: Contents | None = None
    factor_span: Contents | None = None
    band: Contents | None = None


class FramesKey(NamedTuple):
    """All that the plan of a call depends on, by which it is found again."""

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    batch: int
    tokens: int
    keys: int
    heads: int
    key_heads: int
    head_dim: int
    frames: int
    key_frames: int
    options: FrameOptions
    tables: Tables
    lengths: bool
    query: Strides  # of (batch, tokens, heads), in elements, like all that follow
    key: Strides
    value: Strides
    out: Strides
    stat: Strides = ()
    save: bool = False  # for the backward pass
    # Backward only:
    grad_out: Strides = ()
    grad_query: Strides = ()
    grad_key: Strides = ()
    grad_value: Strides = ()
    grad_map: bool = False

    @property
    def kind(self) -> str:
        """How products are computed, one of ``configs.KINDS``."""
        return plan.product_kind(self.dtype, ieee=self.ieee)

    @property
    def has_map(self) -> bool:
        """Whether the map is wanted."""
        return self.options.mean_map != "none"

    @property
    def scale(self) -> float:
        """The scale's size, by which it is possible to divide."""
        return max(abs(self.options.scale), SMALLEST_SCALE)

    def statistic(self, rule: RuleTables) -> str:
        """Returns the statistic that is needed."""
        return self.options.stat if rule.delta is not None else "none"

    def sums_by_frame(self, rule: RuleTables) -> bool:
        """Tells whether the forward pass sums up each key frame for itself."""
        return self.has_map or self.statistic(rule) == "frame_max"

    @property
    def ordered(self) -> bool:
        """Whether kernels go through the tokens frame by frame."""
        return any(interleaved(x.tensor().tolist()) for x in self.tables[:2])

    def config(self, table: str) -> FramesConfig:
        """Returns the configuration from a table."""
        return configs.frames(self.device.architecture, self.kind, self.head_dim, table)

    def table(self, kernel: str, rule: RuleTables) -> str:
        """Returns the table for "forward", "revisit", "grad_query" or "grad_key".

        Of forward passes, what gathers no statistic and no map, "known", leaves the most registers;
        of all kernels, what has no factors, bands and orders of tokens, which "…_full" are for, and
        of those no statistic that is given.
        """
        plain = rule.factor is None and rule.band is None and not self.ordered
        statistic = self.statistic(rule)
        if kernel.startswith("grad"):
            plain = plain and not self.grad_map
        elif kernel == "forward" and statistic in ("none", "tensor") and not self.has_map:
            kernel, plain = "known", plain and statistic == "none"
        return kernel if plain else f"{kernel}_full"

    def rule_tables(self) -> RuleTables:
        """Returns the rule's tables."""
        sizes = {"frames": self.frames, "key_frames": self.key_frames}
        every = not self.lengths and self.tables.band is None
        same = self.options.stat == "none"
        return rule_tables(
            self.tables, **sizes, dtype=self.dtype, scale=self.scale, every=every, same=same
        )

    def head(self) -> Head:
        """Returns the constants of the heads, and of how tensors of them are read."""
        import triton.language as tl

        main, rest = self._parts()
        offset = tl.int64 if self._largest_offset() > plan.INT32_MAX else tl.int32
        return Head(
            HEAD_DIM=self.head_dim,
            MAIN=main,
            REST=rest,
            UNIT=self._unit(),
            OFFSET=offset,
            EVEN=False,
            NEGATIVE=self.options.scale < 0,
            PRECISION="tf32" if self.kind == "tf32" else "ieee",
            FRAME_OFFSET=offset,
        )

    def _parts(self) -> tuple[int, int]:
        """Returns a head's two parts, which NVIDIA's gradients split differently in two cases.

        In TF32 a rest of 16 is filled up with zeros: so narrow a part has too few columns for the
        warps of a block, which then compute the same. A head of 48 took more than twice the
        instructions and registers of one of 64. In IEEE float32 there are no matrix instructions:
        a thread would hold rows of 256 in registers from one block of keys to the next, and has too
        few. Rows of halves are read again for each block.
        """
        main, rest = configs.split(self.head_dim)
        if not (self.grad_out and self.device.is_nvidia):
            return main, rest
        if self.kind == "tf32" and rest == 16:
            return (64, 0) if main == 32 else (main, 32)
        if self.kind == "ieee" and main == 256:
            return 128, 128
        return main, rest

    def in_units(self, strides: Strides) -> Strides:
        """Returns strides in units, as kernels take them."""
        unit = self._unit()
        return tuple(stride // unit for stride in strides)

    def _unit(self) -> int:
        """Returns the largest number of a vector's elements that divides every stride."""
        longest = launches.VECTOR_BYTES // self.dtype.itemsize
        of_rows = (*self.query, *self.out, *self.grad_out, *self.grad_query)
        return math.gcd(longest, *of_rows, *self.key, *self.value, *self.grad_key, *self.grad_value)

    def _largest_offset(self) -> int:
        """Returns the offset of the last head of the tensor that reaches furthest, and beyond."""
        of_rows = (self.query, self.out, self.stat, self.grad_out, self.grad_query)
        of_keys = (self.key, self.value, self.grad_key, self.grad_value)
        reaches = [
            sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
            for sizes, tensors in (
                ((self.batch, self.tokens, self.heads), of_rows),
                ((self.batch, self.keys, self.key_heads), of_keys),
            )
            for strides in tensors
        ]
        return max(reaches) + self.head_dim


def frames_key(call: FrameCall, out: Tensor, *, save: bool = False) -> FramesKey:
    """Returns the key of a forward pass."""
    return FramesKey(
        device=devices.device_of(call.device),
        dtype=call.dtype,
        ieee=plan.ieee_products(call.dtype),
        batch=call.batch,
        tokens=call.tokens,
        keys=call.keys,
        heads=call.heads,
        key_heads=call.key_heads,
        head_dim=call.head_dim,
        frames=call.frames,
        key_frames=call.key_frames,
        options=call.options,
        tables=Tables._make(Contents.of(getattr(call, name)) for name in Tables._fields),
        lengths=call.key_lengths is not None,
        query=plan.strides_3d(call.query),
        key=plan.strides_3d(call.key),
        value=plan.strides_3d(call.value),
        out=plan.strides_3d(out),
        stat=() if call.stat is None else plan.strides_3d(call.stat),
        save=save,
    )


def backward_key(
    call: FrameCall,
    out: Tensor,
    grad_out: Tensor,
    grad_map: Tensor | None,
    gradients: FrameGradients,
) -> FramesKey:
    """Returns the key of a backward pass, which fills these ``gradients``."""
    return frames_key(call, out)._replace(
        grad_out=plan.strides_3d(grad_out),
        grad_query=plan.strides_3d(gradients.query),
        grad_key=plan.strides_3d(gradients.key),
        grad_value=plan.strides_3d(gradients.value),
        grad_map=grad_map is not None,
    )


def saved(stat: str) -> tuple[str, ...]:
    """Returns the names of what the forward pass saves of each row."""
    return {
        "row_max": ("lse", "row_stat"),
        "frame_max": ("lse", "row_stat", "stat_frame", "stat_lse"),
    }.get(stat, ("lse",))


def frame_weights(key: FramesKey) -> Tensor:
    """Returns the weight in the map of a row of each query frame, ``(frames,)``."""
    tokens = torch.zeros(key.frames, dtype=torch.float32, device="cpu")
    for start, end, frame, _ in key.tables.query_runs.tensor().tolist():
        if frame != TEXT:
            tokens[frame] += end - start
    return 1 / (tokens * (1 if key.options.mean_map == "heads" else key.heads))


def constants(key: FramesKey, rule: RuleTables, made: TileTables) -> Rule:
    """Returns the constants of a call's kernels."""
    return Rule(
        STAT=key.statistic(rule),
        CLAMP=key.options.clamp_negative,
        DELTA=rule.delta is not None,
        OFFSET=rule.offset is not None,
        FACTOR=rule.factor is not None,
        SPAN=rule.span is not None,
        BAND=rule.band is not None,
        LENGTHS=key.lengths,
        ORDERED=made.row_order is not None,
    )


def named_tables(rule: RuleTables, made: TileTables) -> dict[str, Tensor]:
    """Returns the tables that kernels read, by their names there."""
    places = rule.band is not None or rule.span is not None
    found = {
        "delta": rule.delta,
        "offset": rule.offset,
        "factor": rule.factor,
        "span": rule.span,
        "band": rule.band,
        "row_frame": made.row_frame,
        "row_place": made.row_place if places else None,
        "row_order": made.row_order,
        "key_order": made.key_order,
        "tiles": made.tiles,
        "slots": made.slots,
        "ranges": made.ranges,
    }
    return {name: x for name, x in found.items() if x is not None}


def rule_tables(
    tables: Tables,
    *,
    frames: int,
    key_frames: int,
    dtype: torch.dtype,
    scale: float,
    every: bool,
    same: bool,
) -> RuleTables:
    """Returns the tables of a rule; what is neutral everywhere is left out.

    ``same`` says that all rows have the statistic 1, so that Δ is but another offset.
    ``every`` says that rows see all frames that they are not masked from. Then, and without text,
    which has no bias, biases are less the largest of their row. That changes no softmax; next to a
    bias of 10⁹ in all keys of a row float32 would lose their logits.
    """
    delta, offset, factor, span, band = (x and x.tensor() for x in tables[2:])
    if delta is not None and same:
        offset = delta if offset is None else offset.double() + delta
        delta = None
    if delta is not None:
        delta = torch.where(delta.abs() < NEGLIGIBLE[dtype], 0.0, delta)
        delta = delta if delta.any() else None
    if offset is not None:
        masked = offset == -math.inf
        offset = offset.double()
        if every and TEXT not in tables.key_runs.tensor()[:, 2]:
            offset = offset - offset.amax(-1, keepdim=True)
        offset = (offset / scale).clamp(-LARGEST_OFFSET, LARGEST_OFFSET).float()
        offset = offset.masked_fill(masked, -math.inf) if offset.any() else None
    if factor is not None and (factor == 1).all():
        factor = None
    span = None if factor is None else span
    sizes = {x.shape[-3] for x in (delta, offset) if x is not None and x.ndim == 3}
    sizes |= {factor.shape[1]} if factor is not None and factor.ndim == 4 else set()
    if sizes:  # then all are by head
        (heads,) = sizes
        shape = (heads, frames, key_frames)
        delta = delta if delta is None else delta.expand(shape).contiguous()
        offset = offset if offset is None else offset.expand(shape).contiguous()
        if factor is not None:
            factor = factor.unsqueeze(1) if factor.ndim == 3 else factor
            factor = factor.expand(2, *shape).contiguous()
    return RuleTables(frames, key_frames, bool(sizes), delta, offset, factor, span, band)
