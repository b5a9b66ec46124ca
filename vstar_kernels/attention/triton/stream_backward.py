"""The gradients of more frames than :mod:`tile_backward` holds, in sweeps over the map.

- :func:`statistics_kernel`: what each row needs: its sum of exponentials and Δ's factor, unless the
  forward pass saved them, and rowsum(dP ∘ P).
- :func:`grad_query_kernel`: dQ, the gradient of Δ's factor, and the key that is the row's maximum,
  by blocks of queries.
- :func:`grad_key_kernel`: dK and dV, by blocks of keys.

Nothing is added up between programs. The formulas are those of ``attention/reference.py``. Products
of N×N×D: 0, 3 and 4 with what the forward pass saved, 12·B·S·H·N bytes, and 1, 3 and 4 without (and
again over the window of Δ, and all of it once more before that for "map_max"); the mean map's
gradient takes one more in the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Call, Gradients
from vstar_kernels.attention.triton import configs, maps, plan, stream
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.maps import MapSums
from vstar_kernels.attention.triton.plan import PlanKey, Strides
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    Normalizer,
    Sizes,
    add_weighted_sums,
    blocks_in_window,
    delta_block,
    exponentials,
    frame_offsets,
    inner_products,
    load_frames,
    load_heads,
    load_normalizer,
    locate,
    logits,
    map_gradient,
    normalized,
    regularized,
    sequence_offset,
    statistic_offsets,
    store_frames,
    store_normalizer,
    subtrahend,
    times,
    zero_heads,
)


class Tensors(NamedTuple):
    """What the three sweeps read and write, and of each whether a sweep does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like all up to grad_v
    k: Any
    v: Any
    out: Any
    grad_out: Any
    grad_q: Any
    grad_k: Any
    grad_v: Any
    delta: Any  # Δ's table or matrix
    stat: Any  # (batch, [space,] frames, heads), or of "map_max", (sequences,)
    grad_stat: Any  # (batch, [space,] frames, heads)
    grad_map: Any  # (batch, [heads,] blocks, blocks)
    normalizer: Any  # (sequences, frames, 2): each row's :class:`primitives.Normalizer`
    row_stat: Any  # (sequences, frames), like all below: Δ's factor, before it is clamped
    row_dot: Any  # rowsum(dP ∘ P)
    row_max: Any  # the row's largest logit without a bias
    argmax: Any  # the key frame whose logit that is
    d_row_stat: Any  # the gradient of row_stat, over |scale|


class TensorStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them; () of those not touched."""

    q: Strides
    k: Strides
    v: Strides
    out: Strides
    grad_out: Strides
    grad_q: Strides
    grad_k: Strides
    grad_v: Strides
    delta: Strides
    stat: Strides
    grad_stat: Strides
    grad_map: Strides


@triton.jit(
    do_not_specialize=["heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def statistics_kernel(
    t, strides, space, heads, frames, map_block, numbers, window,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, GRAD_MAP: tl.constexpr,
    SAVED: tl.constexpr,
):  # fmt: skip
    """What ``QUERIES`` rows need: ``row_dot``, and unless ``SAVED``, normalizer and Δ's factor."""
    sizes = Sizes(space, heads, frames)
    query_blocks = tl.cdiv(frames, QUERIES)
    i_sequence = tl.program_id(0) // query_blocks
    start = tl.program_id(0) % query_blocks * QUERIES
    place = locate(i_sequence, sizes)
    i = start + tl.arange(0, QUERIES)
    m_i = i < frames
    o_row = i_sequence.to(tl.int64) * frames + i
    if GRAD_MAP or not SAVED:
        b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (QUERIES, D)
        p_k = t.k + sequence_offset(strides.k, place, HEAD)

    if SAVED:
        normalizer = load_normalizer(t.normalizer, o_row, m_i)
        if BIAS.FORM != "none":
            b_stat = tl.load(t.row_stat + o_row, mask=m_i, other=0.0)  # (QUERIES,)
    else:
        b_row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
        b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
        b_total = tl.zeros((QUERIES,), tl.float32)
        near = 0
        far = 0
        if BIAS.FORM != "none":
            near, far = blocks_in_window(start, QUERIES, KEYS, window, frames)
        for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=STAGES):
            j = n * KEYS + tl.arange(0, KEYS)
            b_k = load_heads(p_k, frame_offsets(strides.k, j, HEAD), j < frames, HEAD)  # (KEYS, D)
            b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
            b_row_max = tl.maximum(b_row_max, tl.max(b_s, 1))
            if (n < near) | (n >= far):
                b_max, b_total = add_exponentials(b_max, b_total, b_s, numbers)
        if BIAS.FORM != "none":
            b_stat = b_row_max
            if STAT == "none":
                b_stat = tl.zeros((QUERIES,), tl.float32) + LOG2E / numbers.exp2_scale
            elif STAT == "tensor":
                o_stat = statistic_offsets(strides.stat, place, i, HEAD)
                b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0)
                b_stat = b_stat * (LOG2E / numbers.exp2_scale)
            elif STAT == "map_max":
                b_stat = tl.zeros((QUERIES,), tl.float32) + tl.load(t.stat + i_sequence)
            tl.store(t.row_stat + o_row, b_stat, mask=m_i)
            for n in tl.range(near, far, num_stages=STAGES):
                j = n * KEYS + tl.arange(0, KEYS)
                b_k = load_heads(p_k, frame_offsets(strides.k, j, HEAD), j < frames, HEAD)
                b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
                b_delta = delta_block(
                    t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS
                )
                b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)
                b_max, b_total = add_exponentials(b_max, b_total, b_s, numbers)
        store_normalizer(t.normalizer, o_row, m_i, b_max, b_total)
        normalizer = Normalizer(b_max, tl.log2(b_total))

    b_o = load_frames(t.out, strides.out, place, i, m_i, HEAD)  # (QUERIES, D)
    b_do = load_frames(t.grad_out, strides.grad_out, place, i, m_i, HEAD)
    b_dot = tl.sum(b_o[0].to(tl.float32) * b_do[0].to(tl.float32), 1)  # (QUERIES,)
    if HEAD.REST:
        b_dot += tl.sum(b_o[1].to(tl.float32) * b_do[1].to(tl.float32), 1)
    if GRAD_MAP:
        for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=STAGES):
            j = n * KEYS + tl.arange(0, KEYS)
            b_k = load_heads(p_k, frame_offsets(strides.k, j, HEAD), j < frames, HEAD)  # (KEYS, D)
            b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
            if BIAS.FORM != "none":
                b_delta = delta_block(
                    t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS
                )
                b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)
            b_p = normalized(b_s, normalizer, numbers.exp2_scale)  # (QUERIES, KEYS)
            b_map = map_gradient(
                t.grad_map, strides.grad_map, place.batch, place.head, i, j, m_i, frames, map_block
            )
            b_dot += numbers.map_weight * tl.sum(b_p * b_map, 1)
    tl.store(t.row_dot + o_row, b_dot, mask=m_i)


@triton.jit
def add_exponentials(b_max, b_total, b_s, numbers):
    """Returns row maxima and sums of exponentials, ``(QUERIES,)``, with logits added to them."""
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = subtrahend(b_new_max)
    b_total = b_total * tl.exp2((b_max - b_shift) * numbers.exp2_scale)
    return b_new_max, b_total + tl.sum(exponentials(b_s, b_shift, numbers.exp2_scale), 1)


