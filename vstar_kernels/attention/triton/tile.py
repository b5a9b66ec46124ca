"""Up to 128 frames: the whole map of a sequence stays on chip.

A program reads queries, keys and values of one or several sequences once and writes their outputs
once. Its floor is that traffic: 4 · B·S·N·H·D elements over the memory's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Call, Forward, block_sums
from vstar_kernels.attention.triton import configs, plan
from vstar_kernels.attention.triton.configs import TileConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.plan import PlanKey, Strides
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    Sizes,
    delta_block,
    exponentials,
    larger,
    largest,
    load_frames,
    locate,
    logits,
    regularized,
    sequences_of_range,
    statistic_offsets,
    store_frames,
    store_sum,
    times,
    weighted_sums,
)

LARGEST_MAP_TILE = 64  # frames: beyond, the map's sum does not fit the registers beside the rest


class Tensors(NamedTuple):
    """What the kernel reads and writes, and of each whether it does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like k, v and out
    k: Any
    v: Any
    out: Any
    delta: Any  # Δ's table or matrix
    stat: Any  # (batch, [space,] frames, heads)
    map_sums: Any  # (maps, chunks, FRAMES, FRAMES)


class TensorStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them."""

    q: Strides
    k: Strides
    v: Strides
    out: Strides
    delta: Strides
    stat: Strides


@triton.jit(
    do_not_specialize=["length", "step", "chunks", "heads", "frames"],
    do_not_specialize_on_alignment=["space"],
)
def tile_kernel(
    t, strides, length, step, chunks, space, heads, frames, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr,
    FRAMES: tl.constexpr, QUERIES: tl.constexpr, SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr, HOISTS: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """``SEQUENCES`` sequences at a time, each padded to ``FRAMES``, ``QUERIES`` queries at a time.

    Every ``length`` sequences are ``step`` ranges, which take turns, and each range is shared out
    among ``chunks`` programs. A program goes through its tiles with ``STAGES`` of them under way:
    with two, the next one's queries, keys and values are loaded while this one is computed. With
    ``HOISTS``, and where QUERIES is FRAMES, Δ is made before them and stays on chip; it must be the
    same for all of a range. Without, LLVM moves nothing that they have in common out of their loop,
    which takes fewer registers. With ``MAP`` each program leaves the sum of its sequences' A′ in
    ``map_sums``; QUERIES is FRAMES.
    """
    i_head, i_begin, i_end = sequences_of_range(tl.program_id(0) // chunks, length, step)
    b_delta = None
    if BIAS.FORM != "none" and QUERIES == FRAMES and HOISTS:
        j = tl.arange(0, FRAMES)
        b_delta = delta_block(
            t.delta, strides.delta, i_head, j, j, frames, numbers.falloff, HEAD, BIAS
        )
    if MAP:
        b_sum = tl.zeros((FRAMES, FRAMES), tl.float32)
        if SEQUENCES > 1:
            b_sum = tl.zeros((SEQUENCES, FRAMES, FRAMES), tl.float32)
    tiles = tl.cdiv(length // step, SEQUENCES)
    first = tl.program_id(0) % chunks
    for i_tile in tl.range(first, tiles, chunks, num_stages=STAGES, disable_licm=not HOISTS):
        b_a = attend(
            i_begin + i_tile * SEQUENCES * step, i_end, step, b_delta,
            t, strides, Sizes(space, heads, frames), numbers,
            HEAD, BIAS, STAT, FRAMES, QUERIES, SEQUENCES,
        )  # fmt: skip
        if MAP:
            b_sum += b_a
    if MAP:
        if SEQUENCES > 1:
            b_sum = tl.sum(b_sum, 0)
        store_sum(t.map_sums, b_sum, FRAMES)


@triton.jit
def attend(
    i_first, i_end, step, b_delta, t, strides, sizes, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr, STAT: tl.constexpr,
    FRAMES: tl.constexpr, QUERIES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Stores the outputs of every ``step``-th sequence from ``i_first`` on, and returns A′.

    There are ``SEQUENCES`` of them, but none from ``i_end`` on. ``b_delta`` is Δ,
    ``(FRAMES, FRAMES)``, or None where it is not at hand. All blocks have a dimension for the
    sequences first if there are several.
    """
    i_sequence = i_first
    if SEQUENCES > 1:
        i_sequence = i_first + tl.arange(0, SEQUENCES) * step
        i_sequence = tl.expand_dims(i_sequence, 1)  # (SEQUENCES, 1)
    place = locate(i_sequence, sizes)
    j = tl.arange(0, FRAMES)
    m_j = (i_sequence < i_end) & (j < sizes.frames)  # (FRAMES,) or (SEQUENCES, FRAMES)
    b_k = load_frames(t.k, strides.k, place, j, m_j, HEAD)  # (FRAMES, D)

    b_stat = LOG2E / numbers.exp2_scale
    if STAT == "map_max":
        b_stat = float("-inf")
        for start in tl.static_range(0, FRAMES, QUERIES):
            i = start + tl.arange(0, QUERIES)
            m_i = (i_sequence < i_end) & (i < sizes.frames)
            b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)
            b_s = logits(b_q, b_k, j, sizes.frames, HEAD)  # (QUERIES, FRAMES)
            b_max = tl.where(i < sizes.frames, largest(b_s), float("-inf"))  # (QUERIES,)
            b_stat = larger(b_stat, largest(b_max))
        if SEQUENCES > 1:
            b_stat = tl.expand_dims(b_stat, 1)  # (SEQUENCES, 1)

    b_v = load_frames(t.v, strides.v, place, j, m_j, HEAD)  # (FRAMES, D)
    for start in tl.static_range(0, FRAMES, QUERIES):
        i = start + tl.arange(0, QUERIES)
        m_i = (i_sequence < i_end) & (i < sizes.frames)
        b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (QUERIES, D)
        b_s = logits(b_q, b_k, j, sizes.frames, HEAD)  # (QUERIES, FRAMES)
        if STAT == "row_max":
            b_stat = tl.max(b_s, -1)  # (QUERIES,)
        elif STAT == "tensor":
            o_stat = statistic_offsets(strides.stat, place, i, HEAD)
            b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * (LOG2E / numbers.exp2_scale)
        if BIAS.FORM != "none":
            if b_delta is None:
                b_delta_i = delta_block(
                    t.delta, strides.delta, place.head, i, j, sizes.frames, numbers.falloff,
                    HEAD, BIAS,
                )  # fmt: skip
            else:
                b_delta_i = b_delta
            b_s = regularized(b_s, b_stat, b_delta_i, numbers.strength, BIAS)
        b_p = exponentials(b_s, tl.max(b_s, -1), numbers.exp2_scale)  # (QUERIES, FRAMES)
        b_inverse = tl.expand_dims(1.0 / tl.sum(b_p, -1), -1)  # (QUERIES, 1)
        b_o = times(weighted_sums(b_p.to(b_v[0].dtype), b_v, HEAD), b_inverse)  # (QUERIES, D)
        store_frames(t.out, strides.out, place, i, m_i, b_o, HEAD)
    # The last block's, which is all where the caller wants it; nothing of what is padded.
    return tl.where(tl.expand_dims(m_i, -1), b_p * b_inverse, 0.0)


