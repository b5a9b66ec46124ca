"""Attention over frames of tokens: softmax split by key frame, in one pass over the keys.

A rule's bias is constant in a (row, key frame) block, so a tile of rows sees the keys in *slots*:
key frames that have equal weights in every row of the tile. Each slot is a softmax of its own,
without the bias::

    slot c       online softmax over its keys: output o_c, log-sum-exp lse_c; the row statistic r
                 is gathered on the way, over the slots (row_max) or their frames (frame_max)
    all slots    out = sum of w_c o_c / sum of w_c,  w_c = exp(lse_c + r delta_c + offset_c)

The partial outputs stay in scratch memory of the program, in 16 bits where the inputs are, scaled
row by row to the size of what they hold. Where r is known beforehand (no statistic, a tensor of
the caller's) nothing is split: the slots share one online softmax, and the bias is one constant of
each row and slot. Key frames that no row of a tile sees have no slot: time follows the kept keys.
Operations: 4·D for each kept (row, key), whatever the rule; what a tile sees, :mod:`frames_plan`
says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Forward
from vstar_kernels.attention.triton import configs, frames_plan, frames_slots, plan
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.attention.triton.frames_plan import FramesKey
from vstar_kernels.attention.triton.frames_slots import TileTables
from vstar_kernels.attention.triton.plan import Launch
from vstar_kernels.attention.triton.primitives import (
    LOG2E,
    add_weighted_sums,
    inner_products,
    load_heads,
    store_heads,
    times,
    zero_heads,
)

if TYPE_CHECKING:
    from vstar_kernels.attention.frames.call import FrameCall


class Tensors(NamedTuple):
    """What the kernel reads and writes, and of each whether it does."""

    q: Any  # (batch, tokens, heads, head_dim), like out
    k: Any  # (batch, keys, key heads, head_dim), like v
    v: Any
    out: Any
    key_lengths: Any  # (batch,)
    stat: Any  # (batch, tokens, heads)
    delta: Any  # ([heads,] frames, key frames), like offset
    offset: Any  # in units of log 2
    factor: Any  # (2, [heads,] frames, key frames)
    span: Any  # (2, frames, key frames), like band
    band: Any
    row_frame: Any  # (tokens,), −1: text; like row_place and row_order, in the tiles' order
    row_place: Any  # within its frame
    row_order: Any  # the token that a row is
    key_order: Any  # (keys,): the key at each place of the ranges
    tiles: Any  # ([heads,] tiles, 2): first slot and end
    slots: Any  # (…, 3): a frame of it, or −1, text; first range and end
    ranges: Any  # (…, 4): first key and end; place in its frame − key; frame that it ends, or −1
    entries: Any  # (tiles, 2): first entry of the map and end
    entry_frame: Any  # (entries,): the query frame of each
    part: Any  # (programs, slots, ROWS, width): scratch, like all to frame_lse
    part_size: Any  # (programs, slots, ROWS): what a row's part was divided by
    part_lse: Any  # (programs, slots, ROWS), to base 2, like all that follow
    frame_lse: Any  # (programs, key frames + 1, ROWS)
    lse: Any  # (batch, heads, tokens), like all to stat_lse
    row_stat: Any  # before it is clamped
    stat_frame: Any  # the frame that frame_max comes from
    stat_lse: Any  # its log-sum-exp
    mass: Any  # (batch, heads, entries, key frames + 1), zero where no slot is


class Weights(NamedTuple):
    """What the tables say of a slot, each one number for each row, ``(ROWS,)``; or 0, unread."""

    positive: Any  # the factor of logits above zero
    negative: Any
    span_low: Any
    span_high: Any
    band_low: Any
    band_high: Any


INTEGERS = [
    "tasks", "tiles", "head_tiles", "tokens", "keys", "heads", "key_group", "key_frames", "pairs",
    "head_rule", "factor_half", "slots", "entries",
]  # fmt: skip
STRIDES = [
    f"{tensor}_{dimension}"
    for tensor in ("q", "k", "v", "out", "stat")
    for dimension in ("batch", "token", "head")
]


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def frames_kernel(
    t, tasks, tiles, head_tiles, tokens, keys, heads, key_group, key_frames, pairs, head_rule,
    factor_half, slots, entries,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, stat_batch, stat_token, stat_head, exp2_scale,
    HEAD: tl.constexpr, RULE: tl.constexpr, SPLIT: tl.constexpr, MAP: tl.constexpr,
    SAVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of ``ROWS`` rows of one head against the keys they see, ``KEYS`` at a time.

    A program takes every so-manieth of the ``tasks``, tiles · heads · batch. Strides are in units
    of ``HEAD.UNIT`` elements but those of ``stat``.
    """
    WIDTH: tl.constexpr = HEAD.MAIN + HEAD.REST
    BY_FRAME: tl.constexpr = MAP or RULE.STAT == "frame_max"  # frames' sums are wanted
    r = tl.arange(0, ROWS)
    i_program = tl.program_id(0).to(tl.int64)
    p_part_lse = t.part_lse
    p_frame_lse = t.frame_lse
    if SPLIT:
        p_part = t.part + i_program * slots * ROWS * WIDTH
        p_part_size = t.part_size
        if p_part_size is not None:
            p_part_size += i_program * slots * ROWS
        p_part_lse += i_program * slots * ROWS
    if MAP:
        p_frame_lse += i_program * (key_frames + 1) * ROWS

    for i_task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), num_stages=1):
        i_tile = i_task % tiles
        i_sequence = i_task // tiles
        i_batch = (i_sequence // heads).to(HEAD.OFFSET)
        i_head = (i_sequence % heads).to(HEAD.OFFSET)
        i_key_head = i_head // key_group
        rows = i_tile * ROWS + r
        m_i = rows < tokens
        i = rows
        if RULE.ORDERED:
            i = tl.load(t.row_order + rows, mask=m_i, other=0)
        i = i.to(HEAD.OFFSET)
        p_q = t.q + (i_batch * q_batch + i_head * q_head) * HEAD.UNIT
        p_k = t.k + (i_batch * k_batch + i_key_head * k_head) * HEAD.UNIT
        p_v = t.v + (i_batch * v_batch + i_key_head * v_head) * HEAD.UNIT
        b_q = load_heads(p_q, i * q_token * HEAD.UNIT, m_i, HEAD)  # (ROWS, D)
        length = key_length(t.key_lengths, i_batch, keys, RULE)
        b_frame = tl.load(t.row_frame + rows, mask=m_i, other=-1)  # (ROWS,), like all of rows
        b_place = b_frame
        if RULE.BAND or RULE.SPAN:
            b_place = tl.load(t.row_place + rows, mask=m_i, other=0)
        o_pair = b_frame * key_frames
        o_rule = o_pair + i_head.to(tl.int32) * head_rule
        p_tile = t.tiles + (i_head.to(tl.int32) * head_tiles + i_tile) * 2
        first_slot = tl.load(p_tile)
        end_slot = tl.load(p_tile + 1)

        b_stat = tl.full((ROWS,), float("-inf"), tl.float32)
        b_stat_lse = b_stat
        b_stat_frame = tl.full((ROWS,), -1, tl.int32)
        if RULE.STAT == "none":
            b_stat = tl.full((ROWS,), LOG2E, tl.float32)
        elif RULE.STAT == "tensor":
            o_stat = i_batch * stat_batch + i_head * stat_head + i * stat_token
            b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * LOG2E

        b_max = tl.full((ROWS,), float("-inf"), tl.float32)
        b_total = tl.zeros((ROWS,), tl.float32)
        b_o = zero_heads(ROWS, HEAD)
        for i_slot in tl.range(first_slot, end_slot, num_stages=1):
            i_frame = tl.load(t.slots + i_slot * 3)
            m_rule = (b_frame >= 0) & (i_frame >= 0)
            weights = read_weights(t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE)
            b_bias = tl.zeros((ROWS,), tl.float32)
            if SPLIT:
                b_max = tl.full((ROWS,), float("-inf"), tl.float32)
                b_total = tl.zeros((ROWS,), tl.float32)
                b_o = zero_heads(ROWS, HEAD)
                m_seen = m_rule  # by the statistic
                if RULE.OFFSET:
                    b_offset = tl.load(t.offset + o_rule + i_frame, mask=m_rule, other=0.0)
                    m_seen = m_seen & (b_offset > float("-inf"))
            else:
                b_bias = slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
            b_frame_total = tl.zeros((ROWS,), tl.float32)
            b_count = tl.zeros((ROWS,), tl.float32)

            for i_range in tl.range(
                tl.load(t.slots + i_slot * 3 + 1), tl.load(t.slots + i_slot * 3 + 2), num_stages=1
            ):
                start, end, shift = read_range(t.ranges, i_range, length, RULE)
                ends = tl.load(t.ranges + i_range * 4 + 3)
                for n in tl.range(start, end, KEYS, num_stages=STAGES):
                    o_j = n + tl.arange(0, KEYS)
                    j, m_j = find_keys(t.key_order, o_j, end, length, RULE)
                    b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_token * HEAD.UNIT, m_j, HEAD)
                    if STAGES == 1:  # so that one wait is for both; else loads run ahead anyway
                        b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_token * HEAD.UNIT, m_j, HEAD)
                    b_s, _, m_s = frame_logits(
                        b_q, b_k, m_j, o_j + shift, b_place, weights, HEAD, RULE
                    )  # (ROWS, KEYS)
                    if RULE.STAT == "frame_max":
                        if RULE.BAND:
                            b_count += tl.sum(m_s.to(tl.float32), 1)
                        else:
                            b_count += tl.sum(m_j.to(tl.float32), 0)
                    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * exp2_scale + b_bias)
                    m_none = b_new_max == float("-inf")  # nothing is seen so far
                    b_shrink = tl.exp2(b_max - tl.where(m_none, 0.0, b_new_max))
                    b_shift = tl.where(m_none, float("inf"), b_new_max - b_bias)
                    b_p = tl.exp2(b_s * exp2_scale - tl.expand_dims(b_shift, 1))  # (ROWS, KEYS)
                    b_sum = tl.sum(b_p, 1)
                    b_total = b_total * b_shrink + b_sum
                    if BY_FRAME:
                        b_frame_total = b_frame_total * b_shrink + b_sum
                    if STAGES > 1:
                        b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_token * HEAD.UNIT, m_j, HEAD)
                    b_o = times(b_o, tl.expand_dims(b_shrink, 1))
                    b_o = add_weighted_sums(b_o, b_p.to(b_v[0].dtype), b_v, HEAD)  # (ROWS, D)
                    b_max = b_new_max
                if BY_FRAME:
                    if ends >= 0:
                        b_frame_lse = b_max + tl.log2(b_frame_total)
                        b_frame_lse = tl.where(b_frame_total == 0.0, float("-inf"), b_frame_lse)
                        if RULE.STAT == "frame_max":
                            b_mean = b_frame_lse - tl.log2(tl.maximum(b_count, 1.0))
                            m_first = (b_mean == b_stat) & (ends < b_stat_frame)
                            m_higher = m_seen & (b_count > 0) & ((b_mean > b_stat) | m_first)
                            b_stat = tl.where(m_higher, b_mean, b_stat)
                            b_stat_frame = tl.where(m_higher, ends, b_stat_frame)
                            b_stat_lse = tl.where(m_higher, b_frame_lse, b_stat_lse)
                        if MAP:
                            tl.store(p_frame_lse + ends * ROWS + r, b_frame_lse)
                        b_frame_total = tl.zeros((ROWS,), tl.float32)
                        b_count = tl.zeros((ROWS,), tl.float32)

            if SPLIT:
                o_slot = (i_slot - first_slot) * ROWS + r
                if RULE.STAT == "row_max":
                    b_stat = tl.where(m_seen, tl.maximum(b_stat, b_max), b_stat)
                b_part_lse = tl.where(b_total == 0.0, float("-inf"), b_max + tl.log2(b_total))
                b_part = times(b_o, tl.expand_dims(inverse(b_total), 1))
                if p_part_size is not None:
                    b_size = size(b_part, HEAD)
                    b_part = times(b_part, tl.expand_dims(1.0 / b_size, 1))
                    tl.store(p_part_size + o_slot, b_size)
                tl.store(p_part_lse + o_slot, b_part_lse)
                m_row = tl.full((ROWS,), True, tl.int1)
                store_heads(p_part, o_slot.to(tl.int64) * WIDTH, m_row, b_part, HEAD)

        if SPLIT or MAP:
            tl.debug_barrier()  # what follows reads what other threads stored
        if SPLIT:
            b_stat = tl.where(b_stat == float("-inf"), 0.0, b_stat)  # no key of any frame is seen
            b_max = tl.full((ROWS,), float("-inf"), tl.float32)
            for i_slot in tl.range(first_slot, end_slot, num_stages=1):
                i_frame = tl.load(t.slots + i_slot * 3)
                m_rule = (b_frame >= 0) & (i_frame >= 0)
                b_bias = slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
                b_part_lse = tl.load(p_part_lse + (i_slot - first_slot) * ROWS + r)
                b_max = tl.maximum(b_max, b_part_lse + b_bias)
            b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
            b_total = tl.zeros((ROWS,), tl.float32)
            b_o = zero_heads(ROWS, HEAD)
            for i_slot in tl.range(first_slot, end_slot, num_stages=1):
                i_frame = tl.load(t.slots + i_slot * 3)
                m_rule = (b_frame >= 0) & (i_frame >= 0)
                b_bias = slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
                o_slot = (i_slot - first_slot) * ROWS + r
                b_weight = tl.exp2(tl.load(p_part_lse + o_slot) + b_bias - b_max)
                b_total += b_weight
                if p_part_size is not None:
                    b_weight *= tl.load(p_part_size + o_slot)
                m_row = tl.full((ROWS,), True, tl.int1)
                b_part = load_heads(p_part, o_slot.to(tl.int64) * WIDTH, m_row, HEAD)  # (ROWS, D)
                b_o = (
                    b_o[0] + tl.expand_dims(b_weight, 1) * b_part[0].to(tl.float32),
                    b_o[1] + tl.expand_dims(b_weight, 1) * b_part[1].to(tl.float32),
                )

        p_out = t.out + (i_batch * out_batch + i_head * out_head) * HEAD.UNIT
        b_out = times(b_o, tl.expand_dims(inverse(b_total), 1))
        store_heads(p_out, i * out_token * HEAD.UNIT, m_i, b_out, HEAD)
        b_lse = tl.where(b_total == 0.0, float("-inf"), b_max + tl.log2(b_total))
        if SAVE:
            o_row = i_sequence.to(tl.int64) * tokens + i
            tl.store(t.lse + o_row, b_lse, mask=m_i)
            if SPLIT:
                tl.store(t.row_stat + o_row, b_stat, mask=m_i)
            if RULE.STAT == "frame_max":
                tl.store(t.stat_frame + o_row, b_stat_frame, mask=m_i)
                tl.store(t.stat_lse + o_row, b_stat_lse, mask=m_i)
        if MAP:
            first_entry = tl.load(t.entries + i_tile * 2)
            end_entry = tl.load(t.entries + i_tile * 2 + 1)
            p_mass = t.mass + i_sequence.to(tl.int64) * entries * (key_frames + 1)
            b_minus = tl.where(b_lse == float("-inf"), float("-inf"), -b_lse)
            for i_slot in tl.range(first_slot, end_slot, num_stages=1):
                i_frame = tl.load(t.slots + i_slot * 3)
                b_bias = b_minus
                if SPLIT:
                    m_rule = (b_frame >= 0) & (i_frame >= 0)
                    b_bias += slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
                for i_range in tl.range(
                    tl.load(t.slots + i_slot * 3 + 1),
                    tl.load(t.slots + i_slot * 3 + 2),
                    num_stages=1,
                ):
                    ends = tl.load(t.ranges + i_range * 4 + 3)
                    if ends >= 0:
                        b_mass = tl.exp2(tl.load(p_frame_lse + ends * ROWS + r) + b_bias)
                        for i_entry in tl.range(first_entry, end_entry, num_stages=1):
                            m_entry = b_frame == tl.load(t.entry_frame + i_entry)
                            mass = tl.sum(tl.where(m_entry, b_mass, 0.0), 0)
                            o_mass = i_entry * (key_frames.to(tl.int64) + 1) + ends
                            tl.store(p_mass + o_mass, mass)
        if SPLIT or MAP:
            tl.debug_barrier()  # the next task stores where other threads still read


