"""Matrix instructions: of a warp's registers (mma), and of four warps and shared memory (wgmma).

Where a thread's numbers belong in a matrix is from the PTX ISA's figures. A wgmma's product is in
its registers at once, and what it read from shared memory must be the same when it is waited for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.emulator.arithmetic import from_half
from benchmarks.emulator.block import LANES, SHARED_START, Array, Block, Mask, Product, Step
from benchmarks.emulator.memory import FaultError
from benchmarks.emulator.ptx import Immediate, Instruction, Operand, PTXError, Vector
from benchmarks.emulator.transfers import swizzled

GROUP = 4  # warps of a wgmma
WAIT = "wgmma.wait_group"
ATOM = 8  # rows of a matrix that lie together in shared memory
SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a row, by a descriptor's two highest bits
LANE = np.arange(LANES)
ROW, COLUMN = LANE // 4, LANE % 4


def order_of_a(depth: int) -> Array:
    """Returns which of a warp's numbers each element of A ``(16, depth)`` is.

    The numbers are in the order of registers, lanes, and the numbers of a register.
    """
    packed = depth // 8  # numbers in a register: two of 16 bits, one of TF32
    order = np.empty((16, depth), np.int64)
    for register in range(4):
        for n in range(packed):
            row = ROW + 8 * (register % 2)
            column = COLUMN * packed + n + depth // 2 * (register // 2)
            order[row, column] = (register * LANES + LANE) * packed + n
    return order


def order_of_b(depth: int) -> Array:
    """Returns the same of B ``(depth, 8)``."""
    packed = depth // 8
    order = np.empty((depth, 8), np.int64)
    for register in range(2):
        for n in range(packed):
            order[COLUMN * packed + n + depth // 2 * register, ROW] = (
                register * LANES + LANE
            ) * packed + n
    return order


def order_of_c(width: int) -> Array:
    """Returns the same of C ``(16, width)``, of float32."""
    order = np.empty((16, width), np.int64)
    for register in range(width // 2):
        block, place = divmod(register, 4)
        row = ROW + 8 * (place // 2)
        order[row, 8 * block + 2 * COLUMN + place % 2] = register * LANES + LANE
    return order


def gathered(block: Block, registers: Sequence[Operand], order: Array, kind: str) -> Array:
    """Returns each warp's matrix of these registers in float32, ``(warps, …)``."""
    values = np.stack([block.everywhere(block.read(x, "b32")) for x in registers])
    by_warp = values.reshape(len(registers), -1, LANES).swapaxes(0, 1)
    numbers = unpacked(np.ascontiguousarray(by_warp), kind)
    return numbers.reshape(len(numbers), -1)[:, order]


def unpacked(words: Array, kind: str) -> Array:
    """Returns the numbers in words of 32 bits, in float32."""
    if kind == "f32":
        return words.view(np.float32)
    if kind == "tf32":  # its other bits are not looked at
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return from_half(words.view(np.uint16), kind)


def scattered(block: Block, registers: Sequence[Operand], order: Array, matrices: Array) -> None:
    """Writes each warp's matrix to these registers."""
    numbers = np.empty((len(matrices), len(registers) * LANES), np.float32)
    numbers[:, order] = matrices
    for n, register in enumerate(registers):
        block.write(register, numbers[:, n * LANES : (n + 1) * LANES].ravel(), None)


