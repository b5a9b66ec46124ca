"""The gradients of :mod:`columns_forward`, from the rows' log-sum-exps that it saved.

With W = 1/H · dM Gᵀ, the same for all heads, dP = dO Vᵀ + W and dS = P ∘ (dP − rowsum(P ∘ dP)):

- :func:`grad_query_tile_kernel`: dQ with up to 128 keys, a tile. A program has whole rows of P, so
  that rowsum(P ∘ dP) is at hand, and computes W once for all of its heads.
- :func:`grad_query_kernel`: dQ with more, in two passes over the keys; the first is for
  rowsum(P ∘ dP).
- :func:`grad_key_kernel`: dK and dV, if they are wanted, by blocks of keys from all queries.

Operations for each (row, key, head): 6·D for dQ, 10·D with many keys, and 8·D more for dK and dV.
The output is not needed. Where programs share the queries of dK and dV, each leaves its part, and
the parts are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.triton import plan
from vstar_kernels.attention.triton.columns_forward import load_column, products
from vstar_kernels.attention.triton.columns_plan import ColumnsKey
from vstar_kernels.attention.triton.configs import ColumnsConfig
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.log_sums import probabilities
from vstar_kernels.attention.triton.primitives import (
    add_weighted_sums,
    inner_products,
    load_heads,
    store_heads,
    times,
    weighted_sums,
    zero_heads,
)

if TYPE_CHECKING:
    from vstar_kernels.attention.columns.call import ColumnCall


class Tensors(NamedTuple):
    """What the kernels read and write, and of each whether one does."""

    q: Any  # (batch, queries, heads, head_dim), like grad_out and grad_q
    k: Any  # (batch, keys, heads, head_dim), like v
    v: Any
    grad_out: Any
    grad_q: Any
    grad_k_parts: Any  # (chunks, batch, keys, heads, head_dim) in float32, like grad_v_parts
    grad_v_parts: Any
    columns: Any  # (batch, keys, columns)
    grad_maps: Any  # (batch, queries, columns)
    lse: Any  # (batch, heads, queries), like row_dot
    row_dot: Any  # rowsum(P ∘ dP)


INTEGERS = ["tiles", "shares", "share_heads", "queries", "keys", "heads", "columns"]
INTEGERS += ["key_tiles", "chunks", "chunk_rows"]
STRIDES = [
    f"{tensor}_{dimension}"
    for tensor in ("q", "k", "v", "do", "dq")
    for dimension in ("batch", "row", "head")
] + ["g_batch", "g_key", "g_column"]


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def grad_query_tile_kernel(
    t, tiles, shares, share_heads, queries, keys, heads, columns,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    do_batch, do_row, do_head, dq_batch, dq_row, dq_head,
    g_batch, g_key, g_column, exp2_scale, map_weight, scale,
    HEAD: tl.constexpr, GRAD_OUT: tl.constexpr, GRAD_MAP: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` queries of ``share_heads`` heads, the heads one after the other.

    With ``DOT`` it stores ``row_dot``. Strides are in units of ``HEAD.UNIT`` elements but those of
    the columns.
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
    o_dq = (o_batch * dq_batch + i.to(HEAD.OFFSET) * dq_row) * HEAD.UNIT
    p_k = t.k + o_batch * k_batch * HEAD.UNIT
    o_k = j.to(HEAD.OFFSET) * k_row * HEAD.UNIT
    if GRAD_OUT:
        o_do = (o_batch * do_batch + i.to(HEAD.OFFSET) * do_row) * HEAD.UNIT
        p_v = t.v + o_batch * v_batch * HEAD.UNIT
        o_v = j.to(HEAD.OFFSET) * v_row * HEAD.UNIT
    if KEYS_REST:
        j_rest = KEYS + tl.arange(0, OTHER)
        m_rest = j_rest < keys
        o_k_rest = j_rest.to(HEAD.OFFSET) * k_row * HEAD.UNIT
        if GRAD_OUT:
            o_v_rest = j_rest.to(HEAD.OFFSET) * v_row * HEAD.UNIT

    if GRAD_MAP:
        o_map = (i_batch.to(tl.int64) * queries + i) * columns
        p_columns = t.columns + o_batch * g_batch
        b_w = tl.zeros((ROWS, KEYS), tl.float32)
        b_w_rest = tl.zeros((ROWS, OTHER), tl.float32)
        for i_column in tl.range(0, columns, num_stages=1):
            p = p_columns + i_column * g_column
            b_dm = tl.load(t.grad_maps + o_map + i_column, mask=m_i, other=0.0) * map_weight
            b_w += outer(b_dm, load_column(p, j, m_j, g_key, HEAD))
            if KEYS_REST:
                b_w_rest += outer(b_dm, load_column(p, j_rest, m_rest, g_key, HEAD))

    first = i_share * share_heads
    for n in tl.range(0, tl.minimum(share_heads, heads - first), num_stages=STAGES):
        i_head = first + n
        o_head = i_head.to(HEAD.OFFSET) * HEAD.UNIT
        b_q = load_heads(t.q, o_q + o_head * q_head, m_i, HEAD)  # (ROWS, D)
        b_k = load_heads(p_k + o_head * k_head, o_k, m_j, HEAD)  # (KEYS, D)
        if KEYS_REST:
            b_k_rest = load_heads(p_k + o_head * k_head, o_k_rest, m_rest, HEAD)  # (KEYS_REST, D)
        if GRAD_OUT:
            b_do = load_heads(t.grad_out, o_do + o_head * do_head, m_i, HEAD)  # (ROWS, D)
            b_v = load_heads(p_v + o_head * v_head, o_v, m_j, HEAD)  # (KEYS, D)
            if KEYS_REST:
                b_v_rest = load_heads(p_v + o_head * v_head, o_v_rest, m_rest, HEAD)
        o_row = (i_batch.to(tl.int64) * heads + i_head) * queries + i
        b_lse = tl.load(t.lse + o_row, mask=m_i, other=0.0)

        b_p = probabilities(products(b_q, b_k, HEAD), b_lse, exp2_scale)  # (ROWS, KEYS)
        if not KEYS_REST and not HEAD.EVEN:
            b_p = tl.where(m_j, b_p, 0.0)
        if GRAD_OUT:
            b_dp = inner_products(b_do, b_v, HEAD)  # (ROWS, KEYS)
            if GRAD_MAP:
                b_dp += b_w
        else:
            b_dp = b_w
        b_dot = tl.sum(b_p * b_dp, 1)
        if KEYS_REST:
            b_p_rest = probabilities(products(b_q, b_k_rest, HEAD), b_lse, exp2_scale)
            if not HEAD.EVEN:
                b_p_rest = tl.where(m_rest, b_p_rest, 0.0)  # (ROWS, KEYS_REST)
            if GRAD_OUT:
                b_dp_rest = inner_products(b_do, b_v_rest, HEAD)  # (ROWS, KEYS_REST)
                if GRAD_MAP:
                    b_dp_rest += b_w_rest
            else:
                b_dp_rest = b_w_rest
            b_dot += tl.sum(b_p_rest * b_dp_rest, 1)
        if DOT:
            tl.store(t.row_dot + o_row, b_dot, mask=m_i)
        b_ds = b_p * (b_dp - tl.expand_dims(b_dot, 1))  # (ROWS, KEYS)
        b_dq = weighted_sums(b_ds.to(b_k[0].dtype), b_k, HEAD)  # (ROWS, D)
        if KEYS_REST:
            b_ds_rest = b_p_rest * (b_dp_rest - tl.expand_dims(b_dot, 1))  # (ROWS, KEYS_REST)
            b_dq = add_weighted_sums(b_dq, b_ds_rest.to(b_k[0].dtype), b_k_rest, HEAD)
        store_heads(t.grad_q, o_dq + o_head * dq_head, m_i, times(b_dq, scale), HEAD)


@triton.jit
def outer(b_i, b_j):
    """Returns the products of numbers of rows and of keys, ``(ROWS, KEYS)``."""
    return tl.expand_dims(b_i, 1) * tl.expand_dims(b_j, 0)


@triton.jit
def grad_weights(
    b_do, b_v, p_grad_maps, p_columns, j, m_i, m_j, columns, g_key, g_column, map_weight,
    HEAD: tl.constexpr, GRAD_OUT: tl.constexpr, GRAD_MAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns dP, ``(ROWS, KEYS)``, of which W is computed anew."""
    b_dp = tl.zeros((ROWS, KEYS), tl.float32)
    if GRAD_OUT:
        b_dp += inner_products(b_do, b_v, HEAD)
    if GRAD_MAP:
        for i_column in tl.range(0, columns, num_stages=1):
            b_dm = tl.load(p_grad_maps + i_column, mask=m_i, other=0.0) * map_weight
            b_dp += outer(b_dm, load_column(p_columns + i_column * g_column, j, m_j, g_key, HEAD))
    return b_dp


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def grad_query_kernel(
    t, tiles, queries, keys, heads, columns,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    do_batch, do_row, do_head, dq_batch, dq_row, dq_head,
    g_batch, g_key, g_column, exp2_scale, map_weight, scale,
    HEAD: tl.constexpr, GRAD_OUT: tl.constexpr, GRAD_MAP: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` queries of one head, ``KEYS`` keys at a time, and with ``DOT`` ``row_dot``."""
    i_tile = tl.program_id(0) % tiles
    i_sequence = tl.program_id(0) // tiles
    i_batch = (i_sequence // heads).to(HEAD.OFFSET)
    i_head = (i_sequence % heads).to(HEAD.OFFSET)
    i = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = i < queries
    o_q = (i_batch * q_batch + i_head * q_head + i.to(HEAD.OFFSET) * q_row) * HEAD.UNIT
    p_k = t.k + (i_batch * k_batch + i_head * k_head) * HEAD.UNIT
    b_q = load_heads(t.q, o_q, m_i, HEAD)  # (ROWS, D)
    o_row = i_sequence.to(tl.int64) * queries + i
    b_lse = tl.load(t.lse + o_row, mask=m_i, other=0.0)
    p_v = p_k
    b_do = b_q
    p_columns = p_k
    p_grad_maps = p_k
    if GRAD_OUT:
        p_v = t.v + (i_batch * v_batch + i_head * v_head) * HEAD.UNIT
        o_do = i_batch * do_batch + i_head * do_head + i.to(HEAD.OFFSET) * do_row
        b_do = load_heads(t.grad_out, o_do * HEAD.UNIT, m_i, HEAD)  # (ROWS, D)
    if GRAD_MAP:
        p_grad_maps = t.grad_maps + (i_batch.to(tl.int64) * queries + i) * columns
        p_columns = t.columns + i_batch * g_batch

    b_dot = tl.zeros((ROWS,), tl.float32)
    for n in tl.range(0, keys, KEYS, num_stages=STAGES):
        j = n + tl.arange(0, KEYS)
        m_j = j < keys
        b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_row * HEAD.UNIT, m_j, HEAD)  # (KEYS, D)
        b_v = b_k
        if GRAD_OUT:
            b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_row * HEAD.UNIT, m_j, HEAD)  # (KEYS, D)
        b_p = probabilities(products(b_q, b_k, HEAD), b_lse, exp2_scale)  # (ROWS, KEYS)
        b_dp = grad_weights(
            b_do, b_v, p_grad_maps, p_columns, j, m_i, m_j, columns, g_key, g_column, map_weight,
            HEAD, GRAD_OUT, GRAD_MAP, ROWS, KEYS,
        )  # fmt: skip
        b_dot += tl.sum(tl.where(m_j, b_p, 0.0) * b_dp, 1)
    if DOT:
        tl.store(t.row_dot + o_row, b_dot, mask=m_i)

    b_dq = zero_heads(ROWS, HEAD)
    for n in tl.range(0, keys, KEYS, num_stages=STAGES):
        j = n + tl.arange(0, KEYS)
        m_j = j < keys
        b_k = load_heads(p_k, j.to(HEAD.OFFSET) * k_row * HEAD.UNIT, m_j, HEAD)  # (KEYS, D)
        b_v = b_k
        if GRAD_OUT:
            b_v = load_heads(p_v, j.to(HEAD.OFFSET) * v_row * HEAD.UNIT, m_j, HEAD)  # (KEYS, D)
        b_p = probabilities(products(b_q, b_k, HEAD), b_lse, exp2_scale)  # (ROWS, KEYS)
        b_dp = grad_weights(
            b_do, b_v, p_grad_maps, p_columns, j, m_i, m_j, columns, g_key, g_column, map_weight,
            HEAD, GRAD_OUT, GRAD_MAP, ROWS, KEYS,
        )  # fmt: skip
        b_ds = tl.where(m_j, b_p, 0.0) * (b_dp - tl.expand_dims(b_dot, 1))  # (ROWS, KEYS)
        b_dq = add_weighted_sums(b_dq, b_ds.to(b_k[0].dtype), b_k, HEAD)  # (ROWS, D)
    o_dq = (i_batch * dq_batch + i_head * dq_head + i.to(HEAD.OFFSET) * dq_row) * HEAD.UNIT
    store_heads(t.grad_q, o_dq, m_i, times(b_dq, scale), HEAD)


@triton.jit(do_not_specialize=INTEGERS + STRIDES)
def grad_key_kernel(
    t, key_tiles, chunks, chunk_rows, queries, keys, heads, columns,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    do_batch, do_row, do_head, g_batch, g_key, g_column, exp2_scale, map_weight, scale,
    HEAD: tl.constexpr, GRAD_OUT: tl.constexpr, GRAD_MAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The part of dK and dV that ``KEYS`` keys of one head have from ``chunk_rows`` queries.

    Without a gradient of the output there is no dV. Blocks of weights are ``(KEYS, ROWS)``.
    """
    i_tile = tl.program_id(0) % key_tiles
    i_chunk = tl.program_id(0) // key_tiles % chunks
    i_sequence = tl.program_id(0) // key_tiles // chunks
    sequences = tl.num_programs(0) // key_tiles // chunks
    i_batch = (i_sequence // heads).to(HEAD.OFFSET)
    i_head = (i_sequence % heads).to(HEAD.OFFSET)
    j = i_tile * KEYS + tl.arange(0, KEYS)
    m_j = j < keys
    o_k = (i_batch * k_batch + i_head * k_head + j.to(HEAD.OFFSET) * k_row) * HEAD.UNIT
    b_k = load_heads(t.k, o_k, m_j, HEAD)  # (KEYS, D)
    p_q = t.q + (i_batch * q_batch + i_head * q_head) * HEAD.UNIT
    p_lse = t.lse + i_sequence.to(tl.int64) * queries
    p_dot = t.row_dot + i_sequence.to(tl.int64) * queries
    if GRAD_OUT:
        o_v = (i_batch * v_batch + i_head * v_head + j.to(HEAD.OFFSET) * v_row) * HEAD.UNIT
        b_v = load_heads(t.v, o_v, m_j, HEAD)  # (KEYS, D)
        p_do = t.grad_out + (i_batch * do_batch + i_head * do_head) * HEAD.UNIT
    if GRAD_MAP:
        p_columns = t.columns + i_batch * g_batch

    b_dk = zero_heads(KEYS, HEAD)
    b_dv = zero_heads(KEYS, HEAD)
    first = i_chunk * chunk_rows
    for n in tl.range(first, tl.minimum(first + chunk_rows, queries), ROWS, num_stages=STAGES):
        i = n + tl.arange(0, ROWS)
        m_i = i < queries
        b_q = load_heads(p_q, i.to(HEAD.OFFSET) * q_row * HEAD.UNIT, m_i, HEAD)  # (ROWS, D)
        if GRAD_OUT:
            b_do = load_heads(p_do, i.to(HEAD.OFFSET) * do_row * HEAD.UNIT, m_i, HEAD)
        b_lse = tl.load(p_lse + i, mask=m_i, other=0.0)
        b_dot = tl.load(p_dot + i, mask=m_i, other=0.0)
        b_s = products(b_k, b_q, HEAD)  # (KEYS, ROWS)
        # A query past the last has weights of 1, and gradients of 0.
        b_p = probabilities(b_s, b_lse, exp2_scale, 0)  # (KEYS, ROWS)
        b_dp = tl.zeros((KEYS, ROWS), tl.float32) - tl.expand_dims(b_dot, 0)
        if GRAD_OUT:
            b_dv = add_weighted_sums(b_dv, b_p.to(b_do[0].dtype), b_do, HEAD)  # (KEYS, D)
            b_dp += inner_products(b_v, b_do, HEAD)  # (KEYS, ROWS)
        if GRAD_MAP:
            p_grad_maps = t.grad_maps + (i_batch.to(tl.int64) * queries + i) * columns
            for i_column in tl.range(0, columns, num_stages=1):
                b_dm = tl.load(p_grad_maps + i_column, mask=m_i, other=0.0) * map_weight
                b_g = load_column(p_columns + i_column * g_column, j, m_j, g_key, HEAD)
                b_dp += outer(b_g, b_dm)
        b_ds = b_p * b_dp  # (KEYS, ROWS)
        b_dk = add_weighted_sums(b_dk, b_ds.to(b_q[0].dtype), b_q, HEAD)  # (KEYS, D)
    i_part = (i_chunk * (sequences // heads) + i_batch).to(tl.int64)
    o_part = ((i_part * keys + j) * heads + i_head) * HEAD.HEAD_DIM
    store_heads(t.grad_k_parts, o_part, m_j, times(b_dk, scale), HEAD)
    if GRAD_OUT:
        store_heads(t.grad_v_parts, o_part, m_j, b_dv, HEAD)


@dataclass(frozen=True)
class ColumnsBackwardPlan:
    """The launches that compute the wanted gradients: dQ, and after it dK and dV."""

    grad_query: Launch
    grad_key: Launch | None = None
    parts: tuple[int, ...] = ()  # of dK, and of dV, before they are added up

    def run(
        self,
        call: ColumnCall,
        lse: Tensor,
        grad_out: Tensor | None,
        grad_map: Tensor | None,
        grad_query: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fills ``grad_query``; returns dK and dV in float32, those that are planned."""
        grad_key = grad_value = row_dot = None
        if self.grad_key is not None:
            grad_key, row_dot = plan.new(lse, *self.parts), torch.empty_like(lse)
            if self.grad_key.needed.grad_v_parts:
                grad_value = plan.new(lse, *self.parts)
        for launch in filter(None, (self.grad_query, self.grad_key)):
            launch.on(
                q=call.query,
                k=call.key,
                v=call.value,
                grad_out=grad_out,
                grad_q=grad_query,
                grad_k_parts=grad_key,
                grad_v_parts=grad_value,
                columns=call.columns,
                grad_maps=grad_map,
                lse=lse,
                row_dot=row_dot,
            )
        return _summed(grad_key), _summed(grad_value)


def _summed(parts: Tensor | None) -> Tensor | None:
    """Returns the sum of the chunks' parts, in their order."""
    if parts is None:
        return None
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def make_plan(key: ColumnsKey) -> ColumnsBackwardPlan:
    """Returns the plan of a backward pass."""
    of_query = plan_grad_query(key, key.config("grad_query"))
    if not key.wants_keys:
        return ColumnsBackwardPlan(of_query)
    return ColumnsBackwardPlan(of_query, *plan_grad_key(key, key.config("grad_key")))


def plan_grad_query(key: ColumnsKey, config: ColumnsConfig) -> Launch:
    """Returns the launch for dQ with a configuration, which need not be the one in the table."""
    tiles = -(-key.queries // config.rows)
    programs, has_out = key.batch * tiles, bool(key.grad_out)
    of_rows = key.in_units(key.grad_out, key.grad_query)
    numbers = (*key.weights, key.exp2_scale, key.map_weight, key.scale)
    constants = {
        "HEAD": key.head(),
        "GRAD_OUT": has_out,
        "GRAD_MAP": key.has_map,
        "DOT": key.wants_keys,
        "ROWS": config.rows,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }
    needed = Tensors(
        q=True,
        k=True,
        v=has_out,
        grad_out=has_out,
        grad_q=True,
        grad_k_parts=False,
        grad_v_parts=False,
        columns=key.has_map,
        grad_maps=key.has_map,
        lse=True,
        row_dot=key.wants_keys,
    )
    sizes = (key.queries, key.keys, key.heads, key.columns)
    inputs = key.in_units(key.query, key.key, key.value)
    if not config.keys:
        shares, share_heads = key.shares(programs, key.heads)
        main, rest = key.key_parts
        return Launch(
            grad_query_tile_kernel,
            programs * shares,
            needed,
            (tiles, shares, share_heads, *sizes, *inputs, *of_rows, *numbers),
            constants | {"KEYS": main, "KEYS_REST": rest},
        )
    return Launch(
        grad_query_kernel,
        programs * key.heads,
        needed,
        (tiles, *sizes, *inputs, *of_rows, *numbers),
        constants | {"KEYS": config.keys},
    )


def plan_grad_key(key: ColumnsKey, config: ColumnsConfig) -> tuple[Launch, tuple[int, ...]]:
    """Returns the launch for dK and dV with a configuration, and the shape of their parts."""
    has_out = bool(key.grad_out)
    key_tiles = -(-key.keys // config.keys)
    programs = key.batch * key.heads * key_tiles
    chunks, blocks = key.shares(programs, -(-key.queries // config.rows))
    launch = Launch(
        grad_key_kernel,
        programs * chunks,
        Tensors(
            q=True,
            k=True,
            v=has_out,
            grad_out=has_out,
            grad_q=False,
            grad_k_parts=True,
            grad_v_parts=has_out,
            columns=key.has_map,
            grad_maps=key.has_map,
            lse=True,
            row_dot=True,
        ),
        (
            key_tiles,
            chunks,
            blocks * config.rows,
            key.queries,
            key.keys,
            key.heads,
            key.columns,
            *key.in_units(key.query, key.key, key.value, key.grad_out),
            *key.weights,
            key.exp2_scale,
            key.map_weight,
            key.scale,
        ),
        {
            "HEAD": key.head(),
            "GRAD_OUT": has_out,
            "GRAD_MAP": key.has_map,
            "ROWS": config.rows,
            "KEYS": config.keys,
            "STAGES": config.stages,
            "num_warps": config.warps,
        },
    )
    return launch, (chunks, key.batch, key.keys, key.heads, key.head_dim)
