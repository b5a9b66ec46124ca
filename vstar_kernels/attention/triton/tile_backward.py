"""The gradients of up to 128 frames: as in :mod:`tile`, the whole map stays on chip.

Everything is computed anew from the inputs; nothing but them is read. The floor is 7 tensors of
B·S·N·H·D elements over the memory's bandwidth, four read and three written. The formulas are those
of ``attention/reference_backward.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vstar_kernels.attention.triton.pieces import (
    LOG2E,
    along,
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
        "q", "k", "v", "grad_out", "grad_q", "grad_k", "grad_v",
        "values", "stat", "grad_stat", "map",
    )
]  # fmt: skip


@triton.jit(
    do_not_specialize=[*STRIDES, "sequences", "heads", "frames", "step", "map_block"],
    do_not_specialize_on_alignment=["space"],
)
def tile_backward_kernel(
    q, k, v, grad_out, grad_q, grad_k, grad_v, values, stat, grad_values, grad_stat, grad_map,
    q_strides, k_strides, v_strides, grad_out_strides, grad_q_strides, grad_k_strides,
    grad_v_strides, values_strides, stat_strides, grad_stat_strides, map_strides,
    sequences, space, heads, frames, step, map_block, scale, signed_scale, strength, rate, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    FRAMES: tl.constexpr, SEQUENCES: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    DETACH: tl.constexpr, GRAD_VALUES: tl.constexpr, GRAD_MAP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``SEQUENCES`` sequences at a time, each padded to ``FRAMES``.

    With ``GRAD_VALUES``, a program goes through all sequences ``program % step``, ``+ step``, … of
    its share and leaves the sum of dΔ over them in ``grad_values``, ``(programs, FRAMES, FRAMES)``;
    ``step`` is 1, or the number of heads where each has its own Δ.
    """
    if GRAD_VALUES:
        group = tl.program_id(0) % step
        chunk = tl.program_id(0) // step
        chunks = tl.num_programs(0) // step
        d_delta = tl.zeros((FRAMES, FRAMES), tl.float32)
        for n in tl.range(chunk, sequences // step, chunks, num_stages=1):
            d_delta += _gradients(
                n * step + group, q, k, v, grad_out, grad_q, grad_k, grad_v, values, stat,
                grad_stat, grad_map, q_strides, k_strides, v_strides, grad_out_strides,
                grad_q_strides, grad_k_strides, grad_v_strides, values_strides, stat_strides,
                grad_stat_strides, map_strides, sequences, space, heads, frames, map_block,
                scale, signed_scale, strength, rate, share, HEAD_DIM, MAIN, REST, FRAMES, 1,
                FORM, PER_HEAD, STAT, CLAMP, DETACH, GRAD_MAP, EVEN, UNIT, OFFSET, NEGATIVE,
                PRECISION,
            )  # fmt: skip
        i = tl.expand_dims(tl.arange(0, FRAMES), 1)
        j = tl.arange(0, FRAMES)
        place = tl.program_id(0).to(tl.int64) * FRAMES * FRAMES
        tl.store(grad_values + place + i * FRAMES + j, d_delta)
    else:
        _gradients(
            tl.program_id(0), q, k, v, grad_out, grad_q, grad_k, grad_v, values, stat,
            grad_stat, grad_map, q_strides, k_strides, v_strides, grad_out_strides,
            grad_q_strides, grad_k_strides, grad_v_strides, values_strides, stat_strides,
            grad_stat_strides, map_strides, sequences, space, heads, frames, map_block,
            scale, signed_scale, strength, rate, share, HEAD_DIM, MAIN, REST, FRAMES, SEQUENCES,
            FORM, PER_HEAD, STAT, CLAMP, DETACH, GRAD_MAP, EVEN, UNIT, OFFSET, NEGATIVE,
            PRECISION,
        )  # fmt: skip


@triton.jit
def _gradients(
    tile, q, k, v, grad_out, grad_q, grad_k, grad_v, values, stat, grad_stat, grad_map,
    q_strides, k_strides, v_strides, grad_out_strides, grad_q_strides, grad_k_strides,
    grad_v_strides, values_strides, stat_strides, grad_stat_strides, map_strides,
    sequences, space, heads, frames, map_block, scale, signed_scale, strength, rate, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    FRAMES: tl.constexpr, SEQUENCES: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    DETACH: tl.constexpr, GRAD_MAP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a tile and returns dΔ of its (one) sequence."""
    sequence = tile
    if SEQUENCES > 1:
        sequence = tl.expand_dims(tile * SEQUENCES + tl.arange(0, SEQUENCES), 1)
    batch, place, head = locate(sequence, space, heads)
    i = tl.arange(0, FRAMES)
    j = tl.arange(0, FRAMES)
    inside = (sequence < sequences) & (i < frames)
    q_rows = first(q_strides, batch, place, head, UNIT, OFFSET) + along(q_strides, i, UNIT, OFFSET)
    k_rows = first(k_strides, batch, place, head, UNIT, OFFSET) + along(k_strides, i, UNIT, OFFSET)
    v_rows = first(v_strides, batch, place, head, UNIT, OFFSET) + along(v_strides, i, UNIT, OFFSET)
    g_rows = first(grad_out_strides, batch, place, head, UNIT, OFFSET)
    g_rows += along(grad_out_strides, i, UNIT, OFFSET)
    q_main, q_rest = load(q, q_rows, inside, HEAD_DIM, MAIN, REST)
    k_main, k_rest = load(k, k_rows, inside, HEAD_DIM, MAIN, REST)
    s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)

    # The statistic, and the logit that it is: (…, FRAMES, FRAMES), 1 there and 0 elsewhere.
    weight = tl.full((1,), 1.0, tl.float32) * (LOG2E / scale)
    if STAT == "row_max" or STAT == "map_max":
        weight, column = tl.max(s, -1, return_indices=True)
        chosen = j == tl.expand_dims(column, -1)
        if STAT == "map_max":
            row_max = tl.where(i < frames, weight, float("-inf"))
            weight, row = tl.max(row_max, -1, return_indices=True, keep_dims=True)
            chosen = chosen & tl.expand_dims(i == row, -1)
    elif STAT == "tensor":
        stat_rows = first(stat_strides, batch, place, head, 1, OFFSET)
        stat_rows += along(stat_strides, i, 1, OFFSET)
        weight = tl.load(stat + stat_rows, mask=inside, other=0.0) * (LOG2E / scale)
    delta = s
    if FORM != "none":
        delta_head = 0
        if PER_HEAD:
            delta_head = tl.expand_dims(head, -1) if SEQUENCES > 1 else head
        delta = regularization(values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN)
        s = regularized(s, weight, strength, delta, CLAMP)
    p = exponentials(s, tl.max(s, -1), scale)
    p = p * tl.expand_dims(1.0 / tl.sum(p, -1), -1)

    g_main, g_rest = load(grad_out, g_rows, inside, HEAD_DIM, MAIN, REST)
    v_main, v_rest = load(v, v_rows, inside, HEAD_DIM, MAIN, REST)
    d_p = product(g_main, transposed(v_main), PRECISION)
    if REST:
        d_p += product(g_rest, transposed(v_rest), PRECISION)
    if GRAD_MAP:
        map_batch = tl.expand_dims(batch, -1) if SEQUENCES > 1 else batch
        d_p += share * map_gradient(grad_map, map_strides, map_batch, i, j, frames, map_block)
    p_transposed = transposed(p.to(q_main.dtype))
    rows = first(grad_v_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_v_strides, i, UNIT, OFFSET)
    d_main = product(p_transposed, g_main, PRECISION)
    d_rest = d_main
    if REST:
        d_rest = product(p_transposed, g_rest, PRECISION)
    store(grad_v, rows, inside, d_main, d_rest, HEAD_DIM, MAIN, REST)

    d_s = p * (d_p - tl.expand_dims(tl.sum(p * d_p, -1), -1))
    d_delta = d_s
    if FORM != "none":
        if STAT != "none" and not DETACH:
            d_weight = strength * tl.sum(d_s * delta, -1)
            if STAT == "map_max":
                d_weight = tl.sum(d_weight, -1, keep_dims=True)
            if CLAMP:
                d_weight = tl.where(weight >= 0.0, d_weight, 0.0)
            if STAT == "tensor":
                rows = first(grad_stat_strides, batch, place, head, 1, OFFSET)
                rows += along(grad_stat_strides, i, 1, OFFSET)
                tl.store(grad_stat + rows, d_weight, mask=inside)
            else:
                d_s += tl.where(chosen, tl.expand_dims(d_weight, -1), 0.0)
        if CLAMP:
            weight = tl.maximum(weight, 0.0)
        d_delta *= tl.expand_dims(weight * (strength * scale / LOG2E), -1)

    d_s_rounded = d_s.to(q_main.dtype)
    rows = first(grad_q_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_q_strides, i, UNIT, OFFSET)
    d_main = product(d_s_rounded, k_main, PRECISION) * signed_scale
    d_rest = d_main
    if REST:
        d_rest = product(d_s_rounded, k_rest, PRECISION) * signed_scale
    store(grad_q, rows, inside, d_main, d_rest, HEAD_DIM, MAIN, REST)

    d_s_rounded = transposed(d_s_rounded)
    rows = first(grad_k_strides, batch, place, head, UNIT, OFFSET)
    rows += along(grad_k_strides, i, UNIT, OFFSET)
    d_main = product(d_s_rounded, q_main, PRECISION) * signed_scale
    d_rest = d_main
    if REST:
        d_rest = product(d_s_rounded, q_rest, PRECISION) * signed_scale
    store(grad_k, rows, inside, d_main, d_rest, HEAD_DIM, MAIN, REST)
    return d_delta