def decode_mma(x: Instruction) -> Step:
    """Decodes D = A·B + C of each warp."""
    shape = SHAPE.fullmatch(x.modifiers[2])
    layouts, (result, kind, other, added) = x.modifiers[3:5], x.modifiers[5:]
    if not shape or layouts != ("row", "col") or result != "f32" or added != "f32" or kind != other:
        raise PTXError(f"{x.text} is not emulated")
    rows, columns, depth = map(int, shape.groups())
    if (rows, columns, depth) not in ((16, 8, 16), (16, 8, 8)) or (depth == 8) != (kind == "tf32"):
        raise PTXError(f"{x.text} is not emulated")
    to, a, b, c = (operand.parts for operand in x.operands)
    orders = order_of_a(depth), order_of_b(depth), order_of_c(columns)

    def multiply(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise FaultError("a part of the threads multiplies matrices")
        left, right = (gathered(block, y, o, kind) for y, o in zip((a, b), orders, strict=False))
        added = gathered(block, c, orders[2], "f32")
        scattered(block, to, orders[2], left @ right + added)

    return multiply


# ---- matrices in shared memory ----


@functools.lru_cache(maxsize=1024)  # of the blocks that a program's loops go through
def places_in_shared(
    descriptor: int, rows: int, depth: int, element: int, *, transposed: bool
) -> Array:
    """Returns the addresses of a matrix ``(rows, depth)`` that a descriptor tells of.

    Eight rows of a swizzle's bytes lie together (of 16 bytes without one). Such atoms follow each
    other by one stride along the rows, and by the other along the products' depth; where the matrix
    is transposed, the rows are what is contiguous in an atom, and the depth is what has eight.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (descriptor >> 49) & 0x100F:  # an offset, absolute strides, other swizzles
        raise PTXError(f"the descriptor {descriptor:#x} of a matrix is not emulated")
    swizzle = SWIZZLES[descriptor >> 62]
    width = swizzle or 16
    i, k = np.indices((rows, depth))
    inner, outer = (i * element, k) if transposed else (k * element, i)
    # Without a swizzle the strides of transposed matrices change places.
    along_inner, along_outer = (
        (stride, leading) if transposed and not swizzle else (leading, stride)
    )
    places = start + inner % width + inner // width * along_inner
    places = places + outer % ATOM * width + outer // ATOM * along_outer
    places = swizzled(places, swizzle)
    places.flags.writeable = False  # as it is returned again
    return places


@dataclass
class SharedMatrix:
    """A matrix that an asynchronous product reads from shared memory, in float32."""

    numbers: Array
    check: Callable[[], None]  # raises FaultError where it is another by now


def matrix_in_shared(
    block: Block,
    descriptor: int,
    rows: int,
    depth: int,
    kind: str,
    warps: Array,
    *,
    transposed: bool,
    waited: bool = False,
) -> SharedMatrix:
    """Reads a matrix ``(rows, depth)`` for these warps, or a unit that an mbarrier waits for."""
    element = 4 if kind == "tf32" else 2
    places = places_in_shared(descriptor, rows, depth, element, transposed=transposed)
    if places.min() < SHARED_START or places.max() + element > block.shared.end:
        raise FaultError(f"a matrix is at bytes {places.min()} to {places.max()}")

    def read() -> Array:
        # Two readers are enough: no warp may write what another one reads, and each differs from
        # one of the two.
        for warp in {warps[0], warps[-1]}:
            block.shared.note_read(places.ravel(), element, int(warp), block.now, waited=waited)
        bits = block.shared.views[element][(places - SHARED_START) // element]
        return unpacked(bits, kind) if element == 4 else from_half(bits, kind)

    found = read()

    def check() -> None:
        if not np.array_equal(read(), found, equal_nan=True):
            raise FaultError("a matrix was written while a product read it")

    return SharedMatrix(found, check)


def decode_wgmma(x: Instruction) -> Step:
    """Decodes the asynchronous products of four warps each, and what waits for them."""
    if x.modifiers[0] == "fence":
        return lambda block, mask: None
    if x.modifiers[0] == "commit_group":
        return lambda block, mask: block.products.append([])
    if x.modifiers[0] == "wait_group":
        return decode_wait(x)
    shape = SHAPE.fullmatch(x.modifiers[3])
    result, kind, other = x.modifiers[4:]
    assert shape is not None
    _, columns, depth = map(int, shape.groups())
    to, a, b, added, *scales = x.operands
    signs, transposes = scales[:2], scales[2:]
    known = kind == other and kind in ("f16", "bf16", "tf32")
    if result != "f32" or not known or any(y != Immediate(1) for y in signs):
        raise PTXError(f"{x.text} is not emulated")
    flags = [bool(y.bits) for y in transposes]  # of B alone where A is in registers
    transposed_b = flags[-1] if flags else False
    transposed_a = flags[0] if len(flags) == 2 else False
    order_a, order_c = order_of_a(depth), order_of_c(columns)

    def multiply(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise FaultError("a part of the threads multiplies matrices")
        left = gathered(block, a.parts, order_a, kind) if isinstance(a, Vector) else None
        # Of products into the same registers none need be waited for before the last.
        names = {register.name for register in to.parts}
        for name in names:
            block.pending.pop(name, None)
        keeps = block.read(added, "pred").any()
        sums = gathered(block, to.parts, order_c, "f32")
        found = np.empty_like(sums)
        for first in range(0, block.threads // LANES, GROUP):
            warps = np.arange(first, first + GROUP)
            if left is None:
                rows = in_shared(block, a, warps, 64, transposed_a).reshape(GROUP, -1, depth)
            else:
                rows = left[warps]
            found[warps] = rows @ in_shared(block, b, warps, columns, transposed_b).T
        scattered(block, to.parts, order_c, found + sums if keeps else found)
        block.pending |= dict.fromkeys(names, WAIT)

    def in_shared(block: Block, given: Operand, warps: Array, rows: int, transposed: bool) -> Array:
        lanes = slice(warps[0] * LANES, (warps[-1] + 1) * LANES)
        told = block.everywhere(block.read(given, "u64"))[lanes]
        if np.any(told != told[0]):
            raise FaultError("threads of a product have different descriptors")
        matrix = matrix_in_shared(
            block, int(told[0]), rows, depth, kind, warps, transposed=transposed
        )
        names = {register.name for register in to.parts}
        block.products[-1].append(Product(names, matrix.check))
        return matrix.numbers

    return multiply


def decode_wait(x: Instruction) -> Step:
    """Decodes the wait for all groups of products but the last ones."""
    (left,) = x.operands
    assert isinstance(left, Immediate)

    def wait(block: Block, mask: Mask) -> None:
        while len(block.products) - 1 > left.bits:
            for product in block.products.popleft():
                product.check()
        under_way = {name for group in block.products for x in group for name in x.registers}
        block.pending = {
            name: what for name, what in block.pending.items() if what != WAIT or name in under_way
        }

    return wait


DECODERS: dict[str, Callable[[Instruction], Step]] = {"mma": decode_mma, "wgmma": decode_wgmma}
