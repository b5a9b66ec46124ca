"""Attention over frames of tokens: softmax split by key frame.

A rule's bias is constant in a (row, key frame) block, so a tile of rows sees the keys in *slots*:
key frames that have equal weights in every row of the tile. Where the bias waits for a statistic r
of the row's own logits, there are two ways, and the plan chooses the cheaper:

- *split*, one pass over the keys. Each slot is a softmax of its own, without the bias::

      slot c       online softmax over its keys: output o_c, log-sum-exp lse_c; the statistic
                   is gathered on the way, over the slots (row_max) or their frames (frame_max)
      all slots    out = sum of w_c o_c / sum of w_c,  w_c = exp(lse_c + r delta_c + offset_c)

  The partial outputs stay in scratch memory of the program, in 16 bits where the inputs are, scaled
  row by row to the size of what they hold: 2·D numbers written and read for each row and slot.
- *revisit*, for short frames, whose partial outputs weigh more than their products::

      slots with a bias     their part in the statistic alone: no values; of row_max no exponentials
      the others, text      one online softmax, which has the rest of the statistic
      slots with a bias     again, into the same softmax; the statistic is known now

  That is QKᵀ once more over the keys with a bias: 2·D operations for each of them and row.

Where r is known beforehand (no statistic, a tensor of the caller's) the slots share one online
softmax, and the bias is one constant of each row and slot. Key frames that no row of a tile sees
have no slot: time follows the kept keys. Operations, revisits apart: 4·D for each kept (row, key);
what a tile sees, :mod:`frames_slots` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Forward
from vstar_kernels.attention.triton import (
    configs,
    descriptors,
    frames_map,
    frames_plan,
    frames_slots,
    plan,
)
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.attention.triton.descriptors import load_described
from vstar_kernels.attention.triton.devices import DeviceTables
from vstar_kernels.attention.triton.frames_map import MapPlan
from vstar_kernels.attention.triton.frames_plan import FramesKey, Rule
from vstar_kernels.attention.triton.frames_primitives import (
    count_keys,
    find_keys,
    frame_logits,
    key_length,
    read_range,
    read_weights,
    slot_bias,
    unit,
)
from vstar_kernels.attention.triton.frames_slots import RuleTables, TileTables
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.log_sums import capped_exp2, log_sum
from vstar_kernels.attention.triton.primitives import (
    Place,
    add_weighted_sums,
    exponentials,
    larger,
    load_heads,
    store_heads,
    subtrahend,
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
    offset: Any  # in units of the product qᵀk, as all logits and what is added to them
    factor: Any  # (2, [heads,] frames, key frames)
    span: Any  # (2, frames, key frames), like band
    band: Any
    row_frame: Any  # (tokens,), −1: text; like row_place and row_order, in the tiles' order
    row_place: Any  # within its frame
    row_order: Any  # the token that a row is
    key_order: Any  # (keys,): the key at each place of the ranges
    tiles: Any  # ([heads,] tiles, 2): first slot and end
    biased: Any  # ([heads,] tiles): the end of the slots that have a bias, which are first
    slots: Any  # (…, 3): a frame of it, or −1, text; first range and end
    ranges: Any  # (…, 4): first key and end; place in its frame − key; frame that it ends, or −1
    entries: Any  # (tiles, 2): first entry of the map and end
    entry_frame: Any  # (entries,): the query frame of each
    part: Any  # (programs, slots, ROWS, width): scratch, like all to frame_lse
    part_size: Any  # (programs, slots, ROWS): what a row's part was divided by
    part_lse: Any  # (programs, slots, ROWS)
    frame_lse: Any  # (programs, key frames + 1, ROWS)
    lse: Any  # (batch, heads, tokens), like all to stat_lse
    row_stat: Any  # before it is clamped
    stat_frame: Any  # the frame that frame_max comes from
    stat_lse: Any  # its log-sum-exp
    mass: Any  # (batch, heads, entries, key frames + 1), zero where no slot is


class Rows(NamedTuple):
    """A tile's rows, and where the tables have what concerns their frames; each ``(ROWS,)``."""

    q: Any  # (ROWS, D)
    frame: Any
    place: Any
    pair: Any  # in tables of pairs of frames
    rule: Any  # in those that heads may have of their own


