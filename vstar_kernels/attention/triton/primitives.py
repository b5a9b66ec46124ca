"""What the kernels share: where frames lie, heads in registers, logits and Δ.

Names in the kernels, after flash-linear-attention: ``p_`` is a pointer, ``o_`` are offsets in
elements, ``m_`` is a mask, ``b_`` a block of numbers in registers, ``i_`` an index. ``i`` and ``j``
by themselves are the numbers of query frames and key frames, as in Δᵢⱼ. What is compiled in is in
upper case. Shapes stand after the blocks: ``(I, J)`` is a block of the map, ``(I, D)`` and
``(J, D)`` are frames of queries and of keys; where a program has several sequences at a time, there
is a dimension for them before these. Of what takes an ``AXIS``, that is the dimension of the keys:
with 0 a block of the map is transposed, ``(J, I)``.

``HEAD``, ``BIAS`` and ``numbers`` are the tuples of :mod:`plan`.

- A block of heads is a pair, ``HEAD.MAIN`` and ``HEAD.REST`` wide, powers of two: 72 as 64 + 16,
  not as 128. Where there is no rest, the pair holds the main part twice, and one is not used.
- Strides come in units of ``HEAD.UNIT`` elements, which tells the compiler how frames are aligned,
  and hidden, so that it is told nothing else of them: see :func:`plan.hidden`.
- Logits and row statistics stay in units of the product qᵀk; |scale| · log₂e is applied with the
  exponential.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vstar_kernels.attention.triton import interpreter

LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter multiplies bfloat16 as the integers that store it; float32 holds it exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
if INTERPRETED.value:
    interpreter.take_masks_of_numbers()


class Sizes(NamedTuple):
    """A call's shape. A kernel makes the tuple; as its argument it would be specialized on."""

    space: Any
    heads: Any
    frames: Any


class Place(NamedTuple):
    """Where a sequence is; each a number, or ``(sequences, 1)``."""

    batch: Any
    space: Any
    head: Any