@dataclass(frozen=True)
class TilePlan:
    """One launch; where the mean map is wanted, it leaves sums of maps, of shape ``map_sums``."""

    launch: Launch
    map_sums: tuple[int, ...] = ()

    def run(self, call: Call, out: Tensor) -> Forward:
        """Fills ``out``. Nothing is saved: see :mod:`tile_backward`."""
        sums = plan.new(out, *self.map_sums) if self.map_sums else None
        self.launch.on(
            q=call.query,
            k=call.key,
            v=call.value,
            out=out,
            delta=call.delta,
            stat=call.stat,
            map_sums=sums,
        )
        if sums is None:
            return Forward(out, None, ())
        mean = sums.sum(1)[:, : call.frames, : call.frames] * plan.map_weight(call)
        mean_map = block_sums(mean, call.options.map_block)
        return Forward(out, mean_map.reshape(call.map_shape), ())


def make_plan(key: PlanKey) -> TilePlan | None:
    """Returns the plan of a call, or None where no tile holds it."""
    config = configs.tile(key.device.architecture, key.kind, key.frames, key.head_dim)
    if config is None or config.shared > key.device.shared:
        return None
    return plan_tile(key, config)


def plan_tile(key: PlanKey, config: TileConfig) -> TilePlan | None:
    """Returns the plan with a configuration, which need not be the one in the table.

    None if it leaves the call to the stream kernels.
    """
    padded = configs.padded_frames(key.frames)
    if key.has_map and not config.queries == padded <= LARGEST_MAP_TILE:
        return None
    if plan.left_by_tile(key, config):
        return None
    # Of one Δ, and of one map where maps are wanted, are the sequences of one head, or all of them.
    length = key.space * key.heads if key.has_map else key.sequences
    step = key.heads if key.per_head or key.map_heads > 1 else 1
    ranges = key.sequences // length * step
    chunks = config.chunks(key.device.processors, ranges, length // step)
    map_sums: tuple[int, ...] = ()
    if key.has_map:
        maps = key.shape[0] * key.map_heads
        map_sums = (maps, ranges * chunks // maps, padded, padded)
    launch = Launch(
        tile_kernel,
        ranges * chunks,
        Tensors(
            q=True,
            k=True,
            v=True,
            out=True,
            delta=key.reads_delta,
            stat=key.given_stat,
            map_sums=key.has_map,
        ),
        (
            TensorStrides(
                q=plan.row_strides(key, key.query),
                k=plan.row_strides(key, key.key),
                v=plan.row_strides(key, key.value),
                out=plan.row_strides(key, key.out),
                delta=plan.delta_strides(key),
                stat=plan.stat_strides(key, key.stat),
            ),
            length,
            step,
            chunks,
            key.space,
            key.heads,
            key.frames,
            plan.numbers(key),
        ),
        {
            "HEAD": plan.head(key, block=padded),
            "BIAS": plan.bias(key),
            "STAT": key.options.stat,
            "FRAMES": padded,
            "QUERIES": config.queries,
            "SEQUENCES": config.sequences,
            "STAGES": config.stages,
            "HOISTS": config.hoists,
            "MAP": key.has_map,
            "num_warps": config.warps,
        },
    )
    return TilePlan(launch, map_sums)
