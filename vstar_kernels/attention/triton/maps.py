"""Sums over sequences of N×N maps: the mean map of long sequences, and the gradient of a Δ.

Every program owns a block of the sum and goes through all sequences that contribute to it, in one
order, so that nothing is ever added up between programs. Where the blocks are fewer than a GPU
needs, the sequences are dealt to several ``chunks``, whose sums are added afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Call, block_sums
from vstar_kernels.attention.triton import configs, plan
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.plan import PlanKey, Strides
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    Sizes,
    delta_block,
    inner_products,
    larger,
    load_frames,
    load_normalizer,
    locate,
    logits,
    map_gradient,
    normalized,
    regularized,
)

PROGRAMS_PER_PROCESSOR = 8  # that share out the sequences; more than are resident at a time
STRIP = 512  # query frames of the mean map that are summed at a time, where it is summed by blocks


class Tensors(NamedTuple):
    """What the kernel reads and writes, and of each whether it does."""

    q: Any  # (batch, [space,] frames, heads, head_dim), like k, v and grad_out
    k: Any
    v: Any
    grad_out: Any
    delta: Any  # Δ's table or matrix
    grad_map: Any  # (batch, [heads,] blocks, blocks)
    normalizer: Any  # (sequences, frames, 2): each row's :class:`primitives.Normalizer`
    row_stat: Any  # (sequences, frames), like row_dot
    row_dot: Any
    sums: Any  # (groups, chunks, strip, frames)


class TensorStrides(NamedTuple):
    """The strides of these tensors, as :mod:`primitives` takes them."""

    q: Strides
    k: Strides
    v: Strides
    grad_out: Strides
    delta: Strides
    grad_map: Strides


@triton.jit(
    do_not_specialize=[
        "heads", "frames", "map_block", "strip_start", "strip", "count", "group_heads",
        "group_step", "sequence_step", "chunks",
    ],
    do_not_specialize_on_alignment=["space"],
)  # fmt: skip
def maps_kernel(
    t, strides, space, heads, frames, map_block, strip_start, strip, count, group_heads,
    group_step, sequence_step, chunks, numbers,
    HEAD: tl.constexpr, BIAS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    OF_DELTA: tl.constexpr, GRAD_MAP: tl.constexpr,
):  # fmt: skip
    """Sums A′, or ``OF_DELTA``, dΔ, for the ``strip`` query frames from ``strip_start`` on.

    Group g, of H = ``group_heads``, sums over its ``count`` sequences, which are
    (g / H) · group_step + g mod H + n · sequence_step.
    """
    sizes = Sizes(space, heads, frames)
    query_blocks = tl.cdiv(strip, QUERIES)
    key_blocks = tl.cdiv(frames, KEYS)
    i_program = tl.program_id(0)
    key_start = i_program % key_blocks * KEYS
    i_program = i_program // key_blocks
    query_start = i_program % query_blocks * QUERIES
    i_program = i_program // query_blocks
    i_chunk = i_program % chunks
    i_group = i_program // chunks
    i = strip_start + query_start + tl.arange(0, QUERIES)
    j = key_start + tl.arange(0, KEYS)
    m_i = i < frames
    m_j = j < frames

    i_first = i_group // group_heads * group_step + i_group % group_heads
    b_sum = tl.zeros((QUERIES, KEYS), tl.float32)
    for n in tl.range(i_chunk, count, chunks, num_stages=STAGES):
        i_sequence = i_first + n * sequence_step
        place = locate(i_sequence, sizes)
        b_q = load_frames(t.q, strides.q, place, i, m_i, HEAD)  # (QUERIES, D)
        b_k = load_frames(t.k, strides.k, place, j, m_j, HEAD)  # (KEYS, D)
        b_s = logits(b_q, b_k, j, frames, HEAD)  # (QUERIES, KEYS)
        o_row = i_sequence.to(tl.int64) * frames + i
        b_stat = tl.full((QUERIES,), 0.0, tl.float32)
        if BIAS.FORM != "none":
            b_stat = tl.load(t.row_stat + o_row, mask=m_i, other=0.0)  # (QUERIES,)
            b_delta = delta_block(
                t.delta, strides.delta, place.head, i, j, frames, numbers.falloff, HEAD, BIAS
            )
            b_s = regularized(b_s, b_stat, b_delta, numbers.strength, BIAS)
        normalizer = load_normalizer(t.normalizer, o_row, m_i)
        b_p = normalized(b_s, normalizer, numbers.exp2_scale)  # (QUERIES, KEYS)
        if OF_DELTA:
            b_do = load_frames(t.grad_out, strides.grad_out, place, i, m_i, HEAD)  # (QUERIES, D)
            b_v = load_frames(t.v, strides.v, place, j, m_j, HEAD)  # (KEYS, D)
            b_dp = inner_products(b_do, b_v, HEAD)  # (QUERIES, KEYS)
            if GRAD_MAP:
                b_dp += numbers.map_weight * map_gradient(
                    t.grad_map,
                    strides.grad_map,
                    place.batch,
                    place.head,
                    i,
                    j,
                    m_i,
                    frames,
                    map_block,
                )
            b_dot = tl.load(t.row_dot + o_row, mask=m_i, other=0.0)  # (QUERIES,)
            if BIAS.CLAMP:
                b_stat = larger(b_stat, 0.0)
            b_ds = b_p * (b_dp - tl.expand_dims(b_dot, 1))
            factor = numbers.strength * numbers.exp2_scale / LOG2E
            b_sum += b_ds * tl.expand_dims(b_stat * factor, 1)
        else:
            b_sum += b_p

    i_row = query_start + tl.arange(0, QUERIES)  # within the strip
    o_sum = (i_group * chunks + i_chunk).to(tl.int64) * strip * frames
    o_sum = o_sum + tl.expand_dims(i_row.to(tl.int64), 1) * frames + j
    tl.store(t.sums + o_sum, b_sum, mask=tl.expand_dims((i_row < strip) & m_i, 1) & m_j)


@dataclass(frozen=True)
class MapSums:
    """One launch, which leaves sums of the shape ``(groups, chunks, strip, frames)``."""

    launch: Launch
    shape: tuple[int, int, int, int]

    def run(
        self,
        call: Call,
        normalizer: Tensor,
        row_stat: Tensor | None,
        row_dot: Tensor | None = None,
        grad_out: Tensor | None = None,
        grad_map: Tensor | None = None,
    ) -> Tensor:
        """Returns the sums, ``(groups, strip, frames)``; dΔ takes the last three tensors too."""
        sums = plan.new(normalizer, *self.shape)
        self.launch.on(
            q=call.query,
            k=call.key,
            v=None if grad_out is None else call.value,
            grad_out=grad_out,
            delta=call.delta,
            grad_map=grad_map,
            normalizer=normalizer,
            row_stat=row_stat,
            row_dot=row_dot,
            sums=sums,
        )
        return sums.sum(1)


def mean_map(
    strips: tuple[MapSums, ...], call: Call, normalizer: Tensor, row_stat: Tensor | None
) -> Tensor:
    """Returns the mean map, or its sums over blocks of frames, strip by strip."""
    weight, block = plan.map_weight(call), call.options.map_block
    sums = [block_sums(strip.run(call, normalizer, row_stat) * weight, block) for strip in strips]
    return torch.cat(sums, dim=1).view(call.map_shape)


def plan_mean_map(key: PlanKey, config: StreamConfig | None = None) -> tuple[MapSums, ...]:
    """Returns the launches for the mean map, in strips, so that block sums never need all of it.

    ``config`` need not be the one in the table, which is that of the gradients.
    """
    config = config or configs.stream_backward(key.device.architecture, key.kind, key.head_dim)
    block = key.options.map_block
    strip = key.frames if block == 1 else block * max(1, STRIP // block)
    return tuple(
        _plan_sums(
            key,
            config.of_kernel("maps"),
            groups=key.shape[0] * key.map_heads,
            strip_start=start,
            strip=min(strip, key.frames - start),
            count=key.map_sequences,
            group_heads=key.map_heads,
            group_step=key.space * key.heads,
            sequence_step=key.map_heads,
            of_delta=False,
        )
        for start in range(0, key.frames, strip)
    )


def plan_grad_delta(key: PlanKey, config: StreamConfig) -> MapSums:
    """Returns the launch for dΔ, one sum for each Δ that there is."""
    return _plan_sums(
        key,
        config.of_kernel("grad_delta"),
        groups=key.matrices,
        strip_start=0,
        strip=key.frames,
        count=key.sequences // key.matrices,
        group_heads=1,
        group_step=1,
        sequence_step=key.matrices,
        of_delta=True,
    )


def _plan_sums(
    key: PlanKey,
    config: StreamConfig,
    *,
    groups: int,
    strip_start: int,
    strip: int,
    count: int,
    group_heads: int,
    group_step: int,
    sequence_step: int,
    of_delta: bool,
) -> MapSums:
    """Returns a launch over ``count`` sequences of each group, in as many chunks as a GPU needs."""
    blocks = groups * -(-strip // config.queries) * -(-key.frames // config.keys)
    chunks = min(count, -(-key.device.processors * PROGRAMS_PER_PROCESSOR // blocks))
    launch = Launch(
        maps_kernel,
        blocks * chunks,
        Tensors(
            q=True,
            k=True,
            v=of_delta,
            grad_out=of_delta,
            delta=key.reads_delta,
            grad_map=of_delta and key.has_map,
            normalizer=True,
            row_stat=key.has_bias,
            row_dot=of_delta,
            sums=True,
        ),
        (
            TensorStrides(
                q=plan.row_strides(key, key.query),
                k=plan.row_strides(key, key.key),
                v=plan.row_strides(key, key.value),
                grad_out=plan.row_strides(key, key.grad_out),
                delta=plan.delta_strides(key),
                grad_map=plan.map_strides(key),
            ),
            key.space,
            key.heads,
            key.frames,
            max(key.options.map_block, 1),
            strip_start,
            strip,
            count,
            group_heads,
            group_step,
            sequence_step,
            chunks,
            plan.numbers(key),
        ),
        {
            **plan.block_constants(key, config, plan.halves(key)),
            "BIAS": plan.bias(key),
            "OF_DELTA": of_delta,
            "GRAD_MAP": key.has_map,
        },
    )
    return MapSums(launch, (groups, chunks, strip, key.frames))
