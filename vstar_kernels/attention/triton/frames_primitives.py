"""What the kernels of attention over frames share: how they find keys, weights and logits.

Names and shapes are those of :mod:`primitives`. ``t`` are a kernel's tensors, which all have the
tables of :mod:`frames_slots` and of the rule by the names of :class:`frames_forward.Tensors`;
``RULE`` is the tuple of :mod:`frames_plan`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vstar_kernels.attention.triton.primitives import LOG2E, inner_products


class Weights(NamedTuple):
    """What the tables say of a slot, each one number for each row, ``(ROWS,)``; or 0, unread."""

    positive: Any  # the factor of logits above zero
    negative: Any
    span_low: Any
    span_high: Any
    band_low: Any
    band_high: Any


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
    """Returns what is added to a slot's logits, one number for each row."""
    b_delta = tl.zeros(b_stat.shape, tl.float32)
    b_offset = tl.zeros(b_stat.shape, tl.float32)
    if RULE.DELTA:
        b_delta = tl.load(t.delta + o_rule + i_frame, mask=m_rule, other=0.0)
    if RULE.OFFSET:
        b_offset = tl.load(t.offset + o_rule + i_frame, mask=m_rule, other=0.0)
    return bias(b_stat, b_delta, b_offset, RULE)


@triton.jit
def bias(b_stat, b_delta, b_offset, RULE: tl.constexpr):
    """Returns stat · delta + offset, rounded once.

    The compiler may not put this multiply-add and what it is added to together: a logit with its
    bias is the same number wherever it is computed.
    """
    b_bias = b_offset
    if RULE.DELTA:
        if RULE.CLAMP:
            b_stat = tl.maximum(b_stat, 0.0)
        b_bias = tl.fma(b_stat, b_delta, b_offset)
    return b_bias


@triton.jit
def unit(exp2_scale):
    """Returns what 1 is in the units of logits, 1 / |scale|."""
    return LOG2E / exp2_scale


@triton.jit
def frame_logits(b_q, b_k, m_j, j_place, b_place, weights, HEAD: tl.constexpr, RULE: tl.constexpr):
    """Returns a·φ / |scale|, −∞ where a key is not seen, and the factor a where there is one.

    Both are ``(ROWS, KEYS)``. With ``m_j`` None it is the caller who masks.
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
    if m_j is not None:
        m_s = tl.expand_dims(m_j, 0)
        if RULE.BAND:
            m_s = m_s & (b_distance >= tl.expand_dims(weights.band_low, 1))
            m_s = m_s & (b_distance <= tl.expand_dims(weights.band_high, 1))
        b_s = tl.where(m_s, b_s, float("-inf"))
    return b_s, b_a


@triton.jit
def count_keys(m_j, left, first_place, b_place, weights, RULE: tl.constexpr):
    """Returns how many keys of a block each row sees; the keys that there are come first in it.

    They are those ``left`` of a range, or fewer where not all of these are within the key length.
    By arithmetic: a sum of what :func:`frame_logits` says would be a second block of its size, in
    a layout of its own, in which every thread has the places of many rows.
    """
    count = tl.minimum(left, m_j.shape[0])
    if RULE.ORDERED and RULE.LENGTHS:
        count = tl.sum(m_j.to(tl.int32), 0)
    if RULE.BAND:
        b_low = tl.maximum(first_place - b_place, weights.band_low)
        b_high = tl.minimum(first_place + count - 1 - b_place, weights.band_high)
        count = tl.where(b_high >= b_low, b_high - b_low + 1, 0)  # (ROWS,)
    return count.to(tl.float32)
