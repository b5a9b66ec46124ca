"""The gradients of more frames than :mod:`tile_backward` holds, in three sweeps over the map.

- :func:`statistics_kernel`: what each row needs: the logarithm of its sum of exponentials, the
  weight of its Δ, the key that is its maximum, and rowsum(dP ∘ P).
- :func:`rows_kernel`: dQ and the weight's gradient, row by row.
- :func:`columns_kernel`: dK and dV, key by key.

Nothing is added up between programs. The formulas are those of ``attention/reference_backward.py``;
products of N×N×D: 1, 3 and 4, with one more in the first two where the mean map has a gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vstar_kernels.attention.triton.pieces import (
    LOG2E,
    along,
    block_logits,
    blocks_in_window,
    exponentials,
    first,
    load,
    locate,
    logits,
    map_gradient,
    product,
    regularization,
    regularized,
    store,
    transposed,
)

STRIDES = [
    f"{name}_strides"
    for name in (
        "q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v",
        "values", "stat", "grad_stat", "map",
    )
]  # fmt: skip


@triton.jit(
    do_not_specialize=[*STRIDES, "heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def statistics_kernel(
    q, k, out, grad_out, values, stat, grad_map, lse, weights, columns, inner,
    q_strides, k_strides, out_strides, grad_out_strides, values_strides, stat_strides, map_strides,
    space, heads, frames, map_block, scale, strength, rate, window, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    GRAD_MAP: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of ``ROWS`` queries; the results are ``(sequences, frames)``.

    ``weights`` are in units of the product qᵀk, before they are clamped. With ``STAT`` "map_max",
    ``weights`` and ``columns`` come out as those of "row_max", and ``stat`` holds the map's.
    """
    blocks = tl.cdiv(frames, ROWS)
    sequence = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    batch, place, head = locate(sequence, space, heads)
    i = start + tl.arange(0, ROWS)
    inside = i < frames
    q_rows = first(q_strides, batch, place, head, UNIT, OFFSET) + along(q_strides, i, UNIT, OFFSET)
    q_main, q_rest = load(q, q_rows, inside, HEAD_DIM, MAIN, REST)
    k += first(k_strides, batch, place, head, UNIT, OFFSET)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    column = tl.zeros((ROWS,), tl.int32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    near = 0
    far = 0
    if FORM != "none":
        near, far = blocks_in_window(start, ROWS, KEYS, window, frames)
    for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=1):
        j = n * KEYS + tl.arange(0, KEYS)
        k_rows = along(k_strides, j, UNIT, OFFSET)
        s = block_logits(
            q_main, q_rest, k, k_rows, j, frames, HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION
        )
        block_max, block_column = tl.max(s, 1, return_indices=True)
        column = tl.where(block_max > best, block_column + n * KEYS, column)
        best = tl.maximum(best, block_max)
        if (n < near) | (n >= far):
            row_max, total = _add(s, row_max, total, scale)

    saved = sequence.to(tl.int64) * frames + i
    if FORM != "none":
        weight = best
        if STAT == "none":
            weight = tl.zeros((ROWS,), tl.float32) + LOG2E / scale
        elif STAT == "tensor":
            stat_rows = first(stat_strides, batch, place, head, 1, OFFSET)
            stat_rows += along(stat_strides, i, 1, OFFSET)
            weight = tl.load(stat + stat_rows, mask=inside, other=0.0) * (LOG2E / scale)
        tl.store(weights + saved, weight, mask=inside)
        tl.store(columns + saved, column, mask=inside)
        if STAT == "map_max":
            weight = tl.zeros((ROWS,), tl.float32) + tl.load(stat + sequence)
        delta_head = head if PER_HEAD else 0
        for n in tl.range(near, far, num_stages=1):
            j = n * KEYS + tl.arange(0, KEYS)
            k_rows = along(k_strides, j, UNIT, OFFSET)
            s = block_logits(
                q_main, q_rest, k, k_rows, j, frames,
                HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
            )  # fmt: skip
            delta = regularization(
                values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
            )
            s = regularized(s, weight, strength, delta, CLAMP)
            row_max, total = _add(s, row_max, total, scale)
    row_lse = row_max * scale + tl.log2(total)
    tl.store(lse + saved, row_lse, mask=inside)

    rows = first(out_strides, batch, place, head, UNIT, OFFSET)
    rows += along(out_strides, i, UNIT, OFFSET)
    o_main, o_rest = load(out, rows, inside, HEAD_DIM, MAIN, REST)
    rows = first(grad_out_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_out_strides, i, UNIT, OFFSET)
    g_main, g_rest = load(grad_out, rows, inside, HEAD_DIM, MAIN, REST)
    row_inner = tl.sum(o_main.to(tl.float32) * g_main.to(tl.float32), 1)
    if REST:
        row_inner += tl.sum(o_rest.to(tl.float32) * g_rest.to(tl.float32), 1)
    if GRAD_MAP:
        for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=1):
            j = n * KEYS + tl.arange(0, KEYS)
            k_rows = along(k_strides, j, UNIT, OFFSET)
            s = block_logits(
                q_main, q_rest, k, k_rows, j, frames,
                HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
            )  # fmt: skip
            if FORM != "none":
                delta = regularization(
                    values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
                )
                s = regularized(s, weight, strength, delta, CLAMP)
            p = tl.exp2(s * scale - tl.expand_dims(row_lse, 1))
            row_inner += share * tl.sum(
                p * map_gradient(grad_map, map_strides, batch, i, j, frames, map_block), 1
            )
    tl.store(inner + saved, row_inner, mask=inside)


