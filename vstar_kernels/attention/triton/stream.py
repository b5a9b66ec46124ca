"""More than 128 frames: keys stream past a block of queries, as in flash attention.

Where Δ vanishes outside a window, exact at nearly flash attention's cost for a window ≪ N::

    keys in the window        row maximum only: no exponentials, no values
    keys outside the window   online softmax of φ, which also finds their row maximum
    keys in the window again  the row maximum is final now: online softmax with the bias

The last two are one loop, whose loads run ahead without a break. The first is a loop of its own:
one for all three would fetch values, and multiply with them, where only maxima are wanted.

The extra work is QKᵀ over the window. A Δ without a window makes that two passes over all keys; a
statistic that is known beforehand needs one. Operations: 4·B·S·H·N²·D, and 2·B·S·H·N·W·D for a
window of W keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Call, Forward
from vstar_kernels.attention.triton import configs, descriptors, maps, plan
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.attention.triton.descriptors import Frames, load_block
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.maps import MapSums
from vstar_kernels.attention.triton.plan import PlanKey, Strides
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    Sizes,
    add_weighted_sums,
    blocks_in_window,
    delta_block,
    exponentials,
    larger,
    largest,
    load_frames,
    locate,
    logits,
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
    """What the kernel reads and writes, and of each whether it does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like k, v and out
    k: Any
    v: Any
    out: Any
    delta: Any  # Δ's table or matrix
    stat: Any  # (batch, [space,] frames, heads), or of "map_max", (sequences, blocks of queries)
    normalizer: Any  # (sequences, frames, 2): each row's :class:`primitives.Normalizer`
    row_stat: Any  # (sequences, frames)


class TensorStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them."""

    q: Strides
    k: Strides
    v: Strides
    out: Strides
    delta: Strides
    stat: Strides


@triton.jit(
    do_not_specialize=["heads", "frames", "window"], do_not_specialize_on_alignment=["space"]
)
def stream_kernel(
    t, k_main, k_rest, v_main, v_rest, strides, space, heads, frames, numbers, window,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """``QUERIES`` queries of one sequence against all keys, ``KEYS`` at a time.

    Δᵢⱼ counts as zero for |j − i| > ``window``. ``k_main`` … are descriptors of the tensors' parts,
    or None. With ``STAT`` "map_max", ``stat`` holds the maxima that :func:`map_max_kernel` left.
    ``SAVE`` writes each row's normalizer, and Δ's factor before it is clamped.
    """
    sizes = Sizes(space, heads, frames)
    query_blocks = tl.cdiv(frames, QUERIES)
    i_sequence = tl.program_id(0) // query_blocks
    start = tl.program_id(0) % query_blocks * QUERIES
    place = locate(i_sequence, sizes)
    i = start + tl.arange(0, QUERIES)
    m_i = i < frames
    b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (QUERIES, D)
    keys = Frames(t.k + sequence_offset(strides.k, place, HEAD), strides.k, k_main, k_rest)
    values = Frames(t.v + sequence_offset(strides.v, place, HEAD), strides.v, v_main, v_rest)

    # Blocks near … far − 1 of keys meet the window, which is all keys unless Δ is a Gaussian.
    key_blocks = tl.cdiv(frames, KEYS)
    near, far = blocks_in_window(start, QUERIES, KEYS, window, frames)
    others = key_blocks - (far - near)

    if BIAS.FORM != "none":
        b_stat = LOG2E / numbers.exp2_scale
        if STAT == "row_max":
            b_stat = tl.full((QUERIES,), float("-inf"), tl.float32)
            for n in tl.range(near, far, num_stages=STAGES):
                j = n * KEYS + tl.arange(0, KEYS)
                b_k = load_block(keys, place, n, frames, HEAD, KEYS)  # (KEYS, D)
                b_stat = tl.maximum(b_stat, tl.max(logits(b_q, b_k, j, frames, HEAD), 1))
        elif STAT == "map_max":
            b_stat = float("-inf")
            for n in range(query_blocks):
                p_stat = t.stat + i_sequence.to(tl.int64) * query_blocks + n
                b_stat = larger(b_stat, tl.load(p_stat))
        elif STAT == "tensor":
            o_stat = statistic_offsets(strides.stat, place, i, HEAD)
            b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * (LOG2E / numbers.exp2_scale)

    b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    b_total = tl.zeros((QUERIES,), tl.float32)
    b_o = zero_heads(QUERIES, HEAD)
    for n in tl.range(0, key_blocks, num_stages=STAGES):
        block = n
        if BIAS.FORM == "gaussian":  # the window comes last
            block = tl.where(n < others, tl.where(n < near, n, n + far - near), n - others + near)
        j = block * KEYS + tl.arange(0, KEYS)
        b_k = load_block(keys, place, block, frames, HEAD, KEYS)  # (KEYS, D)
        b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
        if BIAS.FORM == "gaussian":
            if n >= others:
                if STAT == "row_max":  # b_max is that of the others until the window begins
                    b_stat = tl.where(n == others, tl.maximum(b_stat, b_max), b_stat)
                b_s = with_bias(
                    b_s, b_stat, t.delta, strides.delta, place, i, j, frames, numbers, HEAD, BIAS
                )
        elif BIAS.FORM != "none":
            b_s = with_bias(
                b_s, b_stat, t.delta, strides.delta, place, i, j, frames, numbers, HEAD, BIAS
            )

        # The online softmax (Milakov and Gimelshein, 2018).
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = subtrahend(b_new_max)
        b_shrink = tl.exp2((b_max - b_shift) * numbers.exp2_scale)
        b_p = exponentials(b_s, b_shift, numbers.exp2_scale)  # (QUERIES, KEYS)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        b_max = b_new_max
        b_v = load_block(values, place, block, frames, HEAD, KEYS)  # (KEYS, D)
        b_o = times(b_o, tl.expand_dims(b_shrink, 1))
        b_o = add_weighted_sums(b_o, b_p.to(b_v[0].dtype), b_v, HEAD)

    if SAVE:
        o_row = i_sequence.to(tl.int64) * frames + i
        store_normalizer(t.normalizer, o_row, m_i, b_max, b_total)
        if BIAS.FORM != "none":
            tl.store(t.row_stat + o_row, tl.zeros((QUERIES,), tl.float32) + b_stat, mask=m_i)
    b_inverse = tl.expand_dims(1.0 / b_total, 1)  # (QUERIES, 1)
    store_frames(t.out, strides.out, place, i, m_i, times(b_o, b_inverse), HEAD)


@triton.jit
def with_bias(
    b_s, b_stat, p_delta, strides, place, i, j, frames, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Returns logits with strength · stat · Δ added to them, ``(QUERIES, KEYS)``."""
    b_delta = delta_block(p_delta, strides, place.head, i, j, frames, numbers.falloff, HEAD, BIAS)
    return regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)