@triton.jit(
    do_not_specialize=["heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def grad_query_kernel(
    t, strides, space, heads, frames, map_block, numbers, window,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr, DETACH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, GRAD_MAP: tl.constexpr,
):  # fmt: skip
    """dQ of ``QUERIES`` queries, and the gradient of Δ's factor in their rows.

    With ``STAT`` "row_max" what comes through the maximum is in dQ; with "map_max" it is left to
    the caller, who knows the whole map. Where the maximum is, ``argmax`` says.
    """
    sizes = Sizes(space, heads, frames)
    query_blocks = tl.cdiv(frames, QUERIES)
    i_sequence = tl.program_id(0) // query_blocks
    start = tl.program_id(0) % query_blocks * QUERIES
    place = locate(i_sequence, sizes)
    i = start + tl.arange(0, QUERIES)
    m_i = i < frames
    b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (QUERIES, D)
    b_do = load_frames(t.grad_out, strides.grad_out, place, i, m_i, HEAD)
    p_k = t.k + sequence_offset(strides.k, place, HEAD)
    p_v = t.v + sequence_offset(strides.v, place, HEAD)
    o_row = i_sequence.to(tl.int64) * frames + i
    normalizer = load_normalizer(t.normalizer, o_row, m_i)
    b_dot = tl.load(t.row_dot + o_row, mask=m_i, other=0.0)  # (QUERIES,)
    near = 0
    far = 0
    b_stat = b_dot
    if BIAS.FORM != "none":
        b_stat = tl.load(t.row_stat + o_row, mask=m_i, other=0.0)  # (QUERIES,)
        near, far = blocks_in_window(start, QUERIES, KEYS, window, frames)

    b_row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    b_argmax = tl.zeros((QUERIES,), tl.int32)
    b_d_stat = tl.zeros((QUERIES,), tl.float32)
    b_dq = zero_heads(QUERIES, HEAD)
    for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=STAGES):
        j = n * KEYS + tl.arange(0, KEYS)
        b_k = load_heads(p_k, frame_offsets(strides.k, j, HEAD), j < frames, HEAD)  # (KEYS, D)
        b_v = load_heads(p_v, frame_offsets(strides.v, j, HEAD), j < frames, HEAD)  # (KEYS, D)
        b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
        if BIAS.FORM != "none" and (STAT == "row_max" or STAT == "map_max") and not DETACH:
            # Two plain reductions take fewer registers than one that carries the index along.
            b_block_max = tl.max(b_s, 1)  # (QUERIES,)
            m_maximum = b_s == tl.expand_dims(b_block_max, 1)
            b_first = tl.min(tl.where(m_maximum, j, frames), 1)  # (QUERIES,)
            b_argmax = tl.where(b_block_max > b_row_max, b_first, b_argmax)
            b_row_max = tl.maximum(b_row_max, b_block_max)
        if BIAS.FORM != "none":
            if (n >= near) & (n < far):
                b_delta = delta_block(
                    t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS
                )
                b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)
        b_p = normalized(b_s, normalizer, numbers.exp2_scale)  # (QUERIES, KEYS)
        b_dp = inner_products(b_do, b_v, HEAD)  # (QUERIES, KEYS)
        if GRAD_MAP:
            b_dp += numbers.map_weight * map_gradient(
                t.grad_map, strides.grad_map, place.batch, place.head, i, j, m_i, frames, map_block
            )
        b_ds = b_p * (b_dp - tl.expand_dims(b_dot, 1))  # (QUERIES, KEYS)
        if BIAS.FORM != "none":
            if (n >= near) & (n < far):
                b_delta = delta_block(
                    t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS
                )
                b_d_stat += tl.sum(b_ds * b_delta, 1)
        b_dq = add_weighted_sums(b_dq, b_ds.to(b_k[0].dtype), b_k, HEAD)  # (QUERIES, D)

    if BIAS.FORM != "none" and STAT != "none" and not DETACH:
        b_d_stat *= numbers.strength
        if BIAS.CLAMP and STAT != "map_max":
            b_d_stat = tl.where(b_stat >= 0.0, b_d_stat, 0.0)
        if STAT == "tensor":
            o_d_stat = statistic_offsets(strides.grad_stat, place, i, HEAD)
            tl.store(t.grad_stat + o_d_stat, b_d_stat, mask=m_i)
        else:
            tl.store(t.d_row_stat + o_row, b_d_stat, mask=m_i)
            tl.store(t.argmax + o_row, b_argmax, mask=m_i)
        if STAT == "map_max":
            tl.store(t.row_max + o_row, b_row_max, mask=m_i)
        elif STAT == "row_max":
            b_k = load_heads(p_k, frame_offsets(strides.k, b_argmax, HEAD), m_i, HEAD)
            b_dq = add_times(b_dq, b_k, tl.expand_dims(b_d_stat, 1))
    store_frames(t.grad_q, strides.grad_q, place, i, m_i, times(b_dq, numbers.scale), HEAD)