@triton.jit
def _add(s, row_max, total, scale):
    """Adds logits to the sum of exponentials and its maximum."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    total = total * tl.exp2((row_max - new_max) * scale)
    return new_max, total + tl.sum(exponentials(s, new_max, scale), 1)


@triton.jit(
    do_not_specialize=[*STRIDES, "heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def rows_kernel(
    q, k, v, grad_out, grad_q, grad_stat, values, grad_map, lse, weights, columns, inner, d_weights,
    q_strides, k_strides, v_strides, grad_out_strides, grad_q_strides, grad_stat_strides,
    values_strides, map_strides,
    space, heads, frames, map_block, scale, signed_scale, strength, rate, window, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    DETACH: tl.constexpr, GRAD_MAP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` queries, and the gradient of their weights in ``d_weights``.

    With ``STAT`` "row_max" what comes through the maximum is in dQ; with "map_max" it is left to
    the caller, who knows the whole map.
    """
    blocks = tl.cdiv(frames, ROWS)
    sequence = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    batch, place, head = locate(sequence, space, heads)
    i = start + tl.arange(0, ROWS)
    inside = i < frames
    q_rows = first(q_strides, batch, place, head, UNIT, OFFSET) + along(q_strides, i, UNIT, OFFSET)
    q_main, q_rest = load(q, q_rows, inside, HEAD_DIM, MAIN, REST)
    rows = first(grad_out_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_out_strides, i, UNIT, OFFSET)
    g_main, g_rest = load(grad_out, rows, inside, HEAD_DIM, MAIN, REST)
    k += first(k_strides, batch, place, head, UNIT, OFFSET)
    v += first(v_strides, batch, place, head, UNIT, OFFSET)
    saved = sequence.to(tl.int64) * frames + i
    row_lse = tl.load(lse + saved, mask=inside, other=0.0)
    row_inner = tl.load(inner + saved, mask=inside, other=0.0)
    near = 0
    far = 0
    weight = row_lse
    if FORM != "none":
        weight = tl.load(weights + saved, mask=inside, other=0.0)
        near, far = blocks_in_window(start, ROWS, KEYS, window, frames)
    delta_head = head if PER_HEAD else 0

    d_weight = tl.zeros((ROWS,), tl.float32)
    d_main = tl.zeros((ROWS, MAIN), tl.float32)
    d_rest = tl.zeros((ROWS, REST if REST else MAIN), tl.float32)
    for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=1):
        j = n * KEYS + tl.arange(0, KEYS)
        k_main, k_rest = load(
            k, along(k_strides, j, UNIT, OFFSET), j < frames, HEAD_DIM, MAIN, REST
        )
        v_main, v_rest = load(
            v, along(v_strides, j, UNIT, OFFSET), j < frames, HEAD_DIM, MAIN, REST
        )
        s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)
        if FORM != "none":
            if (n >= near) & (n < far):
                delta = regularization(
                    values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
                )
                s = regularized(s, weight, strength, delta, CLAMP)
        p = tl.exp2(s * scale - tl.expand_dims(row_lse, 1))
        d_p = product(g_main, transposed(v_main), PRECISION)
        if REST:
            d_p += product(g_rest, transposed(v_rest), PRECISION)
        if GRAD_MAP:
            d_p += share * map_gradient(grad_map, map_strides, batch, i, j, frames, map_block)
        d_s = p * (d_p - tl.expand_dims(row_inner, 1))
        if FORM != "none":
            if (n >= near) & (n < far):
                delta = regularization(
                    values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
                )
                d_weight += tl.sum(d_s * delta, 1)
        d_s = d_s.to(k_main.dtype)
        d_main += product(d_s, k_main, PRECISION)
        if REST:
            d_rest += product(d_s, k_rest, PRECISION)

    if FORM != "none" and STAT != "none" and not DETACH:
        d_weight *= strength
        if CLAMP and STAT != "map_max":
            d_weight = tl.where(weight >= 0.0, d_weight, 0.0)
        if STAT == "tensor":
            rows = first(grad_stat_strides, batch, place, head, 1, OFFSET)
            rows += along(grad_stat_strides, i, 1, OFFSET)
            tl.store(grad_stat + rows, d_weight, mask=inside)
        else:
            tl.store(d_weights + saved, d_weight, mask=inside)
        if STAT == "row_max":
            column = tl.load(columns + saved, mask=inside, other=0)
            rows = along(k_strides, column, UNIT, OFFSET)
            k_main, k_rest = load(k, rows, inside, HEAD_DIM, MAIN, REST)
            d_main += tl.expand_dims(d_weight, 1) * k_main.to(tl.float32)
            if REST:
                d_rest += tl.expand_dims(d_weight, 1) * k_rest.to(tl.float32)
    rows = first(grad_q_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_q_strides, i, UNIT, OFFSET)
    store(grad_q, rows, inside, d_main * signed_scale, d_rest * signed_scale, HEAD_DIM, MAIN, REST)