@triton.jit
def key_length(p_key_lengths, i_batch, keys, RULE: tl.constexpr):
    """Returns how many keys a batch element has."""
    length = keys
    if RULE.LENGTHS:
        length = tl.load(p_key_lengths + i_batch)  # below 0 as 0; ranges end at the last key anyhow
    return length


@triton.jit
def read_range(p_ranges, i_range, length, RULE: tl.constexpr):
    """Returns the first and the end of a range of keys, and what is added for places in frames."""
    p = p_ranges + i_range * 4
    end = tl.load(p + 1)
    if RULE.LENGTHS and not RULE.ORDERED:
        end = tl.minimum(end, length)
    return tl.load(p), end, tl.load(p + 2)


@triton.jit
def find_keys(p_key_order, o_j, end, length, RULE: tl.constexpr):
    """Returns the keys at places ``o_j`` of a range, ``(KEYS,)``, and which of them there are."""
    m_j = o_j < end
    j = o_j
    if RULE.ORDERED:
        j = tl.load(p_key_order + o_j, mask=m_j, other=-1)
        if RULE.LENGTHS:
            m_j = m_j & (j < length)
    return j, m_j


@triton.jit
def read_weights(t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE: tl.constexpr):
    """Returns what the tables say of the rows' frames and the key frame, but the bias."""
    positive = 0.0
    negative = 0.0
    span_low = 0
    span_high = 0
    band_low = 0
    band_high = 0
    if RULE.FACTOR:
        p = t.factor + o_rule + i_frame
        positive = tl.load(p, mask=m_rule, other=1.0)
        negative = tl.load(p + factor_half, mask=m_rule, other=1.0)
    if RULE.SPAN:
        p = t.span + o_pair + i_frame
        span_low = tl.load(p, mask=m_rule, other=-0x7FFFFFFF)
        span_high = tl.load(p + pairs, mask=m_rule, other=0x7FFFFFFF)
    if RULE.BAND:
        p = t.band + o_pair + i_frame
        band_low = tl.load(p, mask=m_rule, other=-0x7FFFFFFF)
        band_high = tl.load(p + pairs, mask=m_rule, other=0x7FFFFFFF)
    return Weights(positive, negative, span_low, span_high, band_low, band_high)


