"""The gradients of up to 128 frames: as in :mod:`tile`, the whole map stays on chip.

Everything is computed anew from the inputs; nothing but them is read. The floor is 7 tensors of
B·S·N·H·D elements over the memory's bandwidth, four read and three written: the row statistics that
a forward pass could save would add to that traffic, and spare only operations for which the memory
leaves time. The formulas are those of ``attention/reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Call, Gradients
from vstar_kernels.attention.triton import configs, plan
from vstar_kernels.attention.triton.configs import TileConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.plan import PlanKey, Strides
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    Sizes,
    delta_block,
    exponentials,
    inner_products,
    larger,
    load_frames,
    locate,
    logits,
    map_gradient,
    nan_or,
    regularized,
    sequences_of_range,
    statistic_offsets,
    store_frames,
    store_sum,
    times,
    transposed,
    weighted_sums,
)

# Frames, and those by the head's width, up to which the sum of dΔ fits the registers beside a tile.
LARGEST_DELTA_TILE = 32
LARGEST_DELTA_TILE_ELEMENTS = 32 * 128


class Tensors(NamedTuple):
    """What the kernel reads and writes, and of each whether it does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like all up to grad_v
    k: Any
    v: Any
    grad_out: Any
    grad_q: Any
    grad_k: Any
    grad_v: Any
    delta: Any  # Δ's table or matrix
    stat: Any  # (batch, [space,] frames, heads)
    grad_stat: Any  # likewise
    grad_map: Any  # (batch, [heads,] blocks, blocks)
    delta_sums: Any  # (matrices, chunks, FRAMES, FRAMES)


class TensorStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them."""

    q: Strides
    k: Strides
    v: Strides
    grad_out: Strides
    grad_q: Strides
    grad_k: Strides
    grad_v: Strides
    delta: Strides
    stat: Strides
    grad_stat: Strides
    grad_map: Strides


@triton.jit(
    do_not_specialize=["length", "step", "chunks", "heads", "frames", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def tile_backward_kernel(
    t, strides, length, step, chunks, space, heads, frames, map_block, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr, DETACH: tl.constexpr,
    FRAMES: tl.constexpr, SEQUENCES: tl.constexpr, STAGES: tl.constexpr,
    GRAD_DELTA: tl.constexpr, GRAD_MAP: tl.constexpr,
):  # fmt: skip
    """``SEQUENCES`` sequences at a time, each padded to ``FRAMES``, shared out as in :mod:`tile`.

    With ``GRAD_DELTA`` there is one at a time, and each program leaves the sum of its sequences'
    dΔ in ``delta_sums``.
    """
    i_head, i_begin, i_end = sequences_of_range(tl.program_id(0) // chunks, length, step)
    b_delta = None
    if BIAS.FORM != "none":
        j = tl.arange(0, FRAMES)
        b_delta = delta_block(
            t.delta, strides.delta, i_head, j, j, frames, numbers.falloff, HEAD, BIAS
        )
    if GRAD_DELTA:
        b_sum = tl.zeros((FRAMES, FRAMES), tl.float32)
    tiles = tl.cdiv(length // step, SEQUENCES)
    for i_tile in tl.range(tl.program_id(0) % chunks, tiles, chunks, num_stages=STAGES):
        b_d_delta = gradients(
            i_begin + i_tile * SEQUENCES * step, i_end, step, b_delta,
            t, strides, Sizes(space, heads, frames), map_block, numbers,
            HEAD, BIAS, STAT, DETACH, FRAMES, SEQUENCES, GRAD_MAP,
        )  # fmt: skip
        if GRAD_DELTA:
            b_sum += b_d_delta
    if GRAD_DELTA:
        store_sum(t.delta_sums, b_sum, FRAMES)


@triton.jit
def gradients(
    i_first, i_end, step, b_delta, t, strides, sizes, map_block, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr, DETACH: tl.constexpr,
    FRAMES: tl.constexpr, SEQUENCES: tl.constexpr, GRAD_MAP: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of every ``step``-th sequence from ``i_first`` on, and returns their dΔ.

    There are ``SEQUENCES`` of them, but none from ``i_end`` on. ``b_delta`` is Δ,
    ``(FRAMES, FRAMES)``. All blocks have a dimension for the sequences first if there are several.
    """
    i_sequence = i_first
    if SEQUENCES > 1:
        i_sequence = i_first + tl.arange(0, SEQUENCES) * step
        i_sequence = tl.expand_dims(i_sequence, 1)  # (SEQUENCES, 1)
    place = locate(i_sequence, sizes)
    i = tl.arange(0, FRAMES)
    j = tl.arange(0, FRAMES)
    m_i = (i_sequence < i_end) & (i < sizes.frames)  # (FRAMES,) or (SEQUENCES, FRAMES)
    b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (FRAMES, D)
    b_k = load_frames(t.k, strides.k, place, i, m_i, HEAD)  # (FRAMES, D)
    b_s = logits(b_q, b_k, j, sizes.frames, HEAD)  # (FRAMES, FRAMES)

    # The statistic, and where the logit is that it comes from.
    b_stat = tl.full((1,), 1.0, tl.float32) * (LOG2E / numbers.exp2_scale)  # (1,)
    if STAT == "row_max" or STAT == "map_max":
        b_stat, b_argmax = tl.max(b_s, -1, return_indices=True)  # (FRAMES,)
        m_maximum = j == tl.expand_dims(b_argmax, -1)  # (FRAMES, FRAMES)
        if STAT == "map_max":
            b_max = tl.where(i < sizes.frames, nan_or(b_stat, b_s, False), float("-inf"))
            b_stat, i_max = tl.max(b_max, -1, return_indices=True, keep_dims=True)  # (1,)
            b_stat = nan_or(b_stat, b_max, True)
            m_maximum = m_maximum & tl.expand_dims(i == i_max, -1)
    elif STAT == "tensor":
        o_stat = statistic_offsets(strides.stat, place, i, HEAD)
        b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * (LOG2E / numbers.exp2_scale)
    if BIAS.FORM != "none":
        b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)
    b_p = exponentials(b_s, tl.max(b_s, -1), numbers.exp2_scale)  # (FRAMES, FRAMES)
    b_p = b_p * tl.expand_dims(1.0 / tl.sum(b_p, -1), -1)
    if not HEAD.EVEN:  # what is padded has NaN where a key is infinite
        b_p = tl.where(tl.expand_dims(i < sizes.frames, -1), b_p, 0.0)

    b_do = load_frames(t.grad_out, strides.grad_out, place, i, m_i, HEAD)  # (FRAMES, D)
    b_v = load_frames(t.v, strides.v, place, i, m_i, HEAD)  # (FRAMES, D)
    b_dp = inner_products(b_do, b_v, HEAD)  # (FRAMES, FRAMES)
    if GRAD_MAP:
        i_batch = tl.expand_dims(place.batch, -1) if SEQUENCES > 1 else place.batch
        i_head = tl.expand_dims(place.head, -1) if SEQUENCES > 1 else place.head
        b_dp += numbers.map_weight * map_gradient(
            t.grad_map, strides.grad_map, i_batch, i_head, i, j, m_i, sizes.frames, map_block
        )
    b_dv = weighted_sums(transposed(b_p.to(b_q[0].dtype)), b_do, HEAD)  # (FRAMES, D)
    store_frames(t.grad_v, strides.grad_v, place, i, m_i, b_dv, HEAD)

    b_ds = b_p * (b_dp - tl.expand_dims(tl.sum(b_p * b_dp, -1), -1))  # (FRAMES, FRAMES)
    b_d_delta = b_ds
    if BIAS.FORM != "none":
        if STAT != "none" and not DETACH:
            b_d_stat = numbers.strength * tl.sum(b_ds * b_delta, -1)  # (FRAMES,)
            if STAT == "map_max":
                b_d_stat = tl.sum(b_d_stat, -1, keep_dims=True)  # (1,)
            if BIAS.CLAMP:
                b_d_stat = tl.where(b_stat >= 0.0, b_d_stat, 0.0)
            if STAT == "tensor":
                o_d_stat = statistic_offsets(strides.grad_stat, place, i, HEAD)
                tl.store(t.grad_stat + o_d_stat, b_d_stat, mask=m_i)
            else:
                b_ds += tl.where(m_maximum, tl.expand_dims(b_d_stat, -1), 0.0)
        if BIAS.CLAMP:
            b_stat = larger(b_stat, 0.0)
        factor = numbers.strength * numbers.exp2_scale / LOG2E
        b_d_delta *= tl.expand_dims(b_stat * factor, -1)

    b_ds_rounded = b_ds.to(b_q[0].dtype)
    b_dq = times(weighted_sums(b_ds_rounded, b_k, HEAD), numbers.scale)  # (FRAMES, D)
    store_frames(t.grad_q, strides.grad_q, place, i, m_i, b_dq, HEAD)

    b_dk = times(weighted_sums(transposed(b_ds_rounded), b_q, HEAD), numbers.scale)  # (FRAMES, D)
    store_frames(t.grad_k, strides.grad_k, place, i, m_i, b_dk, HEAD)
    return b_d_delta