@triton.jit(
    do_not_specialize=[*STRIDES, "heads", "frames", "window", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def columns_kernel(
    q, k, v, grad_out, grad_k, grad_v, values, grad_map, lse, weights, columns, inner, d_weights,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides,
    values_strides, map_strides,
    space, heads, frames, map_block, scale, signed_scale, strength, rate, window, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    DETACH: tl.constexpr, GRAD_MAP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``KEYS`` keys, from all queries, ``ROWS`` at a time.

    ``columns`` and ``d_weights`` say which logit is a row's statistic and what comes through it.
    """
    blocks = tl.cdiv(frames, KEYS)
    sequence = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * KEYS
    batch, place, head = locate(sequence, space, heads)
    j = start + tl.arange(0, KEYS)
    inside = j < frames
    k_rows = first(k_strides, batch, place, head, UNIT, OFFSET) + along(k_strides, j, UNIT, OFFSET)
    v_rows = first(v_strides, batch, place, head, UNIT, OFFSET) + along(v_strides, j, UNIT, OFFSET)
    k_main, k_rest = load(k, k_rows, inside, HEAD_DIM, MAIN, REST)
    v_main, v_rest = load(v, v_rows, inside, HEAD_DIM, MAIN, REST)
    q += first(q_strides, batch, place, head, UNIT, OFFSET)
    grad_out += first(grad_out_strides, batch, place, head, UNIT, OFFSET)
    near = 0
    far = 0
    if FORM != "none":
        near, far = blocks_in_window(start, KEYS, ROWS, window, frames)
    delta_head = head if PER_HEAD else 0

    dk_main = tl.zeros((KEYS, MAIN), tl.float32)
    dk_rest = tl.zeros((KEYS, REST if REST else MAIN), tl.float32)
    dv_main = tl.zeros((KEYS, MAIN), tl.float32)
    dv_rest = tl.zeros((KEYS, REST if REST else MAIN), tl.float32)
    for n in tl.range(0, tl.cdiv(frames, ROWS), num_stages=1):
        i = n * ROWS + tl.arange(0, ROWS)
        rows = i < frames
        q_main, q_rest = load(q, along(q_strides, i, UNIT, OFFSET), rows, HEAD_DIM, MAIN, REST)
        g_main, g_rest = load(
            grad_out, along(grad_out_strides, i, UNIT, OFFSET), rows, HEAD_DIM, MAIN, REST
        )
        saved = sequence.to(tl.int64) * frames + i
        row_lse = tl.load(lse + saved, mask=rows, other=0.0)
        row_inner = tl.load(inner + saved, mask=rows, other=0.0)
        s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)
        if FORM != "none":
            if (n >= near) & (n < far):
                weight = tl.load(weights + saved, mask=rows, other=0.0)
                delta = regularization(
                    values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
                )
                s = regularized(s, weight, strength, delta, CLAMP)
        p = tl.exp2(s * scale - tl.expand_dims(row_lse, 1))
        p_transposed = transposed(p.to(q_main.dtype))
        dv_main += product(p_transposed, g_main, PRECISION)
        d_p = product(g_main, transposed(v_main), PRECISION)
        if REST:
            dv_rest += product(p_transposed, g_rest, PRECISION)
            d_p += product(g_rest, transposed(v_rest), PRECISION)
        if GRAD_MAP:
            d_p += share * map_gradient(grad_map, map_strides, batch, i, j, frames, map_block)
        d_s = p * (d_p - tl.expand_dims(row_inner, 1))
        if FORM != "none" and (STAT == "row_max" or STAT == "map_max") and not DETACH:
            column = tl.load(columns + saved, mask=rows, other=-1)
            d_weight = tl.load(d_weights + saved, mask=rows, other=0.0)
            d_s += tl.where(j == tl.expand_dims(column, 1), tl.expand_dims(d_weight, 1), 0.0)
        d_s = transposed(d_s.to(q_main.dtype))
        dk_main += product(d_s, q_main, PRECISION)
        if REST:
            dk_rest += product(d_s, q_rest, PRECISION)

    rows = first(grad_k_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_k_strides, j, UNIT, OFFSET)
    store(
        grad_k, rows, inside, dk_main * signed_scale, dk_rest * signed_scale, HEAD_DIM, MAIN, REST
    )
    rows = first(grad_v_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_v_strides, j, UNIT, OFFSET)
    store(grad_v, rows, inside, dv_main, dv_rest, HEAD_DIM, MAIN, REST)
