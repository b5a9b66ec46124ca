"""The gradients of :mod:`frames_forward`, from the rows' log-sum-exps and statistics it saved.

- :func:`grad_query_kernel`: dQ by tiles of rows, the gradient of the statistic, and where the rows'
  maxima are.
- :func:`grad_key_kernel`: dK and dV by tiles of keys. To these the queries are what keys are to
  rows: they are in slots of query frames of equal weights, found by the same tables of the rule
  transposed.

Nothing is added up between programs. With P the weights, dP = dO Vᵀ + the map's gradient,
dS = P ∘ (dP − rowsum(P ∘ dP)), the logit a · φ has the gradient dS + (dr / d(a·φ)) · Σⱼ dS Δ: at
the row's maximum, or over the frame whose mean is the row's, by that frame's softmax. Products of
S×S_k×D: 3 and 4, one more for the map's gradient, and for frame_max two over the chosen frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.triton import frames_plan, frames_slots, plan
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.attention.triton.devices import DeviceTables
from vstar_kernels.attention.triton.frames_plan import FramesKey
from vstar_kernels.attention.triton.frames_primitives import (
    bias,
    find_keys,
    frame_logits,
    key_length,
    read_range,
    read_weights,
    slot_bias,
    unit,
)
from vstar_kernels.attention.triton.frames_slots import RuleTables
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.log_sums import probabilities
from vstar_kernels.attention.triton.primitives import (
    add_weighted_sums,
    inner_products,
    load_heads,
    store_heads,
    times,
    zero_heads,
)

if TYPE_CHECKING:
    from vstar_kernels.attention.frames.call import FrameCall, FrameGradients


class Tensors(NamedTuple):
    """What the two kernels read and write, and of each whether one does."""

    q: Any  # (batch, tokens, heads, head_dim), like out, grad_out and grad_q
    k: Any  # (batch, keys, key heads, head_dim), like v, grad_k and grad_v
    v: Any
    out: Any
    grad_out: Any
    grad_q: Any
    grad_k: Any
    grad_v: Any
    key_lengths: Any  # (batch,)
    stat: Any  # (batch, tokens, heads)
    grad_stat: Any  # (batch, heads, tokens)
    grad_map: Any  # (batch, [heads,] frames, key frames + 1)
    frame_weight: Any  # (frames,): of a row in the map
    delta: Any  # the tables, as in the forward pass; of the second kernel, transposed
    offset: Any
    factor: Any
    span: Any
    band: Any
    row_frame: Any
    row_place: Any
    row_order: Any
    key_order: Any
    tiles: Any
    slots: Any
    ranges: Any
    lse: Any  # (batch, heads, tokens), like all that follow
    row_stat: Any
    stat_frame: Any
    stat_lse: Any
    row_dot: Any  # rowsum(P ∘ dP)
    grad_row: Any  # the gradient of the statistic
    argmax: Any  # the key that is the row's maximum, −1: none


INTEGERS = [
    "tiles", "head_tiles", "tokens", "keys", "heads", "key_group", "frames", "key_frames", "pairs",
    "head_rule", "factor_half", "map_head",
]  # fmt: skip
STRIDES = [
    f"{tensor}_{dimension}"
    for tensor in ("q", "k", "v", "out", "do", "dq", "dk", "dv", "stat")
    for dimension in ("batch", "token", "head")
]


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def grad_query_kernel(
    t, tiles, head_tiles, tokens, keys, heads, key_group, frames, key_frames, pairs, head_rule,
    factor_half, map_head,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, do_batch, do_token, do_head, dq_batch, dq_token, dq_head,
    stat_batch, stat_token, stat_head, exp2_scale, scale,
    HEAD: tl.constexpr, RULE: tl.constexpr, GRAD_MAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` rows of one head, ``row_dot``, and what comes through the statistic."""
    i_tile = tl.program_id(0) % tiles
    i_sequence = tl.program_id(0) // tiles
    i_batch = (i_sequence // heads).to(HEAD.OFFSET)
    i_head = (i_sequence % heads).to(HEAD.OFFSET)
    i_key_head = i_head // key_group
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = rows < tokens
    i = rows
    if RULE.ORDERED:
        i = tl.load(t.row_order + rows, mask=m_i, other=0)
    i = i.to(HEAD.OFFSET)
    p_k = t.k + (i_batch * k_batch + i_key_head * k_head) * HEAD.UNIT
    p_v = t.v + (i_batch * v_batch + i_key_head * v_head) * HEAD.UNIT
    o_q = (i_batch * q_batch + i_head * q_head + i * q_token) * HEAD.UNIT
    o_do = (i_batch * do_batch + i_head * do_head + i * do_token) * HEAD.UNIT
    o_out = (i_batch * out_batch + i_head * out_head + i * out_token) * HEAD.UNIT
    b_q = load_heads(t.q, o_q, m_i, HEAD)  # (ROWS, D)
    b_do = load_heads(t.grad_out, o_do, m_i, HEAD)  # (ROWS, D)
    b_out = load_heads(t.out, o_out, m_i, HEAD)  # (ROWS, D)
    b_dot = tl.sum(b_out[0].to(tl.float32) * b_do[0].to(tl.float32), 1)  # (ROWS,), like all of rows
    if HEAD.REST:
        b_dot += tl.sum(b_out[1].to(tl.float32) * b_do[1].to(tl.float32), 1)
    length = key_length(t.key_lengths, i_batch, keys, RULE)
    b_frame = tl.load(t.row_frame + rows, mask=m_i, other=-1)
    b_place = b_frame
    if RULE.BAND or RULE.SPAN:
        b_place = tl.load(t.row_place + rows, mask=m_i, other=0)
    o_pair = b_frame * key_frames
    o_rule = o_pair + i_head.to(tl.int32) * head_rule
    o_row = i_sequence.to(tl.int64) * tokens + i
    b_lse = tl.load(t.lse + o_row, mask=m_i, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # without keys: no weights
    b_stat = b_lse
    if RULE.DELTA:
        b_stat = row_statistic(
            t, o_row, i_batch * stat_batch + i_head * stat_head + i * stat_token, m_i, exp2_scale,
            RULE,
        )  # fmt: skip
    p_grad_map = t.grad_map
    if GRAD_MAP:
        p_grad_map += ((i_batch * heads + i_head) // map_head) * frames * (key_frames + 1)
        b_row_weight = tl.load(t.frame_weight + b_frame, mask=b_frame >= 0, other=0.0)

    p_tile = t.tiles + (i_head.to(tl.int32) * head_tiles + i_tile) * 2
    first_slot = tl.load(p_tile)
    end_slot = tl.load(p_tile + 1)
    if GRAD_MAP:
        for i_slot in tl.range(first_slot, end_slot, num_stages=1):
            i_frame = tl.load(t.slots + i_slot * 3)
            m_rule = (b_frame >= 0) & (i_frame >= 0)
            weights = read_weights(t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE)
            b_bias = slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
            i_column = tl.where(i_frame >= 0, i_frame, key_frames)
            p = p_grad_map + b_frame * (key_frames + 1) + i_column
            b_grad = b_row_weight * tl.load(p, mask=b_frame >= 0, other=0.0)
            for i_range in tl.range(
                tl.load(t.slots + i_slot * 3 + 1), tl.load(t.slots + i_slot * 3 + 2), num_stages=1
            ):
                start, end, shift = read_range(t.ranges, i_range, length, RULE)
                for n in tl.range(start, end, KEYS, num_stages=1):
                    o_j = n + tl.arange(0, KEYS)
                    j, m_j = find_keys(t.key_order, o_j, end, length, RULE)
                    b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_token * HEAD.UNIT, m_j, HEAD)
                    b_s, _ = frame_logits(b_q, b_k, m_j, o_j + shift, b_place, weights, HEAD, RULE)
                    if RULE.DELTA or RULE.OFFSET:
                        b_s += tl.expand_dims(b_bias, 1)
                    b_p = probabilities(b_s, b_lse, exp2_scale)  # (ROWS, KEYS)
                    b_dot += tl.sum(b_p, 1) * b_grad
    tl.store(t.row_dot + o_row, b_dot, mask=m_i)

    b_row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    b_argmax = tl.full((ROWS,), -1, tl.int32)
    b_factor = tl.full((ROWS,), 1.0, tl.float32)  # of the row's maximum
    b_grad_row = tl.zeros((ROWS,), tl.float32)
    b_dq = zero_heads(ROWS, HEAD)
    for i_slot in tl.range(first_slot, end_slot, num_stages=1):
        i_frame = tl.load(t.slots + i_slot * 3)
        m_rule = (b_frame >= 0) & (i_frame >= 0)
        weights = read_weights(t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE)
        b_bias = slot_bias(t, o_rule, i_frame, m_rule, b_stat, RULE)
        m_seen = m_rule & (b_bias > float("-inf"))  # by the statistic
        b_minus = -b_dot
        if GRAD_MAP:
            i_column = tl.where(i_frame >= 0, i_frame, key_frames)
            p = p_grad_map + b_frame * (key_frames + 1) + i_column
            b_minus += b_row_weight * tl.load(p, mask=b_frame >= 0, other=0.0)
        b_grad_slot = tl.zeros((ROWS,), tl.float32)
        for i_range in tl.range(
            tl.load(t.slots + i_slot * 3 + 1), tl.load(t.slots + i_slot * 3 + 2), num_stages=1
        ):
            start, end, shift = read_range(t.ranges, i_range, length, RULE)
            for n in tl.range(start, end, KEYS, num_stages=STAGES):
                o_j = n + tl.arange(0, KEYS)
                j, m_j = find_keys(t.key_order, o_j, end, length, RULE)
                b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_token * HEAD.UNIT, m_j, HEAD)
                b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_token * HEAD.UNIT, m_j, HEAD)
                b_s, b_a = frame_logits(
                    b_q, b_k, m_j, o_j + shift, b_place, weights, HEAD, RULE
                )  # (ROWS, KEYS)
                if RULE.STAT == "row_max":
                    # Of equal ones the first key; slots need not be in the order of the keys.
                    b_block_max = tl.where(m_seen, tl.max(b_s, 1), float("-inf"))
                    m_maximum = b_s == tl.expand_dims(b_block_max, 1)
                    b_first = tl.min(tl.where(m_maximum, tl.expand_dims(j, 0), keys), 1)
                    m_first = (b_block_max == b_row_max) & (b_first < b_argmax)
                    m_higher = (b_block_max > b_row_max) | m_first
                    b_argmax = tl.where(m_higher, b_first, b_argmax)
                    b_row_max = tl.where(m_higher, b_block_max, b_row_max)
                    if RULE.FACTOR:
                        m_one = tl.expand_dims(j, 0) == tl.expand_dims(b_first, 1)
                        b_one = tl.sum(tl.where(m_one, b_a, 0.0), 1)
                        b_factor = tl.where(m_higher, b_one, b_factor)
                if RULE.DELTA or RULE.OFFSET:
                    b_s += tl.expand_dims(b_bias, 1)
                b_p = probabilities(b_s, b_lse, exp2_scale)  # (ROWS, KEYS)
                b_dp = inner_products(b_do, b_v, HEAD)  # (ROWS, KEYS)
                b_ds = b_p * (b_dp + tl.expand_dims(b_minus, 1))  # (ROWS, KEYS)
                if RULE.DELTA:
                    b_grad_slot += tl.sum(b_ds, 1)
                if RULE.FACTOR:
                    b_ds *= b_a
                b_dq = add_weighted_sums(b_dq, b_ds.to(b_k[0].dtype), b_k, HEAD)  # (ROWS, D)
        if RULE.DELTA:
            p = t.delta + o_rule + i_frame
            b_grad_row += b_grad_slot * tl.load(p, mask=m_rule, other=0.0)

    if RULE.DELTA:
        if RULE.CLAMP:
            b_grad_row = tl.where(b_stat >= 0.0, b_grad_row, 0.0)
        if RULE.STAT == "tensor":
            tl.store(t.grad_stat + o_row, b_grad_row, mask=m_i)
        else:
            tl.store(t.grad_row + o_row, b_grad_row, mask=m_i)
        if RULE.STAT == "row_max":
            tl.store(t.argmax + o_row, b_argmax, mask=m_i)
            m_some = m_i & (b_argmax >= 0)
            o_k = b_argmax.to(HEAD.OFFSET) * k_token * HEAD.UNIT
            b_k = load_heads(p_k, o_k, m_some, HEAD)  # (ROWS, D)
            b_change = tl.expand_dims(tl.where(m_some, b_grad_row * b_factor, 0.0), 1)
            b_dq = (
                b_dq[0] + b_change * b_k[0].to(tl.float32),
                b_dq[1] + b_change * b_k[1].to(tl.float32),
            )
        elif RULE.STAT == "frame_max":
            b_stat_frame = tl.load(t.stat_frame + o_row, mask=m_i, other=-1)
            b_stat_lse = tl.load(t.stat_lse + o_row, mask=m_i, other=0.0)
            for i_slot in tl.range(first_slot, end_slot, num_stages=1):
                i_frame = tl.load(t.slots + i_slot * 3)
                m_chosen = (b_stat_frame == i_frame) & (b_stat_frame >= 0)
                if tl.max(m_chosen.to(tl.int32), 0) > 0:
                    m_rule = (b_frame >= 0) & (i_frame >= 0)
                    weights = read_weights(
                        t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE
                    )
                    b_chosen_lse = tl.where(m_chosen, b_stat_lse, float("inf"))
                    for i_range in tl.range(
                        tl.load(t.slots + i_slot * 3 + 1),
                        tl.load(t.slots + i_slot * 3 + 2),
                        num_stages=1,
                    ):
                        start, end, shift = read_range(t.ranges, i_range, length, RULE)
                        for n in tl.range(start, end, KEYS, num_stages=1):
                            o_j = n + tl.arange(0, KEYS)
                            j, m_j = find_keys(t.key_order, o_j, end, length, RULE)
                            o_k = j.to(HEAD.OFFSET) * k_token * HEAD.UNIT
                            b_k = load_heads(p_k, o_k, m_j, HEAD)  # (KEYS, D)
                            b_s, b_a = frame_logits(
                                b_q, b_k, m_j, o_j + shift, b_place, weights, HEAD, RULE
                            )
                            b_p = probabilities(b_s, b_chosen_lse, exp2_scale)
                            b_ds = b_p * tl.expand_dims(b_grad_row, 1)  # (ROWS, KEYS)
                            if RULE.FACTOR:
                                b_ds *= b_a
                            b_dq = add_weighted_sums(b_dq, b_ds.to(b_k[0].dtype), b_k, HEAD)
    o_dq = (i_batch * dq_batch + i_head * dq_head + i * dq_token) * HEAD.UNIT
    store_heads(t.grad_q, o_dq, m_i, times(b_dq, scale), HEAD)