@triton.jit
def locate(i_sequence, sizes):
    """Returns the place of a sequence."""
    i = i_sequence // sizes.heads
    return Place(i // sizes.space, i % sizes.space, i_sequence % sizes.heads)


@triton.jit
def sequences_of_range(i_range, length, step):
    """Returns the head of a range, if ``step`` is the heads, its first sequence and its end.

    Every ``length`` sequences are ``step`` ranges, which take turns.
    """
    i_head = i_range % step
    i_span = i_range // step
    return i_head, i_span * length + i_head, (i_span + 1) * length


@triton.jit
def stride(strides, DIMENSION: tl.constexpr):
    """Returns one of the strides that :func:`plan.hidden` hid."""
    return (-1 - strides[DIMENSION]) >> 1


@triton.jit
def units_to_sequence(strides, place, HEAD: tl.constexpr):
    """Returns where a sequence begins, in what strides of (batch, space, frames, heads) are in."""
    return (
        place.batch.to(HEAD.OFFSET) * stride(strides, 0)
        + place.space.to(HEAD.OFFSET) * stride(strides, 1)
        + place.head.to(HEAD.OFFSET) * stride(strides, 3)
    )


@triton.jit
def sequence_offset(strides, place, HEAD: tl.constexpr):
    """Returns the offset of a sequence's first frame; the strides are in units."""
    return units_to_sequence(strides, place, HEAD) * HEAD.UNIT


@triton.jit
def frame_offsets(strides, i, HEAD: tl.constexpr):
    """Returns the offsets of frames from their sequence's first one."""
    return i.to(HEAD.FRAME_OFFSET) * stride(strides, 2) * HEAD.UNIT


@triton.jit
def statistic_offsets(strides, place, i, HEAD: tl.constexpr):
    """Returns the offsets of frames in a tensor without head_dim, whose strides are in elements."""
    return units_to_sequence(strides, place, HEAD) + i.to(HEAD.FRAME_OFFSET) * stride(strides, 2)


@triton.jit
def part_offsets(START: tl.constexpr, SIZE: tl.constexpr, o_frames, m_frames, HEAD: tl.constexpr):
    """Returns offsets and mask of elements START … START + SIZE − 1 of each frame's head."""
    d = START + tl.arange(0, SIZE)
    o_part = tl.expand_dims(o_frames, -1) + d
    m_part = tl.expand_dims(m_frames, -1)
    if START + SIZE > HEAD.HEAD_DIM:
        m_part = m_part & (d < HEAD.HEAD_DIM)
    return o_part, m_part


@triton.jit
def load_heads(p, o_frames, m_frames, HEAD: tl.constexpr):
    """Loads the head of each frame, ``(frames, D)`` in two parts, zero where it is masked."""
    o_part, m_part = part_offsets(0, HEAD.MAIN, o_frames, m_frames, HEAD)
    main = tl.load(p + o_part, mask=m_part, other=0.0)
    rest = main
    if HEAD.REST:
        o_part, m_part = part_offsets(HEAD.MAIN, HEAD.REST, o_frames, m_frames, HEAD)
        rest = tl.load(p + o_part, mask=m_part, other=0.0)
    return main, rest


@triton.jit
def store_heads(p, o_frames, m_frames, b, HEAD: tl.constexpr):
    """Stores what :func:`load_heads` loads, rounded to the pointer's type."""
    o_part, m_part = part_offsets(0, HEAD.MAIN, o_frames, m_frames, HEAD)
    tl.store(p + o_part, b[0].to(p.dtype.element_ty), mask=m_part)
    if HEAD.REST:
        o_part, m_part = part_offsets(HEAD.MAIN, HEAD.REST, o_frames, m_frames, HEAD)
        tl.store(p + o_part, b[1].to(p.dtype.element_ty), mask=m_part)


@triton.jit
def load_frames(p, strides, place, i, m_i, HEAD: tl.constexpr):
    """Loads a sequence's frames ``i`` as :func:`load_heads` does."""
    p_start, o_start = sequence_start(p, strides, place, HEAD)
    return load_heads(p_start, o_start + frame_offsets(strides, i, HEAD), m_i, HEAD)


@triton.jit
def store_frames(p, strides, place, i, m_i, b, HEAD: tl.constexpr):
    """Stores what :func:`load_frames` loads, rounded to the pointer's type."""
    p_start, o_start = sequence_start(p, strides, place, HEAD)
    store_heads(p_start, o_start + frame_offsets(strides, i, HEAD), m_i, b, HEAD)


@triton.jit
def sequence_start(p, strides, place, HEAD: tl.constexpr):
    """Returns a pointer and an offset that together are where a sequence begins.

    Of one sequence in a large tensor the pointer is all, which leaves its frames offsets of 32 bits
    and spares their registers. In small tensors offsets that are added up take fewer.
    """
    p_start = p
    o_start = sequence_offset(strides, place, HEAD)
    if HEAD.OFFSET.primitive_bitwidth == 64 and len(o_start.shape) == 0:
        p_start += o_start
        o_start = 0
    return p_start, o_start


@triton.jit
def store_sum(p_sums, b_sum, FRAMES: tl.constexpr):
    """Stores a program's sum of maps, ``(FRAMES, FRAMES)``, behind those of the programs before."""
    i = tl.expand_dims(tl.arange(0, FRAMES), 1)
    o_sum = tl.program_id(0).to(tl.int64) * FRAMES * FRAMES
    tl.store(p_sums + o_sum + i * FRAMES + tl.arange(0, FRAMES), b_sum)


@triton.jit
def zero_heads(FRAMES: tl.constexpr, HEAD: tl.constexpr):
    """Returns zeros for sums of heads, ``(FRAMES, D)`` in two parts."""
    MAIN: tl.constexpr = HEAD.MAIN
    REST: tl.constexpr = HEAD.REST if HEAD.REST else HEAD.MAIN
    return tl.zeros((FRAMES, MAIN), tl.float32), tl.zeros((FRAMES, REST), tl.float32)


@triton.jit
def transposed(b):
    """Returns a block with its last two dimensions swapped."""
    if len(b.shape) == 3:
        b_t = tl.permute(b, (0, 2, 1))
    else:
        b_t = tl.permute(b, (1, 0))
    return b_t


@triton.jit
def product(b_x, b_y, HEAD: tl.constexpr):
    """Returns x @ y in float32."""
    if INTERPRETED:
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision=HEAD.PRECISION)


