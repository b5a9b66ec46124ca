"""Tensor memory and its matrix instructions (tcgen05), of sm_100.

It has 128 lanes of 512 words; an address is a lane in its upper half and a column in the lower. A
warp reaches a quarter of the lanes. Products are asynchronous: sums are there once the mbarrier of
their commit has been waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.emulator.arithmetic import decode_nothing
from benchmarks.emulator.block import LANES, Array, Block, Mask, Step
from benchmarks.emulator.matrices import SharedMatrix, matrix_in_shared, unpacked
from benchmarks.emulator.memory import FaultError
from benchmarks.emulator.ptx import Address, Immediate, Instruction, Operand, PTXError
from benchmarks.emulator.transfers import addresses, barrier_at, complete

HALF = LANES // 2
DEPTH = 32  # bytes of a product's rows of A and B
FORMATS = {"f16": ("f16", "bf16"), "tf32": (None, None, "tf32")}  # by an instruction's descriptor


def places(block: Block, x: Instruction, count: int) -> tuple[Array, Array]:
    """Returns the lanes and columns of each thread's words, ``(threads, count)``."""
    at = next(y for y in x.operands if isinstance(y, Address))
    start = addresses(block, at, block.thread)
    lane, column = start >> 16, start & 0xFFFF
    own = block.thread % LANES
    if x.modifiers[3] == "32x32b":
        lane = lane + own
    elif x.modifiers[3] == "16x32bx2":  # the upper threads have the same lanes, and other columns
        (split,) = (y.bits for y in x.operands if isinstance(y, Immediate))
        lane, column = lane + own % HALF, column + own // HALF * split
    else:
        raise PTXError(f"{x.text} is not emulated")
    if np.any(lane // LANES != block.warp % 4):
        raise FaultError("a warp reaches for another one's lanes")
    return lane[:, None], column[:, None] + np.arange(count)


def decode_ld(x: Instruction) -> Step:
    """Decodes loads to registers."""
    registers = x.operands[0].parts  # type: ignore[union-attr]

    def load(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise FaultError("a part of the threads loads")
        words = block.tensor_memory[places(block, x, len(registers))]
        for n, register in enumerate(registers):
            block.write(register, words[:, n], None)

    return load


def decode_st(x: Instruction) -> Step:
    """Decodes stores from registers."""
    registers = x.operands[-1].parts  # type: ignore[union-attr]

    def store(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise FaultError("a part of the threads stores")
        words = np.stack([block.everywhere(block.read(y, "b32")) for y in registers], 1)
        block.tensor_memory[places(block, x, len(registers))] = words

    return store


def decode_alloc(x: Instruction) -> Step:
    """Decodes an allocation, whose address goes to shared memory. A program has one."""
    place = x.operands[0]
    assert isinstance(place, Address)

    def allocate(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        at = addresses(block, place, chosen)
        block.shared.store(at, np.zeros((len(chosen), 1), np.uint32), block.warp[chosen], block.now)

    return allocate


def size_of(flags: int) -> tuple[int, int]:
    """Returns the rows and columns of a product, by an instruction's descriptor."""
    return (flags >> 24 & 31) * 16, (flags >> 17 & 63) * 8


def decode_mma(x: Instruction) -> Step:
    """Decodes D = A·B + D, of matrices in shared memory and sums in tensor memory."""
    kind = x.modifiers[-1].removeprefix("kind::")
    to, a, b, told, added = x.operands
    if x.modifiers[1] != "cta_group::1" or kind not in FORMATS:
        raise PTXError(f"{x.text} is not emulated")
    assert isinstance(to, Address)

    def multiply(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        if len(chosen) != 1:
            raise FaultError(f"{len(chosen)} threads multiply matrices of all")

        def one(operand: Operand, kind: str) -> int:
            return int(block.everywhere(block.read(operand, kind))[chosen[0]])

        flags = one(told, "u32")
        format_a, format_b = (flags >> 7) & 7, (flags >> 10) & 7
        numbers = dict(enumerate(FORMATS[kind])).get(format_a)
        changed = flags & 0x600F  # sparse, saturated, negated
        if (flags >> 4) & 3 != 1 or numbers is None or format_b != format_a or changed:
            raise PTXError(f"{x.text}: the types {flags:#x} are not emulated")
        rows, columns = size_of(flags)
        element = 4 if kind == "tf32" else 2
        warps = block.warp[chosen]
        row = np.arange(rows)
        if rows == 64:  # each warp has sixteen
            row = row // 16 * LANES + row % 16

        def part(operand: Address, width: int) -> Any:
            lane, column = divmod(int(addresses(block, operand, chosen)[0]), 1 << 16)
            return np.ix_(lane + row, column + np.arange(width))

        def in_shared(operand: Operand, size: int, transposed: int) -> SharedMatrix:
            return matrix_in_shared(
                block, one(operand, "u64"), size, DEPTH // element, numbers, warps,
                transposed=bool(transposed), waited=True,
            )  # fmt: skip

        right = in_shared(b, columns, flags >> 16 & 1)
        left = None if isinstance(a, Address) else in_shared(a, rows, flags >> 15 & 1)
        keeps, sums = one(added, "pred"), part(to, columns)

        def arrive() -> None:
            right.check()
            if left is not None:
                left.check()
                rows_of_a = left.numbers
            else:
                assert isinstance(a, Address)
                rows_of_a = unpacked(block.tensor_memory[part(a, DEPTH // 4)], numbers)
                rows_of_a = rows_of_a.reshape(rows, -1)
            product = rows_of_a @ right.numbers.T
            if keeps:
                product = product + block.tensor_memory[sums].view(np.float32)
            block.tensor_memory[sums] = np.ascontiguousarray(product).view(np.uint32)

        block.tensor_products.append(arrive)

    return multiply


def decode_commit(x: Instruction) -> Step:
    """Decodes what lets an mbarrier wait for the products so far."""
    (place,) = x.operands
    assert isinstance(place, Address)

    def commit(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        barrier = barrier_at(block, place, chosen)
        complete(barrier)
        products, block.tensor_products = block.tensor_products, []

        def arrive() -> None:
            for product in products:
                product()

        barrier.arrivals -= len(chosen)
        barrier.copies.append((0, arrive))

    return commit


KINDS: dict[str, Callable[[Instruction], Step]] = {
    "ld": decode_ld,
    "st": decode_st,
    "alloc": decode_alloc,
    "dealloc": decode_nothing,
    "relinquish_alloc_permit": decode_nothing,
    "wait::ld": decode_nothing,
    "wait::st": decode_nothing,
    "mma": decode_mma,
    "commit": decode_commit,
}


def decode_tcgen05(x: Instruction) -> Step:
    """Decodes what is done with tensor memory."""
    if x.modifiers[0] not in KINDS:
        raise PTXError(f"{x.text} is not emulated")
    return KINDS[x.modifiers[0]](x)


DECODERS = {"tcgen05": decode_tcgen05}