@triton.jit
def slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE: tl.constexpr):
    """Returns what is added to a slot's logits, to base 2, one number for each row."""
    b_bias = tl.zeros(b_stat.shape, tl.float32)
    if RULE.DELTA:
        if RULE.CLAMP:
            b_stat = tl.maximum(b_stat, 0.0)
        b_bias += b_stat * tl.load(t.delta + o_rule + i_frame, mask=m_rule, other=0.0)
    if RULE.OFFSET:
        b_bias += tl.load(t.offset + o_rule + i_frame, mask=m_rule, other=0.0)
    return b_bias


@triton.jit
def frame_logits(b_q, b_k, m_j, j_place, b_place, weights, HEAD: tl.constexpr, RULE: tl.constexpr):
    """Returns a·φ / |scale|, −∞ where a key is not seen, the factor a, and which keys are.

    All are ``(ROWS, KEYS)``, and the factor only where there is one.
    """
    b_s = inner_products(b_q, b_k, HEAD)
    if HEAD.NEGATIVE:
        b_s = -b_s
    b_distance = tl.expand_dims(j_place, 0) - tl.expand_dims(b_place, 1)
    b_a = b_s
    if RULE.FACTOR:
        b_positive = tl.expand_dims(weights.positive, 1)
        b_a = tl.where(b_s > 0.0, b_positive, tl.expand_dims(weights.negative, 1))
        if RULE.SPAN:
            m_span = b_distance >= tl.expand_dims(weights.span_low, 1)
            m_span = m_span & (b_distance <= tl.expand_dims(weights.span_high, 1))
            b_a = tl.where(m_span, b_a, 1.0)
        b_s *= b_a
    m_s = tl.expand_dims(m_j, 0)
    if RULE.BAND:
        m_s = m_s & (b_distance >= tl.expand_dims(weights.band_low, 1))
        m_s = m_s & (b_distance <= tl.expand_dims(weights.band_high, 1))
    m_s = tl.broadcast_to(m_s, b_s.shape)
    return tl.where(m_s, b_s, float("-inf")), b_a, m_s