@triton.jit
def row_statistic(t, o_row, o_stat, m_i, exp2_scale, RULE: tl.constexpr):
    """Returns rows' statistics, before they are clamped."""
    if RULE.STAT == "tensor":
        b_stat = tl.load(t.stat + o_stat, mask=m_i, other=0.0) * unit(exp2_scale)
    else:
        b_stat = tl.load(t.row_stat + o_row, mask=m_i, other=0.0)
    return b_stat


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def grad_key_kernel(
    t, tiles, head_tiles, tokens, keys, heads, key_group, frames, key_frames, pairs, head_rule,
    factor_half, map_head,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    do_batch, do_token, do_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    stat_batch, stat_token, stat_head, exp2_scale, scale,
    HEAD: tl.constexpr, RULE: tl.constexpr, GRAD_MAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``ROWS`` keys of one head, from the queries of all heads that read it.

    Here rows are keys, and the tables' keys are queries, ``KEYS`` at a time: blocks are transposed.
    """
    i_tile = tl.program_id(0) % tiles
    i_sequence = tl.program_id(0) // tiles
    key_heads = heads // key_group
    i_batch = (i_sequence // key_heads).to(HEAD.OFFSET)
    i_key_head = (i_sequence % key_heads).to(HEAD.OFFSET)
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    m_j = rows < keys
    j = rows
    if RULE.ORDERED:
        j = tl.load(t.row_order + rows, mask=m_j, other=0)
    m_there = m_j & (j < key_length(t.key_lengths, i_batch, keys, RULE))
    o_k = (i_batch * k_batch + i_key_head * k_head + j.to(HEAD.OFFSET) * k_token) * HEAD.UNIT
    o_v = (i_batch * v_batch + i_key_head * v_head + j.to(HEAD.OFFSET) * v_token) * HEAD.UNIT
    b_k = load_heads(t.k, o_k, m_there, HEAD)  # (ROWS, D)
    b_v = load_heads(t.v, o_v, m_there, HEAD)  # (ROWS, D)
    b_frame = tl.load(t.row_frame + rows, mask=m_j, other=-1)
    b_place = b_frame
    if RULE.BAND or RULE.SPAN:
        b_place = tl.load(t.row_place + rows, mask=m_j, other=0)
    o_pair = b_frame * frames

    b_dk = zero_heads(ROWS, HEAD)
    b_dv = zero_heads(ROWS, HEAD)
    for i_member in tl.range(0, key_group, num_stages=1):
        i_head = i_key_head * key_group + i_member
        o_rule = o_pair + i_head.to(tl.int32) * head_rule
        p_q = t.q + (i_batch * q_batch + i_head * q_head) * HEAD.UNIT
        p_do = t.grad_out + (i_batch * do_batch + i_head * do_head) * HEAD.UNIT
        o_head = (i_batch * heads + i_head).to(tl.int64)
        p_tile = t.tiles + (i_head.to(tl.int32) * head_tiles + i_tile) * 2
        p_grad_map = t.grad_map
        if GRAD_MAP:
            p_grad_map += (o_head // map_head) * frames * (key_frames + 1)
        for i_slot in tl.range(tl.load(p_tile), tl.load(p_tile + 1), num_stages=1):
            i_frame = tl.load(t.slots + i_slot * 3)  # of the queries
            m_rule = (b_frame >= 0) & (i_frame >= 0)
            weights = read_weights(t, o_rule, o_pair, i_frame, m_rule, pairs, factor_half, RULE)
            b_delta = tl.zeros((ROWS,), tl.float32)
            b_offset = tl.zeros((ROWS,), tl.float32)
            if RULE.DELTA:
                b_delta = tl.load(t.delta + o_rule + i_frame, mask=m_rule, other=0.0)
            if RULE.OFFSET:
                b_offset = tl.load(t.offset + o_rule + i_frame, mask=m_rule, other=0.0)
            b_grad = tl.zeros((ROWS,), tl.float32)
            if GRAD_MAP:
                o_column = tl.where(b_frame >= 0, b_frame, key_frames)
                p = p_grad_map + i_frame * (key_frames + 1) + o_column
                m_video = m_j & (i_frame >= 0)
                b_grad = tl.load(p, mask=m_video, other=0.0)
                b_grad *= tl.load(t.frame_weight + tl.maximum(i_frame, 0))
            for i_range in tl.range(
                tl.load(t.slots + i_slot * 3 + 1), tl.load(t.slots + i_slot * 3 + 2), num_stages=1
            ):
                start, end, shift = read_range(t.ranges, i_range, tokens, RULE)
                for n in tl.range(start, end, KEYS, num_stages=STAGES):
                    o_i = n + tl.arange(0, KEYS)
                    m_i = o_i < end
                    i = o_i
                    if RULE.ORDERED:
                        i = tl.load(t.key_order + o_i, mask=m_i, other=0)
                    i = i.to(HEAD.OFFSET)
                    b_q = load_heads(p_q, i * q_token * HEAD.UNIT, m_i, HEAD)  # (KEYS, D)
                    b_do = load_heads(p_do, i * do_token * HEAD.UNIT, m_i, HEAD)  # (KEYS, D)
                    o_row = o_head * tokens + i
                    b_lse = tl.load(t.lse + o_row, mask=m_i, other=float("-inf"))  # (KEYS,)
                    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
                    b_dot = tl.load(t.row_dot + o_row, mask=m_i, other=0.0)  # (KEYS,)
                    b_s, b_a = frame_logits(
                        b_k, b_q, m_i, o_i + shift, b_place, weights, HEAD, RULE
                    )  # (ROWS, KEYS)
                    b_logits = b_s
                    if RULE.DELTA or RULE.OFFSET:
                        b_stat = b_lse
                        if RULE.DELTA:
                            o_stat = i_batch * stat_batch + i_head * stat_head + i * stat_token
                            b_stat = row_statistic(t, o_row, o_stat, m_i, exp2_scale, RULE)
                        b_logits += bias(
                            tl.expand_dims(b_stat, 0),
                            tl.expand_dims(b_delta, 1),
                            tl.expand_dims(b_offset, 1),
                            RULE,
                        )
                    b_p = probabilities(b_logits, b_lse, exp2_scale, 0)  # (ROWS, KEYS)
                    b_dv = add_weighted_sums(b_dv, b_p.to(b_do[0].dtype), b_do, HEAD)  # (ROWS, D)
                    b_dp = inner_products(b_v, b_do, HEAD)  # (ROWS, KEYS)
                    if GRAD_MAP:
                        b_dp += tl.expand_dims(b_grad, 1)
                    b_ds = b_p * (b_dp - tl.expand_dims(b_dot, 0))  # (ROWS, KEYS)
                    if RULE.STAT == "row_max":
                        b_grad_row = tl.load(t.grad_row + o_row, mask=m_i, other=0.0)  # (KEYS,)
                        b_argmax = tl.load(t.argmax + o_row, mask=m_i, other=-1)  # (KEYS,)
                        m_maximum = tl.expand_dims(j, 1) == tl.expand_dims(b_argmax, 0)
                        b_ds += tl.where(m_maximum, tl.expand_dims(b_grad_row, 0), 0.0)
                    elif RULE.STAT == "frame_max":
                        b_grad_row = tl.load(t.grad_row + o_row, mask=m_i, other=0.0)  # (KEYS,)
                        b_stat_frame = tl.load(t.stat_frame + o_row, mask=m_i, other=-1)
                        b_stat_lse = tl.load(t.stat_lse + o_row, mask=m_i, other=0.0)
                        m_chosen = tl.expand_dims(b_frame, 1) == tl.expand_dims(b_stat_frame, 0)
                        m_chosen = m_chosen & (tl.expand_dims(b_stat_frame, 0) >= 0)
                        b_share = probabilities(b_s, b_stat_lse, exp2_scale, 0)
                        b_share *= tl.expand_dims(b_grad_row, 0)
                        b_ds += tl.where(m_chosen, b_share, 0.0)
                    if RULE.FACTOR:
                        b_ds *= b_a
                    b_dk = add_weighted_sums(b_dk, b_ds.to(b_q[0].dtype), b_q, HEAD)  # (ROWS, D)

    o_dk = (i_batch * dk_batch + i_key_head * dk_head + j.to(HEAD.OFFSET) * dk_token) * HEAD.UNIT
    o_dv = (i_batch * dv_batch + i_key_head * dv_head + j.to(HEAD.OFFSET) * dv_token) * HEAD.UNIT
    m_key = tl.expand_dims(m_there, 1)  # no gradient beyond the key lengths
    b_dk = times(b_dk, scale)
    b_dk = tl.where(m_key, b_dk[0], 0.0), tl.where(m_key, b_dk[1], 0.0)
    b_dv = tl.where(m_key, b_dv[0], 0.0), tl.where(m_key, b_dv[1], 0.0)
    store_heads(t.grad_k, o_dk, m_j, b_dk, HEAD)
    store_heads(t.grad_v, o_dv, m_j, b_dv, HEAD)


@dataclass(frozen=True)
class FramesBackwardPlan:
    """dQ first, which leaves what dK needs of the rows."""

    grad_query: Launch
    grad_key: Launch
    saved: tuple[str, ...]  # the names of what the forward pass saved

    def run(
        self,
        call: FrameCall,
        out: Tensor,
        saved: tuple[Tensor, ...],
        grad_out: Tensor,
        grad_map: Tensor | None,
        gradients: FrameGradients,
    ) -> None:
        """Fills the gradients; that of a statistic is a view of (batch, heads, tokens)."""
        rows = (call.batch, call.heads, call.tokens)
        needed = self.grad_query.needed
        if gradients.stat is not None and not needed.grad_stat:  # it weighs nothing
            gradients.stat.zero_()
        tensors = {
            "q": call.query,
            "k": call.key,
            "v": call.value,
            "out": out,
            "grad_out": grad_out,
            "grad_q": gradients.query,
            "grad_k": gradients.key,
            "grad_v": gradients.value,
            "key_lengths": call.key_lengths,
            "stat": call.stat,
            "grad_stat": None if gradients.stat is None else gradients.stat.transpose(1, 2),
            "grad_map": grad_map,
            **dict(zip(self.saved, saved, strict=True)),
            "row_dot": plan.new(out, *rows),
            "grad_row": plan.new(out, *rows) if needed.grad_row else None,
            "argmax": plan.new(out, *rows, dtype=torch.int32) if needed.argmax else None,
        }
        self.grad_query.on(**tensors)
        self.grad_key.on(**tensors)


def make_plan(key: FramesKey, device: torch.device) -> FramesBackwardPlan:
    """Returns the plan of a backward pass, with its tables on the device."""
    rule = key.rule_tables()
    of_query, of_key = (key.config(key.table(x, rule)) for x in ("grad_query", "grad_key"))
    made = plan_frames(key, of_query, of_key)
    return replace(made, grad_query=made.grad_query.to(device), grad_key=made.grad_key.to(device))


def plan_frames(key: FramesKey, by_rows: FramesConfig, by_keys: FramesConfig) -> FramesBackwardPlan:
    """Returns the plan with configurations, which need not be those in the table."""
    rule = key.rule_tables()
    stat = key.statistic(rule)
    saved = frames_plan.saved(stat)
    common = {"q", "k", "v", "grad_out", "row_dot", *saved}
    common |= {"key_lengths"} if key.lengths else set()
    common |= {"stat"} if stat == "tensor" else set()
    common |= {"grad_map", "frame_weight"} if key.grad_map else set()
    common |= {"grad_row"} if stat in ("row_max", "frame_max") else set()
    common |= {"argmax"} if stat == "row_max" else set()
    of_rows = common | {"out", "grad_q"} | ({"grad_stat"} if stat == "tensor" else set())
    return FramesBackwardPlan(
        _plan_sweep(key, by_rows, rule, stat, of_rows, by_keys=False),
        _plan_sweep(key, by_keys, rule, stat, common | {"grad_k", "grad_v"}, by_keys=True),
        saved,
    )


def _plan_sweep(
    key: FramesKey,
    config: FramesConfig,
    rule: RuleTables,
    stat: str,
    named: set[str],
    *,
    by_keys: bool,
) -> Launch:
    """Returns a launch with a program for each tile of queries, or of keys, of each head."""
    query_runs, key_runs = (x.tensor().tolist() for x in key.tables[:2])
    rows, others = (key_runs, query_runs) if by_keys else (query_runs, key_runs)
    rule = rule.transposed() if by_keys else rule
    made = frames_slots.tile_tables(
        rows,
        others,
        rule,
        rows=config.rows,
        ordered=key.ordered,
        alone=key.grad_map or (stat == "frame_max" and not by_keys),
    )
    tables = frames_plan.named_tables(rule, made)
    if key.grad_map:
        tables["frame_weight"] = frames_plan.frame_weights(key)
    tiles = made.tiles.shape[1]
    heads = key.key_heads if by_keys else key.heads
    pairs = key.frames * key.key_frames
    strides = [key.query, key.key, key.value]
    if by_keys:
        strides += [key.grad_out, key.grad_key, key.grad_value]
    else:
        strides += [key.out, key.grad_out, key.grad_query]
    named = named | set(tables)
    return Launch(
        grad_key_kernel if by_keys else grad_query_kernel,
        key.batch * heads * tiles,
        Tensors(*(name in named for name in Tensors._fields)),
        (
            tiles,
            tiles if rule.heads > 1 else 0,
            key.tokens,
            key.keys,
            key.heads,
            key.heads // key.key_heads,
            key.frames,
            key.key_frames,
            pairs,
            pairs if rule.per_head else 0,
            pairs * rule.heads,
            1 if key.options.mean_map == "heads" else key.heads,
            *(stride for x in strides for stride in key.in_units(x)),
            *(key.stat or (0, 0, 0)),
            key.scale * plan.LOG2E,
            math.copysign(key.scale, key.options.scale),
        ),
        {
            "HEAD": key.head(),
            "RULE": frames_plan.constants(key, rule, made),
            "GRAD_MAP": key.grad_map,
            **config.constants(),
        },
        DeviceTables(tables),
    )