class MapMaxTensors(NamedTuple):
    """What :func:`map_max_kernel` reads and writes, and of each whether it does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like k
    k: Any
    maxima: Any  # (sequences, blocks of queries)


class MapMaxStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them."""

    q: Strides
    k: Strides


@triton.jit(do_not_specialize=["heads", "frames"], do_not_specialize_on_alignment=["space"])
def map_max_kernel(
    t, strides, space, heads, frames,
    HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest logit of each block of ``QUERIES`` queries: 2·B·S·H·N²·D operations."""
    query_blocks = tl.cdiv(frames, QUERIES)
    place = locate(tl.program_id(0) // query_blocks, Sizes(space, heads, frames))
    i = tl.program_id(0) % query_blocks * QUERIES + tl.arange(0, QUERIES)
    b_q = load_frames(t.q, strides.q, place, i, i < frames, HEAD)  # (QUERIES, D)
    keys = Frames(t.k + sequence_offset(strides.k, place, HEAD), strides.k, None, None)
    b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=STAGES):
        j = n * KEYS + tl.arange(0, KEYS)
        b_k = load_block(keys, place, n, frames, HEAD, KEYS)  # (KEYS, D)
        b_max = larger(b_max, largest(logits(b_q, b_k, j, frames, HEAD)))
    b_max = tl.where(i < frames, b_max, float("-inf"))
    tl.store(t.maxima + tl.program_id(0).to(tl.int64), largest(b_max))


@dataclass(frozen=True)
class StreamPlan:
    """The launches: ``map_max``, if any, comes first, and the ``maps`` of the mean map last.

    ``attention`` may take descriptors of keys and values; ``pointers`` takes none.
    """

    attention: Launch
    pointers: Launch
    map_max: Launch | None
    maps: tuple[MapSums, ...]
    save: bool

    def run(self, call: Call, out: Tensor) -> Forward:
        """Fills ``out``; saves rows' normalizers and, with a bias, Δ's factors, where it is to."""
        stat, mean_map = call.stat, None
        if self.map_max is not None:
            stat = plan.new(out, self.map_max.programs)
            self.map_max.on(q=call.query, k=call.key, maxima=stat)
        attention = self.attention
        if attention is not self.pointers and not descriptors.aligned(call.key, call.value):
            attention = self.pointers
        needed = attention.needed
        normalizer = plan.new(out, *plan.row_shape(call), 2) if needed.normalizer else None
        row_stat = plan.new(out, *plan.row_shape(call)) if needed.row_stat else None
        attention.on(
            q=call.query,
            k=call.key,
            v=call.value,
            out=out,
            delta=call.delta,
            stat=stat,
            normalizer=normalizer,
            row_stat=row_stat,
        )
        if normalizer is not None and self.maps:
            mean_map = maps.mean_map(self.maps, call, normalizer, row_stat)
        saved = tuple(x for x in (normalizer, row_stat) if x is not None) if self.save else ()
        return Forward(out, mean_map, saved)


def make_plan(key: PlanKey) -> StreamPlan:
    """Returns the plan of a call."""
    config = configs.stream(key.device.architecture, key.kind, key.head_dim)
    return plan_stream(key, config)


def plan_stream(key: PlanKey, config: StreamConfig) -> StreamPlan:
    """Returns the plan with a configuration, which need not be the one in the table."""
    by_pointers = config.of_kernel("pointers")
    if by_pointers.queries != config.queries:
        raise ValueError(
            f"the kernel by pointers takes {config.queries} queries, as the map's maximum does,"
            f" its configuration has {by_pointers.queries}"
        )
    attention = pointers = plan_attention(key, by_pointers)
    batch, space, frames, heads, head_dim = key.shape_5d
    k, v = (plan.strides_4d(x, key) for x in (key.key, key.value))
    if descriptors.possible(key.device, key.kind, (batch, space, frames, heads), k, v):
        attention = descriptors.described(
            plan_attention(key, config),
            key.dtype,
            (batch, space, heads, frames, head_dim),
            k=(k[0], k[1], k[3], k[2]),
            v=(v[0], v[1], v[3], v[2]),
        )
    return StreamPlan(
        attention,
        pointers,
        plan_map_max(key, config) if key.options.stat == "map_max" else None,
        maps.plan_mean_map(key) if key.has_map else (),
        key.save,
    )


def plan_attention(key: PlanKey, config: StreamConfig) -> Launch:
    """Returns the launch that takes keys and values by pointers."""
    save = key.save or key.has_map
    return Launch(
        stream_kernel,
        key.sequences * -(-key.frames // config.queries),
        Tensors(
            q=True,
            k=True,
            v=True,
            out=True,
            delta=key.reads_delta,
            stat=key.options.stat in ("map_max", "tensor"),
            normalizer=save,
            row_stat=save and key.has_bias,
        ),
        (
            *(None,) * 4,
            TensorStrides(
                q=plan.row_strides(key, key.query),
                k=plan.row_strides(key, key.key),
                v=plan.row_strides(key, key.value),
                out=plan.row_strides(key, key.out),
                delta=plan.delta_strides(key),
                stat=plan.stat_strides(key, key.stat),
            ),
            key.space,
            key.heads,
            key.frames,
            plan.numbers(key),
            plan.window(key),
        ),
        {
            **plan.block_constants(key, config),
            "BIAS": plan.bias(key),
            "STAT": key.options.stat,
            "SAVE": save,
        },
    )


def plan_map_max(
    key: PlanKey, config: StreamConfig, parts: tuple[int, int] | None = None
) -> Launch:
    """Returns the launch for the maxima that the attention needs, of blocks of the same size."""
    return Launch(
        map_max_kernel,
        key.sequences * -(-key.frames // config.queries),
        MapMaxTensors(q=True, k=True, maxima=True),
        (
            MapMaxStrides(plan.row_strides(key, key.query), plan.row_strides(key, key.key)),
            key.space,
            key.heads,
            key.frames,
        ),
        plan.block_constants(key, config, parts),
    )