@dataclass(frozen=True)
class TileBackwardPlan:
    """One launch; where Δ's gradient is wanted, it leaves sums of the shape ``delta_sums``."""

    launch: Launch
    delta_sums: tuple[int, ...] = ()

    def run(
        self,
        call: Call,
        out: Tensor,
        saved: tuple[Tensor, ...],  # by a stream; a tile saves nothing, nor needs it
        grad_out: Tensor,
        grad_map: Tensor | None,
        gradients: Gradients,
    ) -> Tensor | None:
        """Fills the gradients and returns dΔ, ``(matrices, frames, frames)``, if it is wanted."""
        sums = plan.new(out, *self.delta_sums) if self.delta_sums else None
        self.launch.on(
            q=call.query,
            k=call.key,
            v=call.value,
            grad_out=grad_out,
            grad_q=gradients.query,
            grad_k=gradients.key,
            grad_v=gradients.value,
            delta=call.delta,
            stat=call.stat,
            grad_stat=gradients.stat,
            grad_map=grad_map,
            delta_sums=sums,
        )
        return None if sums is None else sums.sum(1)[..., : call.frames, : call.frames]


def make_plan(key: PlanKey) -> TileBackwardPlan | None:
    """Returns the plan of a backward pass, or None where no tile holds it."""
    config = configs.tile_backward(key.device.architecture, key.kind, key.frames, key.head_dim)
    if config is None or config.shared > key.device.shared:
        return None
    return plan_tile(key, config)


def plan_tile(key: PlanKey, config: TileConfig) -> TileBackwardPlan | None:
    """Returns the plan with a configuration, which need not be the one in the table.

    None if it leaves the call to the stream kernels, or has no registers for the sum of dΔ.
    """
    if plan.left_by_tile(key, config):
        return None
    padded = configs.padded_frames(key.frames)
    if key.wants_delta:
        elements = padded * configs.width(key.head_dim)
        if padded > LARGEST_DELTA_TILE or elements > LARGEST_DELTA_TILE_ELEMENTS:
            return None
        config = replace(config, sequences=1)
    step = key.matrices  # of one Δ are the sequences of one head, or all of them
    chunks = config.chunks(key.device.processors, step, key.sequences // step)
    launch = Launch(
        tile_backward_kernel,
        step * chunks,
        Tensors(
            q=True,
            k=True,
            v=True,
            grad_out=True,
            grad_q=True,
            grad_k=True,
            grad_v=True,
            delta=key.reads_delta,
            stat=key.given_stat,
            grad_stat=key.given_stat and key.through_stat,
            grad_map=key.has_map,
            delta_sums=key.wants_delta,
        ),
        (
            TensorStrides(
                q=plan.row_strides(key, key.query),
                k=plan.row_strides(key, key.key),
                v=plan.row_strides(key, key.value),
                grad_out=plan.row_strides(key, key.grad_out),
                grad_q=plan.row_strides(key, key.grad_query),
                grad_k=plan.row_strides(key, key.grad_key),
                grad_v=plan.row_strides(key, key.grad_value),
                delta=plan.delta_strides(key),
                stat=plan.stat_strides(key, key.stat),
                grad_stat=plan.stat_strides(key, key.grad_stat),
                grad_map=plan.map_strides(key),
            ),
            key.sequences,
            step,
            chunks,
            key.space,
            key.heads,
            key.frames,
            max(key.options.map_block, 1),
            plan.numbers(key),
        ),
        {
            "HEAD": plan.head(key, block=padded),
            "BIAS": plan.bias(key),
            "STAT": key.options.stat,
            "DETACH": key.options.detach_stat,
            "FRAMES": padded,
            "SEQUENCES": config.sequences,
            "STAGES": config.stages,
            "GRAD_DELTA": key.wants_delta,
            "GRAD_MAP": key.has_map,
            "num_warps": config.warps,
        },
    )
    return TileBackwardPlan(launch, (step, chunks, padded, padded) if key.wants_delta else ())