class Tokens(NamedTuple):
    """Where the keys of a head are, or their values."""

    p: Any  # of the first
    stride: Any
    main: Any  # descriptor of the heads' main part, or None: by pointers
    rest: Any


class Keys(NamedTuple):
    """The keys of a head and their values, and how many there are."""

    k: Any  # Tokens, like v
    v: Any
    place: Any  # of the head, in descriptors
    length: Any


class Softmax(NamedTuple):
    """An online softmax (Milakov and Gimelshein, 2018)."""

    max: Any  # (ROWS,): of the logits with their bias
    total: Any  # (ROWS,): the sum of exponentials
    o: Any  # (ROWS, D): that of values


class Statistic(NamedTuple):
    """The rows' statistics so far; each ``(ROWS,)``."""

    value: Any
    frame: Any  # of frame_max: where it is from
    lse: Any


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
    t, k_main, k_rest, v_main, v_rest, tasks, tiles, head_tiles, tokens, keys, heads, key_group,
    key_frames, pairs, head_rule, factor_half, slots, entries,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, stat_batch, stat_token, stat_head, exp2_scale,
    HEAD: tl.constexpr, RULE: tl.constexpr, WAY: tl.constexpr, MAP: tl.constexpr,
    SAVE: tl.constexpr, BRANCH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of ``ROWS`` rows of one head against the keys they see, ``KEYS`` at a time.

    A program takes every so-manieth of the ``tasks``, tiles · heads · batch. ``WAY`` is "split",
    "revisit" or, where no bias waits for a statistic, "known". ``k_main`` … are descriptors of the
    keys' parts and the values', or None. Strides are in units of ``HEAD.UNIT`` elements but those
    of ``stat``.
    """
    WIDTH: tl.constexpr = HEAD.MAIN + HEAD.REST
    SPLIT: tl.constexpr = WAY == "split"
    REVISIT: tl.constexpr = WAY == "revisit"
    BIASED: tl.constexpr = (RULE.DELTA or RULE.OFFSET) and not SPLIT
    r = tl.arange(0, ROWS)
    i_program = tl.program_id(0).to(tl.int64)
    p_part = t.part
    p_part_size = t.part_size
    p_part_lse = t.part_lse
    p_frame_lse = t.frame_lse
    if SPLIT:
        p_part += i_program * slots * ROWS * WIDTH
        if p_part_size is not None:
            p_part_size += i_program * slots * ROWS
        p_part_lse += i_program * slots * ROWS
    if MAP:
        p_frame_lse += i_program * (key_frames + 1) * ROWS

    # What tasks have in common would be moved out of their loop, where the larger blocks that come
    # by descriptors have no registers to keep it.
    for i_task in tl.range(
        tl.program_id(0), tasks, tl.num_programs(0), num_stages=1, disable_licm=k_main is not None
    ):
        i_tile = i_task % tiles
        i_sequence = i_task // tiles
        i_batch = (i_sequence // heads).to(HEAD.OFFSET)
        i_head = (i_sequence % heads).to(HEAD.OFFSET)
        i_key_head = i_head // key_group
        place = Place(i_sequence // heads, 0, i_sequence % heads // key_group)
        i_row = i_tile * ROWS + r
        m_i = i_row < tokens
        i = i_row
        if RULE.ORDERED:
            i = tl.load(t.row_order + i_row, mask=m_i, other=0)
        i = i.to(HEAD.OFFSET)
        p_q = t.q + (i_batch * q_batch + i_head * q_head) * HEAD.UNIT
        p_k = t.k + (i_batch * k_batch + i_key_head * k_head) * HEAD.UNIT
        p_v = t.v + (i_batch * v_batch + i_key_head * v_head) * HEAD.UNIT
        b_q = load_heads(p_q, i * q_token * HEAD.UNIT, m_i, HEAD)  # (ROWS, D)
        of_keys = Keys(
            Tokens(p_k, k_token, k_main, k_rest),
            Tokens(p_v, v_token, v_main, v_rest),
            place,
            key_length(t.key_lengths, i_batch, keys, RULE),
        )
        b_frame = tl.load(t.row_frame + i_row, mask=m_i, other=-1)  # (ROWS,), like all of rows
        b_place = b_frame
        if RULE.BAND or RULE.SPAN:
            b_place = tl.load(t.row_place + i_row, mask=m_i, other=0)
        o_pair = b_frame * key_frames
        o_rule = o_pair + i_head.to(tl.int32) * head_rule
        rows = Rows(b_q, b_frame, b_place, o_pair, o_rule)
        o_tile = i_head.to(tl.int32) * head_tiles + i_tile
        first_slot = tl.load(t.tiles + o_tile * 2)
        end_slot = tl.load(t.tiles + o_tile * 2 + 1)

        b_stat = tl.full((ROWS,), float("-inf"), tl.float32)
        if RULE.STAT == "tensor":
            o_stat = i_batch * stat_batch + i_head * stat_head + i * stat_token
            b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * unit(exp2_scale)
        b_lowest = tl.full((ROWS,), float("-inf"), tl.float32)
        b_zero = tl.zeros((ROWS,), tl.float32)
        statistic = Statistic(b_stat, tl.full((ROWS,), -1, tl.int32), b_lowest)

        first_once = first_slot
        if REVISIT:
            first_once = tl.load(t.biased + o_tile)
            for i_slot in tl.range(first_slot, first_once, num_stages=1):
                _, statistic = add_slot(
                    t, i_slot, rows, of_keys, None, Softmax(b_lowest, b_zero, b_zero), statistic,
                    True, p_frame_lse, pairs, factor_half, exp2_scale, HEAD, RULE,
                    VALUES=False, GATHER=True, MAP=False, BRANCH=BRANCH, KEYS=KEYS, STAGES=STAGES,
                )  # fmt: skip
        softmax = Softmax(b_lowest, b_zero, zero_heads(ROWS, HEAD))
        for n in tl.range(first_once, first_once + (end_slot - first_slot), num_stages=1):
            i_slot = n
            if REVISIT:  # those without a bias, and then the others again
                i_slot = tl.where(n < end_slot, n, n - (end_slot - first_slot))
            b_bias = None
            if SPLIT:
                softmax = Softmax(b_lowest, b_zero, zero_heads(ROWS, HEAD))
            elif BIASED:
                b_so_far = or_zero(statistic.value) if REVISIT else statistic.value
                b_bias = rows_bias(t, rows, i_slot, b_so_far, RULE)
            softmax, statistic = add_slot(
                t, i_slot, rows, of_keys, b_bias, softmax, statistic,
                n < end_slot, p_frame_lse, pairs, factor_half, exp2_scale, HEAD, RULE,
                VALUES=True, GATHER=SPLIT or REVISIT, MAP=MAP, BRANCH=BRANCH, KEYS=KEYS,
                STAGES=STAGES,
            )  # fmt: skip
            if SPLIT:
                o_slot = (i_slot - first_slot) * ROWS + r
                b_part = times(softmax.o, tl.expand_dims(inverse(softmax.total), 1))
                if p_part_size is not None:
                    b_size = size(b_part, HEAD)
                    b_part = times(b_part, tl.expand_dims(1.0 / b_size, 1))
                    tl.store(p_part_size + o_slot, b_size)
                b_lse = seen_log_sum(softmax.max, softmax.total, exp2_scale)
                tl.store(p_part_lse + o_slot, b_lse)
                m_row = tl.full((ROWS,), True, tl.int1)
                store_heads(p_part, o_slot.to(tl.int64) * WIDTH, m_row, b_part, HEAD)

        b_stat = statistic.value
        if SPLIT or REVISIT:
            b_stat = or_zero(b_stat)
        if SPLIT or MAP:
            tl.debug_barrier()  # what follows reads what other threads stored
        if SPLIT:
            softmax = merged(
                t, rows, b_stat, first_slot, end_slot, p_part, p_part_size, p_part_lse, exp2_scale,
                HEAD, RULE,
            )  # fmt: skip

        p_out = t.out + (i_batch * out_batch + i_head * out_head) * HEAD.UNIT
        b_out = times(softmax.o, tl.expand_dims(inverse(softmax.total), 1))
        store_heads(p_out, i * out_token * HEAD.UNIT, m_i, b_out, HEAD)
        b_lse = seen_log_sum(softmax.max, softmax.total, exp2_scale)
        if SAVE:
            o_row = i_sequence.to(tl.int64) * tokens + i
            tl.store(t.lse + o_row, b_lse, mask=m_i)
            if SPLIT or REVISIT:
                tl.store(t.row_stat + o_row, b_stat, mask=m_i)
            if RULE.STAT == "frame_max":
                tl.store(t.stat_frame + o_row, statistic.frame, mask=m_i)
                tl.store(t.stat_lse + o_row, statistic.lse, mask=m_i)
        if MAP:
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
            first_entry = tl.load(t.entries + i_tile * 2)
            end_entry = tl.load(t.entries + i_tile * 2 + 1)
            p_mass = t.mass + i_sequence.to(tl.int64) * entries * (key_frames + 1)
            for i_slot in tl.range(first_slot, end_slot, num_stages=1):
                b_bias = b_zero
                if SPLIT:
                    b_bias = rows_bias(t, rows, i_slot, b_stat, RULE)
                for i_range in tl.range(
                    tl.load(t.slots + i_slot * 3 + 1),
                    tl.load(t.slots + i_slot * 3 + 2),
                    num_stages=1,
                ):
                    ends = tl.load(t.ranges + i_range * 4 + 3)
                    if ends >= 0:
                        b_frame_lse = tl.load(p_frame_lse + ends * ROWS + r) + b_bias
                        b_mass = capped_exp2((b_frame_lse - b_lse) * exp2_scale)
                        for i_entry in tl.range(first_entry, end_entry, num_stages=1):
                            m_entry = b_frame == tl.load(t.entry_frame + i_entry)
                            mass = tl.sum(tl.where(m_entry, b_mass, 0.0), 0)
                            o_mass = i_entry * (key_frames.to(tl.int64) + 1) + ends
                            tl.store(p_mass + o_mass, mass)
        if SPLIT or MAP:
            tl.debug_barrier()  # the next task stores where other threads still read


@triton.jit
def add_slot(
    t, i_slot, rows, of_keys, b_bias, softmax, statistic, is_new, p_frame_lse, pairs, factor_half,
    exp2_scale, HEAD: tl.constexpr, RULE: tl.constexpr, VALUES: tl.constexpr, GATHER: tl.constexpr,
    MAP: tl.constexpr, BRANCH: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds a slot to the softmax with ``VALUES``, and to the statistic if it ``is_new``.

    The bias, None where there is none, is one number for each row, so what is compared is the
    slot's logits without it, and the maximum so far less the bias: a logit's exponential takes a
    difference and a product, which is 0 at the maximum, however large that is.

    With ``BRANCH`` blocks of keys that are full are not masked (:func:`branches_to_mask`).
    ``GATHER`` says that slots may be new. While they are, the softmax must hold nothing with a
    bias, as its maximum is the slots'. ``MAP`` leaves the log-sum-exps of the slot's frames, with
    their bias.
    """
    DESCRIBED: tl.constexpr = of_keys.k.main is not None
    BY_FRAME: tl.constexpr = MAP or (GATHER and RULE.STAT == "frame_max")  # frames' sums are wanted
    ROWS: tl.constexpr = rows.frame.shape[0]
    i_frame = tl.load(t.slots + i_slot * 3)
    m_rule = (rows.frame >= 0) & (i_frame >= 0)
    weights = read_weights(t, rows.rule, rows.pair, i_frame, m_rule, pairs, factor_half, RULE)
    m_seen = m_rule & is_new  # by the statistic
    if GATHER and RULE.OFFSET:
        b_offset = tl.load(t.offset + rows.rule + i_frame, mask=m_rule, other=0.0)
        m_seen = m_seen & (b_offset > float("-inf"))
    b_max = softmax.max
    if b_bias is not None:  # rows that do not see the slot have been beyond it all along
        b_max = tl.where(b_bias == float("-inf"), float("inf"), b_max - b_bias)
    b_before = b_max
    b_total = softmax.total
    b_o = softmax.o
    b_stat = statistic.value
    b_stat_frame = statistic.frame
    b_stat_lse = statistic.lse
    if not VALUES:
        b_max = tl.full((ROWS,), float("-inf"), tl.float32)
    b_frame_total = tl.zeros((ROWS,), tl.float32)
    b_count = tl.zeros((ROWS,), tl.float32)
    for i_range in tl.range(
        tl.load(t.slots + i_slot * 3 + 1), tl.load(t.slots + i_slot * 3 + 2), num_stages=1
    ):
        start, end, shift = read_range(t.ranges, i_range, of_keys.length, RULE)
        ends = tl.load(t.ranges + i_range * 4 + 3)
        for n in tl.range(start, end, KEYS, num_stages=STAGES):
            first = n
            if DESCRIBED:  # the last block is full of keys too, some of which were in others
                first = tl.minimum(n, end - KEYS)
            o_j = first + tl.arange(0, KEYS)
            j, m_j = find_keys(t.key_order, o_j, end, of_keys.length, RULE)
            if DESCRIBED:
                m_j = o_j >= n
            b_k = load_tokens(of_keys.k, of_keys.place, first, j, m_j, HEAD)  # (KEYS, D)
            if VALUES and STAGES == 1:  # so that one wait is for both; else loads run ahead anyway
                b_v = load_tokens(of_keys.v, of_keys.place, first, j, m_j, HEAD)  # (KEYS, D)
            m_logits = None if BRANCH else m_j
            b_s, _ = frame_logits(
                rows.q, b_k, m_logits, o_j + shift, rows.place, weights, HEAD, RULE
            )  # (ROWS, KEYS)
            if BRANCH:
                if end - n < KEYS:
                    b_s = tl.where(tl.expand_dims(m_j, 0), b_s, float("-inf"))
            if GATHER and RULE.STAT == "frame_max":
                b_count += count_keys(m_j, end - n, n + shift, rows.place, weights, RULE)
            b_new_max = larger(b_max, tl.max(b_s, 1))
            if VALUES or BY_FRAME:
                m_same = b_new_max == b_max  # infinite ones too
                b_shrink = tl.where(m_same, 1.0, tl.exp2((b_max - b_new_max) * exp2_scale))
                b_p = exponentials(b_s, subtrahend(b_new_max), exp2_scale)  # (ROWS, KEYS)
                b_sum = tl.sum(b_p, 1)
                if BY_FRAME:
                    b_frame_total = b_frame_total * b_shrink + b_sum
            if VALUES:
                b_total = b_total * b_shrink + b_sum
                if STAGES > 1:
                    b_v = load_tokens(of_keys.v, of_keys.place, first, j, m_j, HEAD)  # (KEYS, D)
                b_o = times(b_o, tl.expand_dims(b_shrink, 1))
                b_o = add_weighted_sums(b_o, b_p.to(b_v[0].dtype), b_v, HEAD)  # (ROWS, D)
            b_max = b_new_max
        if BY_FRAME:
            if ends >= 0:
                b_frame_lse = seen_log_sum(b_max, b_frame_total, exp2_scale)
                if GATHER and RULE.STAT == "frame_max":
                    b_mean = b_frame_lse - tl.log2(tl.maximum(b_count, 1.0)) / exp2_scale
                    m_first = (b_mean == b_stat) & (ends < b_stat_frame)
                    m_higher = m_seen & (b_count > 0) & ((b_mean > b_stat) | m_first)
                    b_stat = tl.where(m_higher, b_mean, b_stat)
                    b_stat_frame = tl.where(m_higher, ends, b_stat_frame)
                    b_stat_lse = tl.where(m_higher, b_frame_lse, b_stat_lse)
                if MAP:
                    if b_bias is not None:
                        b_frame_lse += b_bias
                    p = p_frame_lse + ends * ROWS + tl.arange(0, ROWS)
                    tl.store(p, b_frame_lse)
                b_frame_total = tl.zeros((ROWS,), tl.float32)
                b_count = tl.zeros((ROWS,), tl.float32)
    if GATHER and RULE.STAT == "row_max":
        b_stat = tl.where(m_seen, tl.maximum(b_stat, b_max), b_stat)
    if b_bias is not None:  # the same number as it was, where it is not from this slot
        b_max = tl.where(b_max == b_before, softmax.max, b_max + b_bias)
    return Softmax(b_max, b_total, b_o), Statistic(b_stat, b_stat_frame, b_stat_lse)


