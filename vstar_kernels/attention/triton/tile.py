"""Up to 128 frames: the whole map of a sequence stays on chip.

A program reads queries, keys and values of one or several sequences once and writes their outputs
once. Its floor is that traffic: 4 · B·S·N·H·D elements over the memory's bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vstar_kernels.attention.triton.pieces import (
    LOG2E,
    STRIDES,
    along,
    exponentials,
    first,
    load,
    locate,
    logits,
    product,
    regularization,
    regularized,
    store,
)


@triton.jit(
    do_not_specialize=[*STRIDES, "sequences", "heads", "frames", "chunks"],
    do_not_specialize_on_alignment=["space"],
)
def tile_kernel(
    q, k, v, out, values, stat, map_sums,
    q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
    sequences, space, heads, frames, chunks, scale, strength, rate,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    PERSISTENT: tl.constexpr, MAP: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``SEQUENCES`` sequences at a time, each padded to ``FRAMES``, in blocks of ``ROWS`` queries.

    A ``PERSISTENT`` program goes on to further tiles and keeps Δ for them, which then must be the
    same for all heads. With ``MAP``, ``chunks`` programs share a batch element, and each leaves the
    sum of its sequences' A′ in ``map_sums``, ``(batch, chunks, FRAMES, FRAMES)``; ROWS is FRAMES.
    Tensors that FORM, STAT or MAP do not need may be any.
    """
    if MAP:
        per_batch = space * heads
        batch_first = tl.program_id(0) // chunks * per_batch
        total = tl.zeros((FRAMES, FRAMES), tl.float32)
        if SEQUENCES > 1:
            total = tl.zeros((SEQUENCES, FRAMES, FRAMES), tl.float32)
        tiles = tl.cdiv(per_batch, SEQUENCES)
        for tile in tl.range(tl.program_id(0) % chunks, tiles, chunks, num_stages=1):
            total += _tile(
                batch_first + tile * SEQUENCES, batch_first + per_batch, 0.0,
                q, k, v, out, values, stat,
                q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
                space, heads, frames, scale, strength, rate,
                HEAD_DIM, MAIN, REST, FRAMES, ROWS, SEQUENCES, False,
                FORM, PER_HEAD, STAT, CLAMP, EVEN, UNIT, OFFSET, NEGATIVE, PRECISION,
            )  # fmt: skip
        if SEQUENCES > 1:
            total = tl.sum(total, 0)
        i = tl.expand_dims(tl.arange(0, FRAMES), 1)
        place = tl.program_id(0).to(tl.int64) * FRAMES * FRAMES
        tl.store(map_sums + place + i * FRAMES + tl.arange(0, FRAMES), total)
    elif PERSISTENT:
        j = tl.arange(0, FRAMES)
        delta = regularization(values, values_strides, rate, 0, j, j, frames, FORM, EVEN)
        tiles = tl.cdiv(sequences, SEQUENCES)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
            _tile(
                tile * SEQUENCES, sequences, delta, q, k, v, out, values, stat,
                q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
                space, heads, frames, scale, strength, rate,
                HEAD_DIM, MAIN, REST, FRAMES, ROWS, SEQUENCES, True,
                FORM, PER_HEAD, STAT, CLAMP, EVEN, UNIT, OFFSET, NEGATIVE, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0) * SEQUENCES, sequences, 0.0, q, k, v, out, values, stat,
            q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
            space, heads, frames, scale, strength, rate,
            HEAD_DIM, MAIN, REST, FRAMES, ROWS, SEQUENCES, False,
            FORM, PER_HEAD, STAT, CLAMP, EVEN, UNIT, OFFSET, NEGATIVE, PRECISION,
        )  # fmt: skip


@triton.jit
def _tile(
    first_sequence, sequences, delta, q, k, v, out, values, stat,
    q_strides, k_strides, v_strides, out_strides, values_strides, stat_strides,
    space, heads, frames, scale, strength, rate,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr, DELTA_GIVEN: tl.constexpr,
    FORM: tl.constexpr, PER_HEAD: tl.constexpr, STAT: tl.constexpr, CLAMP: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the outputs of ``SEQUENCES`` sequences, those below ``sequences``; returns A′."""
    sequence = first_sequence
    if SEQUENCES > 1:
        sequence = tl.expand_dims(first_sequence + tl.arange(0, SEQUENCES), 1)
    batch, place, head = locate(sequence, space, heads)
    j = tl.arange(0, FRAMES)
    key_inside = (sequence < sequences) & (j < frames)  # (FRAMES,) or (SEQUENCES, FRAMES)
    q_first = first(q_strides, batch, place, head, UNIT, OFFSET)
    k_rows = first(k_strides, batch, place, head, UNIT, OFFSET) + along(k_strides, j, UNIT, OFFSET)
    v_rows = first(v_strides, batch, place, head, UNIT, OFFSET) + along(v_strides, j, UNIT, OFFSET)
    out_first = first(out_strides, batch, place, head, UNIT, OFFSET)
    k_main, k_rest = load(k, k_rows, key_inside, HEAD_DIM, MAIN, REST)

    weight = LOG2E / scale
    if STAT == "map_max":
        weight = float("-inf")
        for start in tl.static_range(0, FRAMES, ROWS):
            i = start + tl.arange(0, ROWS)
            inside = (sequence < sequences) & (i < frames)
            q_rows = q_first + along(q_strides, i, UNIT, OFFSET)
            q_main, q_rest = load(q, q_rows, inside, HEAD_DIM, MAIN, REST)
            s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)
            row_max = tl.where(i < frames, tl.max(s, -1), float("-inf"))
            weight = tl.maximum(weight, tl.max(row_max, -1))
        if SEQUENCES > 1:
            weight = tl.expand_dims(weight, 1)

    v_main, v_rest = load(v, v_rows, key_inside, HEAD_DIM, MAIN, REST)
    for start in tl.static_range(0, FRAMES, ROWS):
        i = start + tl.arange(0, ROWS)
        inside = (sequence < sequences) & (i < frames)
        q_rows = q_first + along(q_strides, i, UNIT, OFFSET)
        q_main, q_rest = load(q, q_rows, inside, HEAD_DIM, MAIN, REST)
        s = logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)
        if STAT == "row_max":
            weight = tl.max(s, -1)
        elif STAT == "tensor":
            stat_rows = first(stat_strides, batch, place, head, 1, OFFSET)
            stat_rows += along(stat_strides, i, 1, OFFSET)
            weight = tl.load(stat + stat_rows, mask=inside, other=0.0) * (LOG2E / scale)
        if FORM != "none":
            if not DELTA_GIVEN:
                delta_head = 0
                if PER_HEAD:
                    delta_head = tl.expand_dims(head, -1) if SEQUENCES > 1 else head
                delta = regularization(
                    values, values_strides, rate, delta_head, i, j, frames, FORM, EVEN
                )
            s = regularized(s, weight, strength, delta, CLAMP)
        p = exponentials(s, tl.max(s, -1), scale)
        inverse = tl.expand_dims(1.0 / tl.sum(p, -1), -1)
        rounded = p.to(v_main.dtype)
        o_main = product(rounded, v_main, PRECISION) * inverse
        o_rest = o_main
        if REST:
            o_rest = product(rounded, v_rest, PRECISION) * inverse
        out_rows = out_first + along(out_strides, i, UNIT, OFFSET)
        store(out, out_rows, inside, o_main, o_rest, HEAD_DIM, MAIN, REST)
    # The last block's, which is all where the caller wants it; nothing of what is padded.
    return tl.where(tl.expand_dims(inside, -1), p * inverse, 0.0)