@triton.jit
def inner_products(b_x, b_y, HEAD: tl.constexpr):
    """Returns x @ yᵀ of two blocks of heads, ``(I, D)`` and ``(J, D)``: ``(I, J)``."""
    b_s = product(b_x[0], transposed(b_y[0]), HEAD)
    if HEAD.REST:
        b_s += product(b_x[1], transposed(b_y[1]), HEAD)
    return b_s


@triton.jit
def weighted_sums(b_p, b_x, HEAD: tl.constexpr):
    """Returns p @ x of weights ``(I, J)`` and a block of heads ``(J, D)``: ``(I, D)``."""
    main = product(b_p, b_x[0], HEAD)
    rest = main
    if HEAD.REST:
        rest = product(b_p, b_x[1], HEAD)
    return main, rest


@triton.jit
def add_weighted_sums(b_sum, b_p, b_x, HEAD: tl.constexpr):
    """Returns the sum with p @ x of :func:`weighted_sums` added to it."""
    main = b_sum[0] + product(b_p, b_x[0], HEAD)
    rest = b_sum[1]
    if HEAD.REST:
        rest = b_sum[1] + product(b_p, b_x[1], HEAD)
    return main, rest


@triton.jit
def times(b_x, factor):
    """Returns a block of heads times a number, or times one for each frame, ``(I, 1)``."""
    return b_x[0] * factor, b_x[1] * factor


@triton.jit
def logits(b_q, b_k, j, frames, HEAD: tl.constexpr):
    """Returns φ / |scale|, ``(I, J)``, −∞ for frames ``j`` past the last.

    ``j`` are the second block's frames: those of queries, where queries and keys change places.
    They are masked after the product, which is NaN where a frame of the first block is infinite.
    """
    b_s = inner_products(b_q, b_k, HEAD)
    if HEAD.NEGATIVE:
        b_s = -b_s
    if not HEAD.EVEN:
        b_s = tl.where(j < frames, b_s, float("-inf"))
    return b_s


@triton.jit
def blocks_in_window(start, SIZE: tl.constexpr, OTHER: tl.constexpr, window, frames):
    """Returns which blocks of ``OTHER`` frames are within ``window`` of start … start + SIZE − 1.

    They are those from the first number returned up to, and without, the second.
    """
    near = tl.maximum(start - window, 0) // OTHER
    far = tl.minimum(tl.cdiv(start + SIZE + window, OTHER), tl.cdiv(frames, OTHER))
    return near, far


@triton.jit
def delta_block(
    p_delta, strides, i_head, i, j, frames, falloff, HEAD: tl.constexpr, BIAS: tl.constexpr,
    AXIS: tl.constexpr = -1,
):  # fmt: skip
    """Returns Δᵢⱼ in float32, ``(I, J)``, zero past the last frame.

    ``i_head`` is one number, or one for each of several sequences. A Gaussian is computed;
    "symmetric" and "signed" read a table over |j − i| and j − i; "dense" reads a matrix.
    """
    i = tl.expand_dims(i, AXIS)
    j = tl.expand_dims(j, -1 - AXIS)
    if BIAS.FORM == "gaussian":
        x = (j - i).to(tl.float32) * falloff
        b_delta = tl.exp2(-(x * x))
    else:
        if BIAS.FORM == "dense":
            o_delta = i.to(HEAD.FRAME_OFFSET) * stride(strides, 1) * BIAS.UNIT + j
        elif BIAS.FORM == "signed":
            o_delta = j - i + stride(strides, 1)
        else:
            o_delta = tl.abs(j - i)
        p = p_delta + o_delta
        if BIAS.PER_HEAD:
            i_matrix = tl.expand_dims(i_head, -1) if len(i_head.shape) == 2 else i_head
            p += i_matrix.to(HEAD.OFFSET) * stride(strides, 0) * BIAS.UNIT
        if HEAD.EVEN:
            b_delta = tl.load(p).to(tl.float32)
        else:
            b_delta = tl.load(p, mask=(i < frames) & (j < frames), other=0.0).to(tl.float32)
    return b_delta


