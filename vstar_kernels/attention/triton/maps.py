"""Sums over sequences of N×N maps: the mean map of long sequences, and the gradient of a Δ.

Every program owns a piece of the sum and goes through all sequences that contribute to it, in one
order, so that nothing is ever added up between programs. Where the pieces are fewer than a GPU
needs, the sequences are dealt to several ``chunks``, whose sums the caller adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vstar_kernels.attention.triton.pieces import (
    LOG2E,
    along,
    first,
    load,
    locate,
    logits,
    map_gradient,
    product,
    regularization,
    regularized,
    transposed,
)

STRIDES = [f"{name}_strides" for name in ("q", "k", "v", "grad_out", "values", "map")]


@triton.jit(
    do_not_specialize=[
        *STRIDES, "heads", "frames", "map_block", "first_row", "rows", "count", "stride", "step",
        "chunks",
    ],
    do_not_specialize_on_alignment=["space"],
)  # fmt: skip
def maps_kernel(
    q, k, v, grad_out, values, grad_map, lse, weights, inner, sums,
    q_strides, k_strides, v_strides, grad_out_strides, values_strides, map_strides,
    space, heads, frames, map_block, first_row, rows, count, stride, step, chunks,
    scale, strength, rate, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, CLAMP: tl.constexpr,
    OF_DELTA: tl.constexpr, GRAD_MAP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sums``, ``(groups, chunks, rows, frames)``: of A′, or ``OF_DELTA``, of dΔ.

    The rows are first_row … first_row + rows − 1. Group g sums over its ``count`` sequences
    g · stride + n · step.
    """
    row_blocks = tl.cdiv(rows, ROWS)
    key_blocks = tl.cdiv(frames, KEYS)
    program = tl.program_id(0)
    key_start = program % key_blocks * KEYS
    program = program // key_blocks
    row_start = program % row_blocks * ROWS
    program = program // row_blocks
    chunk = program % chunks
    group = program // chunks
    i = first_row + row_start + tl.arange(0, ROWS)
    j = key_start + tl.arange(0, KEYS)
    i_inside = i < frames
    j_inside = j < frames

    total = tl.zeros((ROWS, KEYS), tl.float32)
    for n in tl.range(chunk, count, chunks, num_stages=1):
        sequence = group * stride + n * step
        batch, place, head = locate(sequence, space, heads)
        q_rows = first(q_strides, batch, place, head, UNIT, OFFSET)
        q_rows += along(q_strides, i, UNIT, OFFSET)
        k_rows = first(k_strides, batch, place, head, UNIT, OFFSET)
        k_rows += along(k_strides, j, UNIT, OFFSET)
        q_main, q_rest = load(q, q_rows, i_inside, HEAD_DIM, MAIN, REST)
        k_main, k_rest = load(k, k_rows, j_inside, HEAD_DIM, MAIN, REST)
        s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)
        saved = sequence.to(tl.int64) * frames + i
        weight = tl.full((ROWS,), 0.0, tl.float32)
        if FORM != "none":
            weight = tl.load(weights + saved, mask=i_inside, other=0.0)
            delta_head = head if PER_HEAD else 0
            delta = regularization(
                values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
            )
            s = regularized(s, weight, strength, delta, CLAMP)
        row_lse = tl.load(lse + saved, mask=i_inside, other=0.0)
        p = tl.exp2(s * scale - tl.expand_dims(row_lse, 1))
        if OF_DELTA:
            g_rows = first(grad_out_strides, batch, place, head, UNIT, OFFSET)
            g_rows += along(grad_out_strides, i, UNIT, OFFSET)
            v_rows = first(v_strides, batch, place, head, UNIT, OFFSET)
            v_rows += along(v_strides, j, UNIT, OFFSET)
            g_main, g_rest = load(grad_out, g_rows, i_inside, HEAD_DIM, MAIN, REST)
            v_main, v_rest = load(v, v_rows, j_inside, HEAD_DIM, MAIN, REST)
            d_p = product(g_main, transposed(v_main), PRECISION)
            if REST:
                d_p += product(g_rest, transposed(v_rest), PRECISION)
            if GRAD_MAP:
                d_p += share * map_gradient(grad_map, map_strides, batch, i, j, frames, map_block)
            row_inner = tl.load(inner + saved, mask=i_inside, other=0.0)
            if CLAMP:
                weight = tl.maximum(weight, 0.0)
            d_s = p * (d_p - tl.expand_dims(row_inner, 1))
            total += d_s * tl.expand_dims(weight * (strength * scale / LOG2E), 1)
        else:
            total += p

    row = row_start + tl.arange(0, ROWS)
    offsets = (group * chunks + chunk).to(tl.int64) * rows * frames
    offsets = offsets + tl.expand_dims(row.to(tl.int64), 1) * frames + j
    tl.store(sums + offsets, total, mask=tl.expand_dims((row < rows) & i_inside, 1) & j_inside)
