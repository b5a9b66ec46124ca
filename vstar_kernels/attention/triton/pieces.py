"""What the kernels share: where a sequence lies, its rows in registers, Δ, and the logits.

- A tile of one sequence is ``(rows, d)``, of several ``(sequences, rows, d)``.
- A head is held in two parts, ``MAIN`` and ``REST`` wide, powers of two: 72 as 64 + 16, not as 128.
- Strides come in units of ``UNIT`` elements, a constant, which tells the compiler how rows are
  aligned.
- Logits and their maxima stay in units of the product qᵀk; ``scale``, which is |scale| · log₂e, is
  applied with the exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Arguments that hold strides. Their units, not their values, are compiled into the kernels.
STRIDES = [f"{name}_strides" for name in ("q", "k", "v", "out", "values", "stat")]
# The interpreter multiplies bfloat16 as the integers that store it; float32 holds it exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def locate(sequence, space, heads):
    """Sequence number → (batch, place in space, head)."""
    place = sequence // heads
    return place // space, place % space, sequence % heads


@triton.jit
def first(strides, batch, place, head, UNIT: tl.constexpr, OFFSET: tl.constexpr):
    """Offset of a sequence's first frame; strides are those of (batch, space, frames, heads)."""
    units = (
        batch.to(OFFSET) * strides[0] + place.to(OFFSET) * strides[1] + head.to(OFFSET) * strides[3]
    )
    return units * UNIT


@triton.jit
def along(strides, frames, UNIT: tl.constexpr, OFFSET: tl.constexpr):
    """Offsets of frames from the first one."""
    return frames.to(OFFSET) * strides[2] * UNIT


@triton.jit
def part(START: tl.constexpr, SIZE: tl.constexpr, rows, inside, HEAD_DIM: tl.constexpr):
    """Offsets and mask of columns START … START + SIZE of rows that start at ``rows``."""
    d = START + tl.arange(0, SIZE)
    offsets = tl.expand_dims(rows, -1) + d
    mask = tl.expand_dims(inside, -1)
    if START + SIZE > HEAD_DIM:
        mask = mask & (d < HEAD_DIM)
    return offsets, mask


@triton.jit
def load(pointer, rows, inside, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of a head in two parts (without a rest, the same), zero where not ``inside``."""
    offsets, mask = part(0, MAIN, rows, inside, HEAD_DIM)
    main = tl.load(pointer + offsets, mask=mask, other=0.0)
    rest = main
    if REST:
        offsets, mask = part(MAIN, REST, rows, inside, HEAD_DIM)
        rest = tl.load(pointer + offsets, mask=mask, other=0.0)
    return main, rest


@triton.jit
def store(
    pointer, rows, inside, main, rest,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The reverse of :func:`load`, rounding to the pointer's type."""
    offsets, mask = part(0, MAIN, rows, inside, HEAD_DIM)
    tl.store(pointer + offsets, main.to(pointer.dtype.element_ty), mask=mask)
    if REST:
        offsets, mask = part(MAIN, REST, rows, inside, HEAD_DIM)
        tl.store(pointer + offsets, rest.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def transposed(x):
    """The last two dimensions swapped."""
    if len(x.shape) == 3:
        y = tl.permute(x, (0, 2, 1))
    else:
        y = tl.permute(x, (1, 0))
    return y


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def logits(
    q_main, q_rest, k_main, k_rest, j, frames,
    REST: tl.constexpr, EVEN: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ / |scale|, ``(…, rows, keys)``, −∞ for key frames ``j`` past the last."""
    s = product(q_main, transposed(k_main), PRECISION)
    if REST:
        s += product(q_rest, transposed(k_rest), PRECISION)
    if NEGATIVE:
        s = -s
    if not EVEN:
        s = tl.where(j < frames, s, float("-inf"))
    return s


@triton.jit
def block_logits(
    q_main, q_rest, k, rows, j, frames,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    EVEN: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of key frames ``j``, which lie at ``rows``."""
    k_main, k_rest = load(k, rows, j < frames, HEAD_DIM, MAIN, REST)
    return logits(q_main, q_rest, k_main, k_rest, j, frames, REST, EVEN, NEGATIVE, PRECISION)


@triton.jit
def blocks_in_window(start, SIZE: tl.constexpr, OTHER: tl.constexpr, window, frames):
    """Which blocks of ``OTHER`` frames are within ``window`` of frames start … start + SIZE − 1.

    From the first of them up to, and without, the second number returned.
    """
    near = tl.maximum(start - window, 0) // OTHER
    far = tl.minimum(tl.cdiv(start + SIZE + window, OTHER), tl.cdiv(frames, OTHER))
    return near, far


@triton.jit
def regularization(
    values, strides, rate, head, i, j, frames, FORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Δᵢⱼ in float32 for query frames ``i`` and key frames ``j``, zero past the last frame.

    ``head`` broadcasts against ``(i, j)``. "gaussian" computes it from rate = √(log₂e / 2) / σ;
    "symmetric" and "signed" read a table over |j − i| and j − i; "dense" reads a matrix.
    """
    i = tl.expand_dims(i, -1)
    if FORM == "gaussian":
        x = (j - i).to(tl.float32) * rate
        delta = tl.exp2(-(x * x))
    else:
        if FORM == "dense":
            offsets = i * strides[1] + j * strides[2]
        elif FORM == "signed":
            offsets = (j - i + strides[1]) * strides[2]
        else:
            offsets = tl.abs(j - i) * strides[2]
        pointers = values + head * strides[0] + offsets
        if EVEN:
            delta = tl.load(pointers).to(tl.float32)
        else:
            delta = tl.load(pointers, mask=(i < frames) & (j < frames), other=0.0).to(tl.float32)
    return delta


@triton.jit
def regularized(s, weight, strength, delta, CLAMP: tl.constexpr):
    """s + strength · weight · Δ; ``weight``, one number or one for each row, in units of s."""
    if CLAMP:
        weight = tl.maximum(weight, 0.0)
    return s + tl.expand_dims(strength * weight, -1) * delta


@triton.jit
def exponentials(s, row_max, scale):
    """exp(φ − its row maximum): one fused multiply-add and one exponential for each logit."""
    return tl.exp2(s * scale - tl.expand_dims(row_max * scale, -1))


@triton.jit
def map_gradient(grad_map, strides, batch, i, j, frames, map_block):
    """G of a batch element, whose rows and columns stand for ``map_block`` frames each."""
    i = tl.expand_dims(i, -1)
    offsets = batch.to(tl.int64) * strides[0]
    offsets = offsets + (i // map_block) * strides[1] + (j // map_block) * strides[2]
    return tl.load(grad_map + offsets, mask=(i < frames) & (j < frames), other=0.0)