@triton.jit
def add_times(b_sum, b_x, factor):
    """Returns the sum with a block of heads times one number for each frame added to it."""
    return b_sum[0] + factor * b_x[0].to(tl.float32), b_sum[1] + factor * b_x[1].to(tl.float32)


@triton.jit(
    do_not_specialize=["heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def grad_key_kernel(
    t, strides, space, heads, frames, map_block, numbers, window,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr, DETACH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, GRAD_MAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``KEYS`` keys, from all queries, ``QUERIES`` at a time.

    ``argmax`` and ``d_row_stat`` say which logit is a row's statistic and what comes through it.
    Blocks of the map are transposed: they are factors of dK and dV as they leave the products.
    """
    sizes = Sizes(space, heads, frames)
    key_blocks = tl.cdiv(frames, KEYS)
    i_sequence = tl.program_id(0) // key_blocks
    start = tl.program_id(0) % key_blocks * KEYS
    place = locate(i_sequence, sizes)
    j = start + tl.arange(0, KEYS)
    m_j = j < frames
    b_k = load_frames(t.k, strides.k, place, j, m_j, HEAD)  # (KEYS, D)
    b_v = load_frames(t.v, strides.v, place, j, m_j, HEAD)  # (KEYS, D)
    p_q = t.q + sequence_offset(strides.q, place, HEAD)
    p_do = t.grad_out + sequence_offset(strides.grad_out, place, HEAD)
    near = 0
    far = 0
    if BIAS.FORM != "none":
        near, far = blocks_in_window(start, KEYS, QUERIES, window, frames)

    b_dk = zero_heads(KEYS, HEAD)
    b_dv = zero_heads(KEYS, HEAD)
    for n in tl.range(0, tl.cdiv(frames, QUERIES), num_stages=STAGES):
        i = n * QUERIES + tl.arange(0, QUERIES)
        m_i = i < frames
        b_q = load_heads(p_q, frame_offsets(strides.q, i, HEAD), m_i, HEAD)  # (QUERIES, D)
        b_do = load_heads(p_do, frame_offsets(strides.grad_out, i, HEAD), m_i, HEAD)
        o_row = i_sequence.to(tl.int64) * frames + i
        normalizer = load_normalizer(t.normalizer, o_row, m_i)
        b_dot = tl.load(t.row_dot + o_row, mask=m_i, other=0.0)  # (QUERIES,)
        b_s = logits(b_k, b_q, i, frames, HEAD)  # (KEYS, QUERIES)
        if BIAS.FORM != "none":
            if (n >= near) & (n < far):
                b_stat = tl.load(t.row_stat + o_row, mask=m_i, other=0.0)  # (QUERIES,)
                b_delta = delta_block(
                    t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS, 0
                )
                b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS, 0)
        b_p = normalized(b_s, normalizer, numbers.exp2_scale, 0)  # (KEYS, QUERIES)
        b_dv = add_weighted_sums(b_dv, b_p.to(b_do[0].dtype), b_do, HEAD)  # (KEYS, D)
        b_dp = inner_products(b_v, b_do, HEAD)  # (KEYS, QUERIES)
        if GRAD_MAP:
            b_dp += numbers.map_weight * map_gradient(
                t.grad_map, strides.grad_map, place.batch, place.head, i, j, m_i, frames, map_block,
                0,
            )  # fmt: skip
        b_ds = b_p * (b_dp - tl.expand_dims(b_dot, 0))  # (KEYS, QUERIES)
        if BIAS.FORM != "none" and (STAT == "row_max" or STAT == "map_max") and not DETACH:
            b_argmax = tl.load(t.argmax + o_row, mask=m_i, other=-1)  # (QUERIES,)
            b_d_stat = tl.load(t.d_row_stat + o_row, mask=m_i, other=0.0)  # (QUERIES,)
            m_maximum = tl.expand_dims(j, 1) == tl.expand_dims(b_argmax, 0)
            b_ds += tl.where(m_maximum, tl.expand_dims(b_d_stat, 0), 0.0)
        b_dk = add_weighted_sums(b_dk, b_ds.to(b_q[0].dtype), b_q, HEAD)  # (KEYS, D)

    store_frames(t.grad_k, strides.grad_k, place, j, m_j, times(b_dk, numbers.scale), HEAD)
    store_frames(t.grad_v, strides.grad_v, place, j, m_j, b_dv, HEAD)


@dataclass(frozen=True)
class StreamBackwardPlan:
    """Three sweeps; before them one for the maps' maxima, after them one for Δ's gradient.

    What the forward pass saved spares the first, and what takes QKᵀ in the second.
    """

    map_max: Launch | None
    statistics: Launch
    grad_query: Launch
    grad_key: Launch
    grad_delta: MapSums | None
    through_map_max: bool

    def run(
        self,
        call: Call,
        out: Tensor,
        saved: tuple[Tensor, ...],
        grad_out: Tensor,
        grad_map: Tensor | None,
        gradients: Gradients,
    ) -> Tensor | None:
        """Fills the gradients and returns dΔ, ``(matrices, frames, frames)``, if it is wanted."""
        rows = plan.row_shape(call)
        normalizer = saved[0] if saved else plan.new(out, *rows, 2)
        row_stat = saved[-1] if saved else plan.new(out, *rows)  # not read where there is no bias
        every = Tensors(
            q=call.query,
            k=call.key,
            v=call.value,
            out=out,
            grad_out=grad_out,
            grad_q=gradients.query,
            grad_k=gradients.key,
            grad_v=gradients.value,
            delta=call.delta,
            stat=call.stat,
            grad_stat=gradients.stat,
            grad_map=grad_map,
            normalizer=normalizer,
            row_stat=row_stat,
            row_dot=plan.new(out, *rows),
            row_max=plan.new(out, *rows),
            argmax=plan.new(out, *rows, dtype=torch.int32),
            d_row_stat=plan.new(out, *rows),
        )
        if self.map_max is not None:
            maxima = plan.new(out, self.map_max.programs)
            self.map_max.on(q=call.query, k=call.key, maxima=maxima)
            every = every._replace(stat=maxima.view(rows[0], -1).amax(1))
        self.statistics.on(**every._asdict())
        self.grad_query.on(**every._asdict())
        if self.through_map_max:
            every = every._replace(d_row_stat=_through_map_max(call, gradients.query, every))
        self.grad_key.on(**every._asdict())
        if self.grad_delta is None:
            return None
        return self.grad_delta.run(
            call, every.normalizer, every.row_stat, every.row_dot, grad_out, grad_map
        )


def _through_map_max(call: Call, grad_query: Tensor, t: Tensors) -> Tensor:
    """Adds to dQ what comes through the maps' maxima, and returns the rows' share, for dK.

    All of a map's gradient of Δ's factor goes to the one logit that is its maximum.
    """
    i = t.row_max.argmax(1, keepdim=True)  # the first of equal ones
    total = t.d_row_stat.sum(1, keepdim=True)
    if call.options.clamp_negative:
        total = torch.where(t.row_max.amax(1, keepdim=True) >= 0, total, 0.0)
    j = t.argmax.gather(1, i)[:, 0].long()
    grad_query, key = (x if x.ndim == 5 else x.unsqueeze(1) for x in (grad_query, call.key))
    sequence = torch.arange(i.shape[0], device=i.device)
    place, head = sequence // call.heads, sequence % call.heads
    batch, space = place // key.shape[1], place % key.shape[1]
    change = call.options.scale * total * key[batch, space, j, head].float()
    grad_query[batch, space, i[:, 0], head] += change.to(grad_query.dtype)
    return torch.zeros_like(t.row_max).scatter_(1, i, total)


def make_plan(key: PlanKey) -> StreamBackwardPlan:
    """Returns the plan of a backward pass."""
    config = configs.stream_backward(key.device.architecture, key.kind, key.head_dim)
    return plan_stream(key, config)


def sweep_name(key: PlanKey, sweep: str) -> str:
    """Returns the name of a sweep's configuration: "…_full" where it reads a map's gradient or Δ.

    Of these a thread has a block's numbers in registers, with their addresses.
    """
    return sweep + "_full" * (key.has_map or key.reads_delta)


def plan_stream(key: PlanKey, config: StreamConfig) -> StreamBackwardPlan:
    """Returns the plan with a configuration, which need not be the one in the table."""
    nothing = Tensors(*(False,) * len(Tensors._fields))
    common = nothing._replace(
        q=True,
        k=True,
        grad_out=True,
        delta=key.reads_delta,
        grad_map=key.has_map,
        normalizer=True,
        row_stat=key.has_bias,
        row_dot=True,
    )
    sweeps = key.has_map or not key.saved  # of the statistics
    map_max = None
    if key.options.stat == "map_max" and not key.saved:
        map_max = stream.plan_map_max(key, config.of_kernel("map_max"), plan.halves(key))
    return StreamBackwardPlan(
        map_max,
        _plan_sweep(
            key,
            statistics_kernel,
            config.of_kernel("statistics"),
            common._replace(
                q=sweeps,
                k=sweeps,
                out=True,
                delta=key.reads_delta and sweeps,
                stat=key.options.stat in ("map_max", "tensor") and not key.saved,
            ),
            {"SAVED": key.saved},
        ),
        _plan_sweep(
            key,
            grad_query_kernel,
            config.of_kernel(sweep_name(key, "grad_query")),
            common._replace(
                v=True,
                grad_q=True,
                grad_stat=key.given_stat and key.through_stat,
                row_max=key.options.stat == "map_max" and key.through_stat,
                argmax=key.through_maximum,
                d_row_stat=key.through_maximum,
            ),
            {"DETACH": key.options.detach_stat},
        ),
        _plan_sweep(
            key,
            grad_key_kernel,
            config.of_kernel(sweep_name(key, "grad_key")),
            common._replace(
                v=True,
                grad_k=True,
                grad_v=True,
                argmax=key.through_maximum,
                d_row_stat=key.through_maximum,
            ),
            {"DETACH": key.options.detach_stat},
            by_keys=True,
        ),
        maps.plan_grad_delta(key, config) if key.wants_delta else None,
        key.options.stat == "map_max" and key.through_stat,
    )


def _plan_sweep(
    key: PlanKey,
    kernel: Any,
    config: StreamConfig,
    needed: Tensors,
    constants: dict[str, Any],
    *,
    by_keys: bool = False,
) -> Launch:
    """Returns the launch of one sweep, with a program for each block of queries or keys."""
    strides = TensorStrides(
        q=plan.row_strides(key, key.query),
        k=plan.row_strides(key, key.key),
        v=plan.row_strides(key, key.value),
        out=plan.row_strides(key, key.out),
        grad_out=plan.row_strides(key, key.grad_out),
        grad_q=plan.row_strides(key, key.grad_query),
        grad_k=plan.row_strides(key, key.grad_key),
        grad_v=plan.row_strides(key, key.grad_value),
        delta=plan.delta_strides(key),
        stat=plan.stat_strides(key, key.stat),
        grad_stat=plan.stat_strides(key, key.grad_stat),
        grad_map=plan.map_strides(key),
    )
    pairs = ((getattr(needed, name), x) for name, x in strides._asdict().items())
    return Launch(
        kernel,
        key.sequences * -(-key.frames // (config.keys if by_keys else config.queries)),
        needed,
        (
            TensorStrides(*(x if is_needed else () for is_needed, x in pairs)),
            key.space,
            key.heads,
            key.frames,
            max(key.options.map_block, 1),
            plan.numbers(key),
            plan.window(key),
        ),
        {
            **plan.block_constants(key, config, plan.halves(key)),
            "BIAS": plan.bias(key),
            "STAT": key.options.stat,
            "GRAD_MAP": key.has_map,
            **constants,
        },
    )