@triton.jit
def load_tokens(tokens, place, start, j, m_j, HEAD: tl.constexpr):
    """Loads the heads of keys or values ``j``, ``(KEYS, D)`` in two parts.

    By pointers they are zero where they are masked. Those that come by descriptors are the tokens
    from ``start`` on, zero where there are none.
    """
    if tokens.main is None:
        o_j = j.to(HEAD.OFFSET) * tokens.stride * HEAD.UNIT
        main, rest = load_heads(tokens.p, o_j, m_j, HEAD)
    else:
        main, rest = load_described(tokens.main, tokens.rest, place, start, HEAD, j.shape[0])
    return main, rest


@triton.jit
def rows_bias(t, rows, i_slot, b_stat, RULE: tl.constexpr):
    """Returns what is added to a slot's logits in each row, ``(ROWS,)``."""
    i_frame = tl.load(t.slots + i_slot * 3)
    m_rule = (rows.frame >= 0) & (i_frame >= 0)
    return slot_bias(t, rows.rule, i_frame, m_rule, b_stat, RULE)


@triton.jit
def merged(
    t, rows, b_stat, first_slot, end_slot, p_part, p_part_size, p_part_lse, exp2_scale,
    HEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Returns the softmax over all slots, of their partial outputs."""
    ROWS: tl.constexpr = rows.frame.shape[0]
    r = tl.arange(0, ROWS)
    b_max = tl.full((ROWS,), float("-inf"), tl.float32)
    for i_slot in tl.range(first_slot, end_slot, num_stages=1):
        b_part_lse = tl.load(p_part_lse + (i_slot - first_slot) * ROWS + r)
        b_max = tl.maximum(b_max, b_part_lse + rows_bias(t, rows, i_slot, b_stat, RULE))
    b_max = subtrahend(b_max)
    b_total = tl.zeros((ROWS,), tl.float32)
    b_o = zero_heads(ROWS, HEAD)
    for i_slot in tl.range(first_slot, end_slot, num_stages=1):
        b_bias = rows_bias(t, rows, i_slot, b_stat, RULE)
        o_slot = (i_slot - first_slot) * ROWS + r
        b_weight = tl.exp2((tl.load(p_part_lse + o_slot) + b_bias - b_max) * exp2_scale)
        b_total += b_weight
        if p_part_size is not None:
            b_weight *= tl.load(p_part_size + o_slot)
        m_row = tl.full((ROWS,), True, tl.int1)
        o_part = o_slot.to(tl.int64) * (HEAD.MAIN + HEAD.REST)
        b_part = load_heads(p_part, o_part, m_row, HEAD)  # (ROWS, D)
        b_o = (
            b_o[0] + tl.expand_dims(b_weight, 1) * b_part[0].to(tl.float32),
            b_o[1] + tl.expand_dims(b_weight, 1) * b_part[1].to(tl.float32),
        )
    return Softmax(b_max, b_total, b_o)


@triton.jit
def or_zero(b_stat):
    """Returns rows' statistics, 0 where no key of any frame is seen."""
    return tl.where(b_stat == float("-inf"), 0.0, b_stat)


@triton.jit
def seen_log_sum(b_max, b_total, exp2_scale):
    """Returns the :func:`log_sum` of exponentials, −∞ where nothing is seen."""
    return tl.where(b_total == 0.0, float("-inf"), log_sum(b_max, b_total, exp2_scale))


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


Allocation = tuple[tuple[int, ...], torch.dtype]  # shape and type
DESCRIBED = ("forward", "known")  # tables that have a second for keys that come by descriptors


@dataclass(frozen=True)
class FramesPlan:
    """One launch, and one more for the map."""

    launch: Launch
    filled: dict[str, Allocation]  # what is allocated for the kernel: scratch, and what is saved
    saved: tuple[str, ...]  # of these, what is for backward
    map: MapPlan | None
    # Where the launch takes descriptors: makes the plan for keys and values that are not aligned.
    by_pointers: Callable[[], FramesPlan] | None = None

    def run(self, call: FrameCall, out: Tensor) -> Forward:
        """Fills ``out``; returns it with the map and what backward needs, where they are wanted."""
        if self.by_pointers is not None and not descriptors.aligned(call.key, call.value):
            return self.by_pointers().run(call, out)
        filled = {
            name: plan.new(out, *shape, dtype=dtype) for name, (shape, dtype) in self.filled.items()
        }
        mass = self.map.zeros(call.device) if self.map else None
        self.launch.on(
            q=call.query,
            k=call.key,
            v=call.value,
            out=out,
            key_lengths=call.key_lengths,
            stat=call.stat,
            mass=mass,
            **filled,
        )
        found = self.map.sums(mass, call.map_shape) if self.map and mass is not None else None
        return Forward(out, found, tuple(filled[name] for name in self.saved))


def part_type(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the partial outputs of a call of this type."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def make_plan(key: FramesKey, device: torch.device, *, by_descriptors: bool = True) -> FramesPlan:
    """Returns the plan of a call, with its tables on the device.

    Without ``by_descriptors`` keys and values come by pointers, whatever the call.
    """
    rule = key.rule_tables()
    table = key.table("forward", rule)
    by_descriptors = by_descriptors and _describes(key, rule, table)
    config = key.config(f"{table}_described" if by_descriptors else table)
    seen = _tile_tables(key, rule, config)
    way = _way(key, rule, seen)
    if way == "revisit":
        by_descriptors = False
        config = key.config(key.table("revisit", rule))
        seen = _tile_tables(key, rule, config)
    made = _plan(key, rule, config, way, seen, by_descriptors=by_descriptors)
    made = replace(made, launch=made.launch.to(device), map=made.map and made.map.to(device))
    if not by_descriptors:
        return made
    pointers = functools.partial(make_plan, key, device, by_descriptors=False)
    return replace(made, by_pointers=functools.cache(pointers))


def _describes(key: FramesKey, rule: RuleTables, table: str) -> bool:
    """Tells whether keys and values come by descriptors, if they are aligned.

    They do not in the few calls whose sums by frame leave no registers for larger blocks.
    """
    sizes = (key.batch, key.keys, key.key_heads)
    return (
        table in DESCRIBED
        and not key.sums_by_frame(rule)
        and descriptors.possible(key.device, key.kind, sizes, key.key, key.value)
    )


def plan_frames(
    key: FramesKey, config: FramesConfig, way: str, *, by_descriptors: bool = False
) -> FramesPlan:
    """Returns the plan with a configuration and a ``WAY`` that need not be those of the tables."""
    rule = key.rule_tables()
    seen = _tile_tables(key, rule, config)
    return _plan(key, rule, config, way, seen, by_descriptors=by_descriptors)


def _tile_tables(key: FramesKey, rule: RuleTables, config: FramesConfig) -> TileTables:
    return frames_slots.tile_tables(
        key.tables.query_runs.tensor().tolist(),
        key.tables.key_runs.tensor().tolist(),
        rule,
        rows=config.rows,
        ordered=key.ordered,
        by_frame=key.sums_by_frame(rule),
    )


def _way(key: FramesKey, rule: RuleTables, seen: TileTables) -> str:
    """Returns which ``WAY`` of :func:`frames_kernel` is the cheapest."""
    if key.statistic(rule) not in ("row_max", "frame_max"):
        return "known"
    below = configs.revisit_below(key.device.architecture, key.kind)
    return "revisit" if seen.biased_keys_of_a_slot() < below else "split"


def branches_to_mask(key: FramesKey, rule: Rule) -> bool:
    """Returns whether a kernel masks only blocks of keys that are not full: few are not.

    Elsewhere each logit costs an instruction more. Of AMD's kernels the branch takes the loads that
    run ahead. Where bands and factors compare each logit anyway, or keys of a block may be missing
    in its midst, it takes more than it saves.
    """
    always = rule.BAND or rule.FACTOR or (rule.ORDERED and rule.LENGTHS)
    return key.device.is_nvidia and not always


def _plan(
    key: FramesKey,
    rule: RuleTables,
    config: FramesConfig,
    way: str,
    seen: TileTables,
    *,
    by_descriptors: bool,
) -> FramesPlan:
    """Returns the plan, with its tables on the CPU."""
    stat = key.statistic(rule)
    tiles = seen.tiles.shape[1]
    tasks = key.batch * key.heads * tiles
    programs = min(tasks, key.device.processors * config.programs)
    tables = frames_plan.named_tables(rule, seen)
    if way == "revisit":
        tables["biased"] = seen.biased
    if key.has_map:
        tables |= {"entries": seen.entries, "entry_frame": seen.entry_frame}
    constants = frames_plan.constants(key, rule, seen)
    saved = frames_plan.saved(stat) if key.save else ()
    parts = seen.most_slots if way == "split" else 0
    filled = _allocations(key, config, programs, saved, parts)
    named = {"q", "k", "v", "out", *tables, *filled}
    named |= {"key_lengths"} if key.lengths else set()
    named |= {"stat"} if stat == "tensor" else set()
    named |= {"mass"} if key.has_map else set()
    pairs = key.frames * key.key_frames
    launch = Launch(
        frames_kernel,
        programs,
        Tensors(*(name in named for name in Tensors._fields)),
        (
            *(None,) * 4,
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
            seen.most_slots,
            seen.entry_frame.numel(),
            *key.in_units(key.query),
            *key.in_units(key.key),
            *key.in_units(key.value),
            *key.in_units(key.out),
            *(key.stat or (0, 0, 0)),
            key.scale * plan.LOG2E,
        ),
        {
            "HEAD": key.head(),
            "RULE": constants,
            "WAY": way,
            "MAP": key.has_map,
            "SAVE": key.save,
            "BRANCH": branches_to_mask(key, constants),
            **config.constants(),
        },
        DeviceTables(tables),
    )
    if by_descriptors:
        launch = descriptors.described(
            launch,
            key.dtype,
            (key.batch, 1, key.key_heads, key.keys, key.head_dim),
            k=(key.key[0], 0, key.key[2], key.key[1]),
            v=(key.value[0], 0, key.value[2], key.value[1]),
        )
    return FramesPlan(
        launch,
        filled,
        saved,
        frames_map.plan_map(key, seen) if key.has_map else None,
    )


def _allocations(
    key: FramesKey, config: FramesConfig, programs: int, saved: tuple[str, ...], parts: int
) -> dict[str, Allocation]:
    """Returns what the kernel fills: what is saved, and scratch for so many partial outputs."""
    rows = (key.batch, key.heads, key.tokens)
    found: dict[str, Allocation] = {
        name: (rows, torch.int32 if name == "stat_frame" else torch.float32) for name in saved
    }
    if parts:
        of_parts = (programs, parts, config.rows)
        width = sum(configs.split(key.head_dim))
        found["part"] = ((*of_parts, width), part_type(key.dtype))
        found["part_lse"] = (of_parts, torch.float32)
        if key.dtype != torch.float32:
            found["part_size"] = (of_parts, torch.float32)
    if key.has_map:
        found["frame_lse"] = ((programs, key.key_frames + 1, config.rows), torch.float32)
    return found
