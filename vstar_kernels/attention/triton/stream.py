"""More than 128 frames: keys stream past a block of queries, as in flash attention.

Where Δ vanishes outside a window, exact at nearly flash attention's cost for a window ≪ N::

    keys outside the window   online softmax of φ, which also finds their row maximum
    keys in the window        row maximum only: no exponentials, no values
    keys in the window again  the row maximum is final now: online softmax with the bias

The extra work is QKᵀ over the window. A Δ without a window makes that two passes over all keys; a
statistic that is known beforehand needs one. Operations: 4·B·S·H·N²·D, and 2·B·S·H·N·W·D for a
window of W keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vstar_kernels.attention.triton.pieces import (
    LOG2E,
    STRIDES,
    along,
    block_logits,
    blocks_in_window,
    exponentials,
    first,
    load,
    locate,
    product,
    regularization,
    regularized,
    store,
)


@triton.jit(
    do_not_specialize=[*STRIDES, "heads", "frames", "window"],
    do_not_specialize_on_alignment=["space"],
)
def stream_kernel(
    q, k, v, out, values, stat, lse, weights,
    q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
    space, heads, frames, scale, strength, rate, window,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of one sequence against all keys, ``KEYS`` at a time.

    Δᵢⱼ counts as zero for |j − i| > ``window``. With ``STAT`` "map_max", ``stat`` holds the maxima
    that :func:`map_max_kernel` left, ``(sequences, blocks of queries)``. ``SAVE`` writes for each
    row the binary logarithm of the sum of its exponentials, and the weight of Δ, ``(sequences,
    frames)``.
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
    v += first(v_strides, batch, place, head, UNIT, OFFSET)

    # Blocks near … far − 1 of keys meet the window.
    key_blocks = tl.cdiv(frames, KEYS)
    near = 0
    far = 0
    if FORM != "none":
        near, far = blocks_in_window(start, ROWS, KEYS, window, frames)

    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o_main = tl.zeros((ROWS, MAIN), tl.float32)
    o_rest = tl.zeros((ROWS, REST if REST else MAIN), tl.float32)
    for n in tl.range(0, key_blocks - (far - near), num_stages=STAGES):
        j = tl.where(n < near, n, n + (far - near)) * KEYS + tl.arange(0, KEYS)
        s = block_logits(
            q_main, q_rest, k, along(k_strides, j, UNIT, OFFSET), j, frames,
            HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
        )  # fmt: skip
        v_rows = along(v_strides, j, UNIT, OFFSET)
        row_max, total, o_main, o_rest = _accumulate(
            s, v, v_rows, j, frames, scale, row_max, total, o_main, o_rest,
            HEAD_DIM, MAIN, REST, PRECISION,
        )  # fmt: skip

    if FORM != "none":
        weight = LOG2E / scale
        if STAT == "row_max":
            weight = row_max
            for n in tl.range(near, far, num_stages=STAGES):
                j = n * KEYS + tl.arange(0, KEYS)
                s = block_logits(
                    q_main, q_rest, k, along(k_strides, j, UNIT, OFFSET), j, frames,
                    HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
                )  # fmt: skip
                weight = tl.maximum(weight, tl.max(s, 1))
        elif STAT == "map_max":
            weight = float("-inf")
            for n in range(blocks):
                weight = tl.maximum(weight, tl.load(stat + sequence.to(tl.int64) * blocks + n))
        elif STAT == "tensor":
            stat_rows = first(stat_strides, batch, place, head, 1, OFFSET)
            stat_rows += along(stat_strides, i, 1, OFFSET)
            weight = tl.load(stat + stat_rows, mask=inside, other=0.0) * (LOG2E / scale)

        delta_head = head if PER_HEAD else 0
        for n in tl.range(near, far, num_stages=STAGES):
            j = n * KEYS + tl.arange(0, KEYS)
            s = block_logits(
                q_main, q_rest, k, along(k_strides, j, UNIT, OFFSET), j, frames,
                HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
            )  # fmt: skip
            delta = regularization(
                values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
            )
            s = regularized(s, weight, strength, delta, CLAMP)
            v_rows = along(v_strides, j, UNIT, OFFSET)
            row_max, total, o_main, o_rest = _accumulate(
                s, v, v_rows, j, frames, scale, row_max, total, o_main, o_rest,
                HEAD_DIM, MAIN, REST, PRECISION,
            )  # fmt: skip

    if SAVE:
        saved = sequence.to(tl.int64) * frames + i
        tl.store(lse + saved, row_max * scale + tl.log2(total), mask=inside)
        if FORM != "none":
            tl.store(weights + saved, tl.zeros((ROWS,), tl.float32) + weight, mask=inside)
    inverse = tl.expand_dims(1.0 / total, 1)
    out += first(out_strides, batch, place, head, UNIT, OFFSET)
    out_rows = along(out_strides, i, UNIT, OFFSET)
    store(out, out_rows, inside, o_main * inverse, o_rest * inverse, HEAD_DIM, MAIN, REST)


@triton.jit
def _accumulate(
    s, v, rows, j, frames, scale, row_max, total, o_main, o_rest,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax (Milakov and Gimelshein, 2018): adds the keys of ``s`` to the sums."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    shrink = tl.exp2((row_max - new_max) * scale)
    p = exponentials(s, new_max, scale)
    total = total * shrink + tl.sum(p, 1)
    v_main, v_rest = load(v, rows, j < frames, HEAD_DIM, MAIN, REST)
    p = p.to(v_main.dtype)
    o_main = o_main * tl.expand_dims(shrink, 1) + product(p, v_main, PRECISION)
    if REST:
        o_rest = o_rest * tl.expand_dims(shrink, 1) + product(p, v_rest, PRECISION)
    return new_max, total, o_main, o_rest


@triton.jit(
    do_not_specialize=["q_strides", "k_strides", "heads", "frames"],
    do_not_specialize_on_alignment=["space"],
)
def map_max_kernel(
    q, k, maxima, q_strides, k_strides, space, heads, frames,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of each block of ``ROWS`` queries: 2·B·S·H·N²·D operations."""
    blocks = tl.cdiv(frames, ROWS)
    batch, place, head = locate(tl.program_id(0) // blocks, space, heads)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    q_rows = first(q_strides, batch, place, head, UNIT, OFFSET) + along(q_strides, i, UNIT, OFFSET)
    q_main, q_rest = load(q, q_rows, i < frames, HEAD_DIM, MAIN, REST)
    k += first(k_strides, batch, place, head, UNIT, OFFSET)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    for n in tl.range(0, tl.cdiv(frames, KEYS), num_stages=STAGES):
        j = n * KEYS + tl.arange(0, KEYS)
        s = block_logits(
            q_main, q_rest, k, along(k_strides, j, UNIT, OFFSET), j, frames,
            HEAD_DIM, MAIN, REST, EVEN, NEGATIVE, PRECISION,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(s, 1))
    row_max = tl.where(i < frames, row_max, float("-inf"))
    tl.store(maxima + tl.program_id(0).to(tl.int64), tl.max(row_max, 0))
