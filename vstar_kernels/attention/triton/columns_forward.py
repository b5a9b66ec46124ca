"""Attention to a few keys with the maps of chosen columns: softmax(QKᵀ) V and softmax(QKᵀ) G.

Up to 128 keys, a tile (:func:`tile_kernel`), a program holds the weights of all keys for its rows,
goes through the heads, and keeps the heads' sum of weights in registers. That is multiplied by the
columns once, at the end: a map costs one addition for each weight, whatever the number of columns.
77 keys are a block of 64 and one of 16, as a head of 80 is.

With more keys, and where a head is too wide for the registers of a tile, there are two kernels:
:func:`stream_kernel` goes through blocks of keys with an online softmax, and :func:`maps_kernel`
computes the weights of a block again from the rows' log-sum-exps and sums them over the heads; of
blocks in which all columns are zero it computes none.

Operations: 4·D for each (row, key, head), and 2·D more for the maps of many keys. Bytes: queries
are read once and outputs written once; keys and values, which all rows share, come from the cache.
Where programs share a map's heads or keys, each leaves its part, and the parts are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.call import Forward, nothing
from vstar_kernels.attention.triton import plan
from vstar_kernels.attention.triton.columns_plan import ColumnsKey
from vstar_kernels.attention.triton.configs import ColumnsConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.log_sums import log_sum, probabilities
from vstar_kernels.attention.triton.primitives import (
    add_weighted_sums,
    exponentials,
    inner_products,
    load_heads,
    store_heads,
    subtrahend,
    times,
    weighted_sums,
    zero_heads,
)

if TYPE_CHECKING:
    from vstar_kernels.attention.columns.call import ColumnCall


class Tensors(NamedTuple):
    """What the kernels read and write, and of each whether one does."""

    q: Any  # (batch, queries, heads, head_dim), like out
    k: Any  # (batch, keys, heads, head_dim), like v
    v: Any
    out: Any
    columns: Any  # (batch, keys, columns)
    maps: Any  # (parts, batch, queries, columns)
    lse: Any  # (batch, heads, queries): the rows' :func:`log_sum`


INTEGERS = ["tiles", "shares", "share_heads", "queries", "keys", "heads", "columns"]
STRIDES = [
    f"{tensor}_{dimension}"
    for tensor in ("q", "k", "v", "out")
    for dimension in ("batch", "row", "head")
] + ["g_batch", "g_key", "g_column"]


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def tile_kernel(
    t, tiles, shares, share_heads, queries, keys, heads, columns,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, g_batch, g_key, g_column, exp2_scale, map_weight,
    HEAD: tl.constexpr, OUT: tl.constexpr, MAPS: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of ``share_heads`` heads against all keys, the heads one after the other.

    ``shares`` programs have the heads of the same rows; each leaves its part of the maps. Strides
    are in units of ``HEAD.UNIT`` elements but those of the columns.
    """
    OTHER: tl.constexpr = KEYS_REST if KEYS_REST else KEYS  # else the second block is not used
    i_tile = tl.program_id(0) % tiles
    i_share = tl.program_id(0) // tiles % shares
    i_batch = tl.program_id(0) // tiles // shares
    i = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = i < queries
    j = tl.arange(0, KEYS)
    m_j = j < keys
    o_batch = i_batch.to(HEAD.OFFSET)
    o_q = (o_batch * q_batch + i.to(HEAD.OFFSET) * q_row) * HEAD.UNIT
    o_out = (o_batch * out_batch + i.to(HEAD.OFFSET) * out_row) * HEAD.UNIT
    p_k = t.k + o_batch * k_batch * HEAD.UNIT
    o_k = j.to(HEAD.OFFSET) * k_row * HEAD.UNIT
    if OUT:
        p_v = t.v + o_batch * v_batch * HEAD.UNIT
        o_v = j.to(HEAD.OFFSET) * v_row * HEAD.UNIT
    if KEYS_REST:
        j_rest = KEYS + tl.arange(0, OTHER)
        m_rest = j_rest < keys
        o_k_rest = j_rest.to(HEAD.OFFSET) * k_row * HEAD.UNIT
        if OUT:
            o_v_rest = j_rest.to(HEAD.OFFSET) * v_row * HEAD.UNIT

    b_sum = tl.zeros((ROWS, KEYS), tl.float32)
    b_sum_rest = tl.zeros((ROWS, OTHER), tl.float32)
    first = i_share * share_heads
    for n in tl.range(0, tl.minimum(share_heads, heads - first), num_stages=STAGES):
        i_head = first + n
        o_head = i_head.to(HEAD.OFFSET) * HEAD.UNIT
        b_q = load_heads(t.q, o_q + o_head * q_head, m_i, HEAD)  # (ROWS, D)
        b_k = load_heads(p_k + o_head * k_head, o_k, m_j, HEAD)  # (KEYS, D)
        if KEYS_REST:
            b_k_rest = load_heads(p_k + o_head * k_head, o_k_rest, m_rest, HEAD)  # (KEYS_REST, D)
        if OUT:
            b_v = load_heads(p_v + o_head * v_head, o_v, m_j, HEAD)  # (KEYS, D)
            if KEYS_REST:
                b_v_rest = load_heads(p_v + o_head * v_head, o_v_rest, m_rest, HEAD)

        b_s = products(b_q, b_k, HEAD)  # (ROWS, KEYS)
        if KEYS_REST:
            b_s_rest = products(b_q, b_k_rest, HEAD)  # (ROWS, KEYS_REST)
            if not HEAD.EVEN:
                b_s_rest = tl.where(m_rest, b_s_rest, float("-inf"))
            b_max = tl.maximum(tl.max(b_s, 1), tl.max(b_s_rest, 1))
        else:
            if not HEAD.EVEN:
                b_s = tl.where(m_j, b_s, float("-inf"))
            b_max = tl.max(b_s, 1)
        b_p = exponentials(b_s, b_max, exp2_scale)  # (ROWS, KEYS)
        b_total = tl.sum(b_p, 1)
        if KEYS_REST:
            b_p_rest = exponentials(b_s_rest, b_max, exp2_scale)  # (ROWS, KEYS_REST)
            b_total += tl.sum(b_p_rest, 1)
        b_inverse = tl.expand_dims(1.0 / b_total, 1)
        if MAPS:
            b_sum += b_p * b_inverse
            if KEYS_REST:
                b_sum_rest += b_p_rest * b_inverse
        if SAVE:
            o_row = (i_batch.to(tl.int64) * heads + i_head) * queries + i
            tl.store(t.lse + o_row, log_sum(b_max, b_total, exp2_scale), mask=m_i)
        if OUT:
            b_o = weighted_sums(b_p.to(b_v[0].dtype), b_v, HEAD)  # (ROWS, D)
            if KEYS_REST:
                b_o = add_weighted_sums(b_o, b_p_rest.to(b_v[0].dtype), b_v_rest, HEAD)
            store_heads(t.out, o_out + o_head * out_head, m_i, times(b_o, b_inverse), HEAD)

    if MAPS:
        p_columns = t.columns + o_batch * g_batch
        i_part = i_share.to(tl.int64) * (tl.num_programs(0) // tiles // shares) + i_batch
        p_maps = t.maps + (i_part * queries + i) * columns
        for i_column in tl.range(0, columns, num_stages=1):
            p = p_columns + i_column * g_column
            b_map = column_sums(b_sum, p, j, m_j, g_key, HEAD)
            if KEYS_REST:
                b_map += column_sums(b_sum_rest, p, j_rest, m_rest, g_key, HEAD)
            tl.store(p_maps + i_column, b_map * map_weight, mask=m_i)


@triton.jit
def products(b_q, b_k, HEAD: tl.constexpr):
    """Returns φ / |scale|, ``(ROWS, KEYS)``."""
    b_s = inner_products(b_q, b_k, HEAD)
    if HEAD.NEGATIVE:
        b_s = -b_s
    return b_s


@triton.jit
def load_column(p_column, j, m_j, g_key, HEAD: tl.constexpr):
    """Loads the weights of keys in one column, ``(KEYS,)``."""
    return tl.load(p_column + j.to(HEAD.OFFSET) * g_key, mask=m_j, other=0.0)


@triton.jit
def column_sums(b_p, p_column, j, m_j, g_key, HEAD: tl.constexpr):
    """Returns the sums of weights ``(ROWS, KEYS)`` times those of one column, ``(ROWS,)``."""
    return tl.sum(b_p * tl.expand_dims(load_column(p_column, j, m_j, g_key, HEAD), 0), 1)


@triton.jit(do_not_specialize=[*INTEGERS, *STRIDES])
def stream_kernel(
    t, tiles, queries, keys, heads,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, exp2_scale,
    HEAD: tl.constexpr, OUT: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of one head against any number of keys, ``KEYS`` at a time."""
    i_tile = tl.program_id(0) % tiles
    i_sequence = tl.program_id(0) // tiles
    i_batch = (i_sequence // heads).to(HEAD.OFFSET)
    i_head = (i_sequence % heads).to(HEAD.OFFSET)
    i = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = i < queries
    o_q = (i_batch * q_batch + i_head * q_head + i.to(HEAD.OFFSET) * q_row) * HEAD.UNIT
    p_k = t.k + (i_batch * k_batch + i_head * k_head) * HEAD.UNIT
    b_q = load_heads(t.q, o_q, m_i, HEAD)  # (ROWS, D)
    if OUT:
        p_v = t.v + (i_batch * v_batch + i_head * v_head) * HEAD.UNIT

    b_max = tl.full((ROWS,), float("-inf"), tl.float32)
    b_total = tl.zeros((ROWS,), tl.float32)
    b_o = zero_heads(ROWS, HEAD)
    for n in tl.range(0, keys, KEYS, num_stages=STAGES):
        j = n + tl.arange(0, KEYS)
        b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_row * HEAD.UNIT, j < keys, HEAD)  # (KEYS, D)
        if OUT:
            b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_row * HEAD.UNIT, j < keys, HEAD)
        b_s = tl.where(j < keys, products(b_q, b_k, HEAD), float("-inf"))  # (ROWS, KEYS)
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = subtrahend(b_new_max)
        b_shrink = tl.exp2((b_max - b_shift) * exp2_scale)
        b_p = exponentials(b_s, b_shift, exp2_scale)  # (ROWS, KEYS)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        if OUT:
            b_o = times(b_o, tl.expand_dims(b_shrink, 1))
            b_o = add_weighted_sums(b_o, b_p.to(b_v[0].dtype), b_v, HEAD)  # (ROWS, D)
        b_max = b_new_max
    if SAVE:
        o_row = i_sequence.to(tl.int64) * queries + i
        tl.store(t.lse + o_row, log_sum(b_max, b_total, exp2_scale), mask=m_i)
    if OUT:
        o_out = i_batch * out_batch + i_head * out_head + i.to(HEAD.OFFSET) * out_row
        b_out = times(b_o, tl.expand_dims(1.0 / b_total, 1))
        store_heads(t.out, o_out * HEAD.UNIT, m_i, b_out, HEAD)


@triton.jit(do_not_specialize=[*INTEGERS, *STRIDES, "key_tiles"])
def maps_kernel(
    t, tiles, key_tiles, shares, share_heads, queries, keys, heads, columns,
    q_batch, q_row, q_head, k_batch, k_row, k_head, g_batch, g_key, g_column,
    exp2_scale, map_weight,
    HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The part of the maps that ``ROWS`` queries have from ``KEYS`` keys of a share of the heads.

    A block of keys that no column has is skipped; of a row whose weights are NaN, that is NaN too.
    """
    i_tile = tl.program_id(0) % tiles
    i_part = tl.program_id(0) // tiles % (key_tiles * shares)
    i_batch = tl.program_id(0) // tiles // (key_tiles * shares)
    batch = tl.num_programs(0) // tiles // (key_tiles * shares)
    i = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = i < queries
    j = i_part // shares * KEYS + tl.arange(0, KEYS)
    m_j = j < keys
    o_batch = i_batch.to(HEAD.OFFSET)
    p_columns = t.columns + o_batch * g_batch
    some = 0
    for i_column in tl.range(0, columns, num_stages=1):
        b_g = load_column(p_columns + i_column * g_column, j, m_j, g_key, HEAD)
        some += tl.sum((b_g != 0.0).to(tl.int32), 0)

    p_q = t.q + o_batch * q_batch * HEAD.UNIT
    o_q = i.to(HEAD.OFFSET) * q_row * HEAD.UNIT
    p_k = t.k + o_batch * k_batch * HEAD.UNIT
    o_k = j.to(HEAD.OFFSET) * k_row * HEAD.UNIT
    p_lse = t.lse + i_batch.to(tl.int64) * heads * queries + i
    first = i_part % shares * share_heads
    count = tl.minimum(share_heads, heads - first)
    b_sum = tl.zeros((ROWS, KEYS), tl.float32)
    if some > 0:
        for n in tl.range(0, count, num_stages=STAGES):
            i_head = first + n
            o_head = i_head.to(HEAD.OFFSET) * HEAD.UNIT
            b_q = load_heads(p_q + o_head * q_head, o_q, m_i, HEAD)  # (ROWS, D)
            b_k = load_heads(p_k + o_head * k_head, o_k, m_j, HEAD)  # (KEYS, D)
            b_lse = tl.load(p_lse + i_head.to(tl.int64) * queries, mask=m_i, other=0.0)
            b_p = probabilities(products(b_q, b_k, HEAD), b_lse, exp2_scale)  # (ROWS, KEYS)
            b_sum += tl.where(m_j, b_p, 0.0)
    else:
        for n in tl.range(0, count, num_stages=1):
            b_lse = tl.load(p_lse + (first + n).to(tl.int64) * queries, mask=m_i, other=0.0)
            b_sum += tl.expand_dims(b_lse * 0.0, 1)
    p_maps = t.maps + ((i_part.to(tl.int64) * batch + i_batch) * queries + i) * columns
    for i_column in tl.range(0, columns, num_stages=1):
        b_map = column_sums(b_sum, p_columns + i_column * g_column, j, m_j, g_key, HEAD)
        tl.store(p_maps + i_column, b_map * map_weight, mask=m_i)


@dataclass(frozen=True)
class ColumnsPlan:
    """The launches of a call: that of the rows, and with many keys, that of the maps after it."""

    rows: Launch
    maps: Launch | None
    parts: tuple[int, ...]  # the shape of the maps, or of parts to add up; () where none are
    lse: tuple[int, ...]  # the shape of the rows' log-sum-exps, where they are wanted

    def run(self, call: ColumnCall, out: Tensor | None, *, save: bool) -> Forward:
        """Fills ``out``, and returns it with the maps and what backward needs."""
        found = plan.new(call.query, *self.parts) if self.parts else None
        lse = plan.new(call.query, *self.lse) if self.lse else None
        for launch in (self.rows, self.maps):
            if launch is not None:
                launch.on(
                    q=call.query,
                    k=call.key,
                    v=call.value,
                    out=out,
                    columns=call.columns,
                    maps=found,
                    lse=lse,
                )
        if found is not None and found.ndim > len(call.map_shape):
            found = found.sum(0)
        saved = (lse,) if save and lse is not None else ()
        return Forward(nothing(call.query) if out is None else out, found, saved)


def make_plan(key: ColumnsKey) -> ColumnsPlan:
    """Returns the plan of a call."""
    return plan_columns(key, key.config("forward"))


def plan_columns(key: ColumnsKey, config: ColumnsConfig) -> ColumnsPlan:
    """Returns the plan with a configuration, which need not be the one in the table."""
    return _plan_stream(key, config) if config.keys else _plan_tile(key, config)


def _plan_tile(key: ColumnsKey, config: ColumnsConfig) -> ColumnsPlan:
    tiles = -(-key.queries // config.rows)
    shares, share_heads = key.shares(key.batch * tiles, key.heads)
    has_out, has_map = bool(key.out), key.has_map
    main, rest = key.key_parts
    launch = Launch(
        tile_kernel,
        key.batch * tiles * shares,
        Tensors(True, True, has_out, has_out, columns=has_map, maps=has_map, lse=key.save),
        (
            tiles,
            shares,
            share_heads,
            key.queries,
            key.keys,
            key.heads,
            key.columns,
            *key.in_units(key.query, key.key, key.value, key.out),
            *key.weights,
            key.exp2_scale,
            key.map_weight,
        ),
        {
            "HEAD": key.head(),
            "OUT": has_out,
            "MAPS": has_map,
            "SAVE": key.save,
            "ROWS": config.rows,
            "KEYS": main,
            "KEYS_REST": rest,
            "STAGES": config.stages,
            "num_warps": config.warps,
        },
    )
    return ColumnsPlan(launch, None, _parts(key, shares), _rows(key) if key.save else ())


def _plan_stream(key: ColumnsKey, config: ColumnsConfig) -> ColumnsPlan:
    tiles, key_tiles = -(-key.queries // config.rows), -(-key.keys // config.keys)
    has_out, saves = bool(key.out), key.save or key.has_map
    constants = {
        "HEAD": key.head(),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }
    rows = Launch(
        stream_kernel,
        key.batch * tiles * key.heads,
        Tensors(True, True, has_out, has_out, columns=False, maps=False, lse=saves),
        (
            tiles,
            key.queries,
            key.keys,
            key.heads,
            *key.in_units(key.query, key.key, key.value, key.out),
            key.exp2_scale,
        ),
        constants | {"OUT": has_out, "SAVE": saves},
    )
    if not key.has_map:
        return ColumnsPlan(rows, None, (), _rows(key) if saves else ())
    shares, share_heads = key.shares(key.batch * tiles * key_tiles, key.heads)
    maps = Launch(
        maps_kernel,
        key.batch * tiles * key_tiles * shares,
        Tensors(True, True, v=False, out=False, columns=True, maps=True, lse=True),
        (
            tiles,
            key_tiles,
            shares,
            share_heads,
            key.queries,
            key.keys,
            key.heads,
            key.columns,
            *key.in_units(key.query, key.key),
            *key.weights,
            key.exp2_scale,
            key.map_weight,
        ),
        constants,
    )
    return ColumnsPlan(rows, maps, _parts(key, key_tiles * shares), _rows(key))


def _parts(key: ColumnsKey, count: int) -> tuple[int, ...]:
    """Returns the shape of the maps, if these are wanted, with the parts first where some are."""
    shape = (key.batch, key.queries, key.columns)
    if not key.has_map:
        return ()
    return shape if count == 1 else (count, *shape)


def _rows(key: ColumnsKey) -> tuple[int, ...]:
    """Returns the shape of what there is of each row."""
    return key.batch, key.heads, key.queries