@triton.jit
def inverse(b_total):
    """Returns 1 / total, and 0 where the total is 0."""
    return tl.where(b_total == 0.0, 0.0, 1.0 / tl.where(b_total == 0.0, 1.0, b_total))


@triton.jit
def size(b, HEAD: tl.constexpr):
    """Returns powers of two near the largest number of each head, ``(I,)``; 1 where all are 0."""
    b_size = tl.max(tl.abs(b[0]), 1)
    if HEAD.REST:
        b_size = tl.maximum(b_size, tl.max(tl.abs(b[1]), 1))
    return tl.where(b_size == 0.0, 1.0, tl.exp2(tl.floor(tl.log2(tl.maximum(b_size, 1e-30)))))


@triton.jit(do_not_specialize=["summed_heads", "entries", "frames", "columns"])
def map_kernel(
    p_mass, p_first, p_entry, p_weight, p_map, summed_heads, entries, frames, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of the frame map: sums a query frame's entries over ``summed_heads`` heads."""
    i_frame = tl.program_id(0) % frames
    i_map = (tl.program_id(0) // frames).to(tl.int64)  # (batch, heads / summed_heads)
    first = tl.load(p_first + i_frame)
    end = tl.load(p_first + i_frame + 1)
    weight = tl.load(p_weight + i_frame)
    for start in tl.range(0, columns, COLUMNS, num_stages=1):
        o_column = start + tl.arange(0, COLUMNS)
        b_sum = tl.zeros((COLUMNS,), tl.float32)
        for n in tl.range(i_map * summed_heads, (i_map + 1) * summed_heads, num_stages=1):
            for i in tl.range(first, end, num_stages=1):
                o_mass = (n * entries + tl.load(p_entry + i)) * columns + o_column
                b_sum += tl.load(p_mass + o_mass, mask=o_column < columns, other=0.0)
        o_map = (i_map * frames + i_frame) * columns + o_column
        tl.store(p_map + o_map, b_sum * weight, mask=o_column < columns)


@dataclass(frozen=True)
class MapPlan:
    """The map's sums over entries and heads: one launch, after the masses are there."""

    programs: int
    arguments: tuple[int, ...]
    tables: tuple[Tensor, ...]
    columns: int

    def __call__(self, mass: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the map."""
        found = plan.new(mass, *shape)
        block = min(128, triton.next_power_of_2(self.columns))
        map_kernel[(self.programs,)](
            mass, *self.tables, found, *self.arguments, self.columns, COLUMNS=block, num_warps=1
        )
        return found


@dataclass(frozen=True)
class FramesPlan:
    """One launch, with its tables on the device, and one more for the map."""

    launch: Launch
    tables: dict[str, Tensor]
    scratch: dict[str, tuple[int, ...]]
    saved: tuple[str, ...]  # the names of what is saved for backward
    mass: tuple[int, ...]  # the shape, where a map is wanted
    map: MapPlan | None

    def run(self, call: FrameCall, out: Tensor) -> Forward:
        """Fills ``out``; returns it with the map and what backward needs, where they are wanted."""
        rows = (call.batch, call.heads, call.tokens)
        saved = {
            name: plan.new(out, *rows, dtype=torch.int32 if name == "stat_frame" else torch.float32)
            for name in self.saved
        }
        mass = torch.zeros(self.mass, dtype=torch.float32, device=out.device) if self.map else None
        scratch = {
            name: plan.new(
                out, *shape, dtype=part_type(call.dtype) if name == "part" else torch.float32
            )
            for name, shape in self.scratch.items()
        }
        self.launch.on(
            q=call.query,
            k=call.key,
            v=call.value,
            out=out,
            key_lengths=call.key_lengths,
            stat=call.stat,
            mass=mass,
            **self.tables,
            **scratch,
            **saved,
        )
        found = self.map(mass, call.map_shape) if self.map and mass is not None else None
        return Forward(out, found, tuple(saved.values()))


def part_type(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the partial outputs of a call of this type."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def make_plan(key: FramesKey, device: torch.device) -> FramesPlan:
    """Returns the plan of a call, with its tables on the device."""
    table = key.table("forward", key.rule_tables())
    config = configs.frames(key.device.architecture, key.kind, key.head_dim, table)
    made = plan_frames(key, config)
    tables = {name: x.to(device) for name, x in made.tables.items()}
    found = made.map
    if found is not None:
        found = replace(found, tables=tuple(x.to(device) for x in found.tables))
    return replace(made, tables=tables, map=found)


def plan_frames(key: FramesKey, config: FramesConfig) -> FramesPlan:
    """Returns the plan with a configuration, which need not be the one in the table."""
    rule = key.rule_tables()
    stat = key.statistic(rule)
    split = stat in ("row_max", "frame_max")
    by_frame = key.has_map or stat == "frame_max"
    made = frames_slots.tile_tables(
        key.tables.query_runs.tensor().tolist(),
        key.tables.key_runs.tensor().tolist(),
        rule,
        rows=config.rows,
        ordered=key.ordered,
        by_frame=by_frame,
    )
    head = key.head()
    tiles = made.tiles.shape[1]
    tasks = key.batch * key.heads * tiles
    programs = min(tasks, key.device.processors * config.programs)
    entries = made.entry_frame.numel()
    tables = frames_plan.named_tables(rule, made)
    if key.has_map:
        tables |= {"entries": made.entries, "entry_frame": made.entry_frame}
    scratch: dict[str, tuple[int, ...]] = {}
    if split:
        rows = (programs, made.most_slots, config.rows)
        scratch = {"part": (*rows, head.MAIN + head.REST), "part_lse": rows}
        if key.dtype != torch.float32:
            scratch["part_size"] = rows
    if key.has_map:
        scratch["frame_lse"] = (programs, key.key_frames + 1, config.rows)
    saved = frames_plan.saved(stat) if key.save else ()
    named = {"q", "k", "v", "out", *tables, *scratch, *saved}
    named |= {"key_lengths"} if key.lengths else set()
    named |= {"stat"} if stat == "tensor" else set()
    named |= {"mass"} if key.has_map else set()
    pairs = key.frames * key.key_frames
    launch = Launch(
        frames_kernel,
        programs,
        Tensors(*(name in named for name in Tensors._fields)),
        (
            tasks,
            tiles,
            tiles if rule.heads > 1 else 0,
            key.tokens,
            key.keys,
            key.heads,
            key.heads // key.key_heads,
            key.key_frames,
            pairs,
            pairs if rule.per_head else 0,
            pairs * rule.heads,
            made.most_slots,
            entries,
            *key.in_units(key.query),
            *key.in_units(key.key),
            *key.in_units(key.value),
            *key.in_units(key.out),
            *(key.stat or (0, 0, 0)),
            max(abs(key.options.scale), frames_plan.SMALLEST_SCALE) * plan.LOG2E,
        ),
        {
            "HEAD": head,
            "RULE": frames_plan.constants(key, rule, made),
            "SPLIT": split,
            "MAP": key.has_map,
            "SAVE": key.save,
            "ROWS": config.rows,
            "KEYS": config.keys,
            "STAGES": config.stages,
            "num_warps": config.warps,
        },
    )
    mass = (key.batch, key.heads, entries, key.key_frames + 1) if key.has_map else ()
    return FramesPlan(launch, tables, scratch, saved, mass, _plan_map(key, made))


def _plan_map(key: FramesKey, made: TileTables) -> MapPlan | None:
    """Returns the launch that sums the map, if one is wanted."""
    if not key.has_map:
        return None
    summed = key.heads if key.options.mean_map == "mean" else 1
    return MapPlan(
        key.batch * key.heads // summed * key.frames,
        (summed, made.entry_frame.numel(), key.frames),
        (made.frame_first, made.frame_entries, frames_plan.frame_weights(key)),
        key.key_frames + 1,
    )