@triton.jit
def larger(x, y):
    """Returns the larger number, NaN where either is: tl.maximum drops it."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_or(b_max, b, KEEP_DIMS: tl.constexpr):
    """Returns the maxima ``b_max`` of the last dimension of ``b``, NaN where tl.max dropped one."""
    nan = tl.max((b != b).to(tl.int32), -1, keep_dims=KEEP_DIMS)
    return tl.where(nan != 0, float("nan"), b_max)


@triton.jit
def largest(b):
    """Returns the maxima of the last dimension, NaN where there is one."""
    return nan_or(tl.max(b, -1), b, False)


@triton.jit
def regularized(b_s, b_stat, b_delta, strength, BIAS: tl.constexpr, AXIS: tl.constexpr = -1):
    """Returns s + strength · stat · Δ; ``b_stat`` is one number or one for each row, as s is."""
    if BIAS.CLAMP:
        b_stat = larger(b_stat, 0.0)
    return b_s + tl.expand_dims(strength * b_stat, AXIS) * b_delta


@triton.jit
def subtrahend(b_max):
    """Returns what to subtract from logits: rows' maxima, 0 for rows masked (−∞) up to here."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def exponentials(b_s, b_max, exp2_scale):
    """Returns exp(φ − its row maximum): 1 where it is largest, however large.

    Scaled first, they would be rounded differently by a multiply-add: from |φ| ≈ 2²⁹ on, what that
    leaves has an exponential beyond float16's numbers, and from 2³¹ on beyond float32's.
    """
    return tl.exp2((b_s - tl.expand_dims(b_max, -1)) * exp2_scale)


class Normalizer(NamedTuple):
    """Rows' sums of exponentials: maxima, and logarithms of the sums of :func:`exponentials`.

    They stay apart: next to a maximum of −10⁹, as where a bias masks all keys of a row, one float32
    has no room for the logarithm of their number.
    """

    max: Any  # (I,)
    log2: Any  # (I,), binary


@triton.jit
def store_normalizer(p, o_row, m_row, b_max, b_total):
    """Stores rows' :class:`Normalizer`, of their maxima and sums of exponentials."""
    tl.store(p + o_row * 2, b_max, mask=m_row)
    tl.store(p + o_row * 2 + 1, tl.log2(b_total), mask=m_row)


@triton.jit
def load_normalizer(p, o_row, m_row):
    """Loads rows' :class:`Normalizer`; of those that are masked, all finite logits weigh 0."""
    b_max = tl.load(p + o_row * 2, mask=m_row, other=0.0)
    return Normalizer(b_max, tl.load(p + o_row * 2 + 1, mask=m_row, other=float("inf")))


@triton.jit
def normalized(b_s, normalizer, exp2_scale, AXIS: tl.constexpr = -1):
    """Returns A′ ``(I, J)`` of logits and their rows' normalizer.

    None is larger than that of the maximum, which exact ones would not be. Of huge logits a
    rounding is many powers of two: those here that were computed again, in blocks of another shape,
    may be larger than what their rows' sums are of.
    """
    b_log2 = tl.expand_dims(normalizer.log2, AXIS)
    b_p = (b_s - tl.expand_dims(normalizer.max, AXIS)) * exp2_scale - b_log2
    return tl.exp2(tl.minimum(b_p, -b_log2, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def map_gradient(
    p_grad_map, strides, i_batch, i_head, i, j, m_i, frames, map_block, AXIS: tl.constexpr = -1
):
    """Returns the mean map's gradient ``(I, J)``; one of its numbers is for a block of frames."""
    i = tl.expand_dims(i, AXIS)
    j = tl.expand_dims(j, -1 - AXIS)
    o_map = i_batch.to(tl.int64) * stride(strides, 0) + i_head.to(tl.int64) * stride(strides, 1)
    o_map = o_map + (i // map_block).to(tl.int64) * stride(strides, 2) + j // map_block
    m_map = tl.expand_dims(m_i, AXIS) & (j < frames)
    return tl.load(p_grad_map + o_map, mask=m_map, other=0.0)
