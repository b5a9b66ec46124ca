"""Instructions that move numbers between registers and memory, and copies that are under way.

A copy arrives as late as it may, when a thread waits for it; until then its place holds NaN.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.emulator.arithmetic import decode_nothing
from benchmarks.emulator.block import LANES, Array, Barrier, Block, Mask, Step, WaitsError
from benchmarks.emulator.memory import EVERY_WARP, UNWRITTEN, FaultError, Memory, Region
from benchmarks.emulator.ptx import (
    TYPES,
    Address,
    Immediate,
    Instruction,
    Operand,
    PTXError,
    Vector,
)

BOX_ALIGNMENT = 128
ROW = 8  # rows of a matrix of ldmatrix, of 16 bytes
SPACES = {"global", "shared", "shared::cta", "param"}


def addresses(block: Block, operand: Address, chosen: Array) -> Array:
    """Returns the addresses of these threads."""
    size = block.registers[operand.base.name].dtype.itemsize
    base = block.read(operand.base, f"s{8 * size}").astype(np.int64)
    return block.everywhere(base)[chosen] + operand.offset


def shared_address(block: Block, operand: Address, chosen: Array) -> int:
    """Returns an address in shared memory that these threads have in common."""
    found = np.unique(addresses(block, operand, chosen))
    if len(found) != 1:
        raise FaultError("threads have different addresses")
    return int(found[0])


def count_of(x: Instruction) -> int:
    """Returns how many numbers a load or a store moves for each thread."""
    return next((int(y[1:]) for y in x.modifiers if re.fullmatch(r"v\d", y)), 1)


def registers_of(operand: Operand) -> tuple[Operand, ...]:
    """Returns the registers that a load or a store names."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def memory_of(block: Block, x: Instruction) -> Memory | Region:
    """Returns the memory that a load or a store goes to."""
    return block.memory if x.modifiers[0] == "global" else block.shared


def decode_ld(x: Instruction) -> Step:
    """Decodes loads."""
    to, place = x.operands[:2]
    size = TYPES[x.type].itemsize
    kind = f"{'i' if x.type[0] == 's' else 'u'}{size}"  # a wider register is filled up by its sign
    if x.modifiers[0] not in SPACES:
        raise PTXError(f"{x.text} is not emulated")
    if x.modifiers[0] == "param":
        name, offset = place.base.name, place.offset

        def load_parameter(block: Block, mask: Mask) -> None:
            data = block.parameters[name][offset : offset + size]
            block.write(to, data.view(kind), mask)

        return load_parameter
    targets, count = registers_of(to), count_of(x)

    def load(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        found = memory_of(block, x).load(
            addresses(block, place, chosen), size, count, block.warp[chosen], block.now
        )
        for n, register in enumerate(targets):
            values = np.zeros(block.threads, kind)
            values[chosen] = found[:, n].view(kind)
            block.write(register, values, mask)

    return load


def decode_st(x: Instruction) -> Step:
    """Decodes stores."""
    place, given = x.operands[:2]
    if x.modifiers[0] not in SPACES - {"param"}:
        raise PTXError(f"{x.text} is not emulated")
    kind = "b" + x.type[1:]
    sources = registers_of(given)

    def store(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        values = np.stack([block.everywhere(block.read(y, kind))[chosen] for y in sources], 1)
        memory_of(block, x).store(
            addresses(block, place, chosen), values, block.warp[chosen], block.now
        )

    return store


def decode_ldmatrix(x: Instruction) -> Step:
    """Decodes loads of 8 × 8 matrices of 16 bits, whose rows a lane each has the address of."""
    to, place = x.operands
    count, transposed = len(to.parts), "trans" in x.modifiers

    def load(block: Block, mask: Mask) -> None:
        chosen = row_threads(block, mask, count)
        warps = block.warp[chosen]
        rows = block.shared.load(addresses(block, place, chosen), 4, 4, warps, block.now)
        matrices = rows.view(np.uint16).reshape(-1, count, ROW, ROW)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        # Lane l has two neighbours of row l / 4.
        parts = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
        for n, register in enumerate(to.parts):
            block.write(register, parts[:, n].ravel(), None)

    return load


def decode_stmatrix(x: Instruction) -> Step:
    """Decodes stores of what ldmatrix loads."""
    place, given = x.operands
    count, transposed = len(given.parts), "trans" in x.modifiers

    def store(block: Block, mask: Mask) -> None:
        chosen = row_threads(block, mask, count)
        parts = [block.everywhere(block.read(y, "b32")).reshape(-1, LANES) for y in given.parts]
        matrices = np.stack(parts, 1).view(np.uint16).reshape(-1, count, ROW, ROW)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4)
        at = addresses(block, place, chosen)
        block.shared.store(at, rows, block.warp[chosen], block.now)

    return store


def row_threads(block: Block, mask: Mask, count: int) -> Array:
    """Returns the threads that have addresses of so many matrices' rows."""
    if mask is not None:
        raise PTXError("matrices of a part of the threads are not emulated")
    return block.thread[block.thread % LANES < count * ROW]


# ---- copies that each thread asks for ----


def decode_cp(x: Instruction) -> Step:
    """Decodes asynchronous copies: of each thread, in groups, or of a block by a tensor map."""
    if x.modifiers[:2] == ("async", "commit_group"):
        return lambda block, mask: block.copies.append([])
    if x.modifiers[:2] == ("async", "wait_group"):
        return decode_wait(x)
    if x.modifiers[:3] == ("async", "bulk", "tensor"):
        return decode_tensor_copy(x)
    if x.modifiers[0] != "async" or x.modifiers[2:] != ("shared", "global"):
        raise PTXError(f"{x.text} is not emulated")

    def copy(block: Block, mask: Mask) -> None:
        found = copies(block, x, mask)
        loads, warps = found.loads, found.warps
        values = np.zeros((len(warps), found.size // 4), np.uint32)
        unknown = np.full_like(values, np.uint32(0x01010101 * UNWRITTEN))
        block.shared.store(found.target, unknown, warps, block.now)

        def arrive() -> None:
            values[loads] = block.memory.load(
                found.source[loads], 4, values.shape[1], warps[loads], block.now
            )
            block.shared.store(found.target, values, warps, block.now)

        block.copies[-1].append(arrive)

    return copy


class Copies(NamedTuple):
    """What threads copy to shared memory, ``size`` bytes each where they load, and else zeros."""

    target: Array
    source: Array
    warps: Array
    loads: Array
    size: int


def copies(block: Block, x: Instruction, mask: Mask) -> Copies:
    """Returns what a cp.async copies."""
    to, given, size, *rest = x.operands
    assert isinstance(size, Immediate)
    chosen = block.chosen(mask)
    target, source = (addresses(block, y, chosen) for y in (to, given))
    wanted = np.full(len(chosen), size.bits)
    if rest:
        wanted = block.everywhere(block.read(rest[0], "u32"))[chosen]
    if np.any((wanted != 0) & (wanted != size.bits)):
        raise PTXError(f"{x.text}: parts of a copy are not emulated")
    return Copies(target, source, block.warp[chosen], wanted != 0, size.bits)


def decode_wait(x: Instruction) -> Step:
    """Decodes the wait for all groups of copies but the last ones."""
    (left,) = x.operands
    assert isinstance(left, Immediate)

    def wait(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PTXError("a wait of a part of the threads is not emulated")
        while len(block.copies) - 1 > left.bits:
            for arrive in block.copies.popleft():
                arrive()

    return wait


# ---- copies of blocks by tensor maps ----


@dataclass(frozen=True)
class TensorMap:
    """What ``stub_driver`` writes of a tensor map; dimensions are innermost first."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all but the innermost
    box: tuple[int, ...]
    element: int  # bytes
    swizzle: int  # bytes of a row, 0 if there is none

    LAYOUT = "<QII5Q5Q5II"

    @classmethod
    def read(cls, data: bytes) -> TensorMap:
        """Reads a map."""
        address, rank, element, *rest = struct.unpack_from(cls.LAYOUT, data)
        sizes, strides, box, swizzle = rest[:5], rest[5:10], rest[10:15], rest[15]
        return cls(
            address, tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]), element,
            (0, 32, 64, 128)[swizzle],
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """The bytes of a box."""
        return self.element * int(np.prod(self.box))


def swizzled(places: Array, row: int) -> Array:
    """Returns the places in shared memory of what would lie at these in rows of so many bytes.

    Of 128 bytes, the eight parts of 16 bytes are exchanged by the row's number in its eight.
    """
    return places ^ ((places >> 3) & (row - 1 & ~15)) if row else places


def box_places(tensor: TensorMap, coordinates: list[int]) -> tuple[Array, Array, Array]:
    """Returns where a box's elements lie in memory, whether they are there, and in which order."""
    index = np.indices(tensor.box[::-1]).reshape(len(tensor.box), -1)[::-1]
    place = [n + start for n, start in zip(index, coordinates, strict=True)]
    there = np.all([(p >= 0) & (p < size) for p, size in zip(place, tensor.sizes, strict=True)], 0)
    strides = (tensor.element, *tensor.strides)
    source = tensor.address + sum(p * s for p, s in zip(place, strides, strict=True))
    return source, there, np.arange(len(there)) * tensor.element


def decode_tensor_copy(x: Instruction) -> Step:
    """Decodes a copy of a box of a tensor to shared memory, of which an mbarrier is told."""
    to, given, told = x.operands
    # A program is a cluster by itself, which Triton 3.6 writes.
    if x.modifiers[4] not in ("shared::cta", "shared::cluster") or x.modifiers[5] != "global":
        raise PTXError(f"{x.text} is not emulated")

    def copy(block: Block, mask: Mask) -> None:
        for thread in block.chosen(mask):
            copy_box(block, block.thread[thread : thread + 1])

    def copy_box(block: Block, one: Array) -> None:
        (start,) = addresses(block, to, one)
        if start % BOX_ALIGNMENT:
            raise FaultError(f"a copy to {start:#x}, no multiple of {BOX_ALIGNMENT}")
        tensor, source, there, order = box_of(block, given, one)
        target = swizzled(start + order, tensor.swizzle)
        kind = np.dtype(f"u{tensor.element}")
        unknown = np.full((len(target), tensor.element), UNWRITTEN, np.uint8).view(kind)
        block.shared.store(target, unknown, np.full(len(target), block.warp[one[0]]), block.now)

        def arrive() -> None:
            values = np.zeros((len(target), 1), kind)
            readers = np.full(int(there.sum()), EVERY_WARP)
            values[there] = block.memory.load(source[there], tensor.element, 1, readers, block.now)
            block.shared.arrive(target, values)

        barrier_at(block, told, one).copies.append((tensor.bytes, arrive))

    return copy


def box_of(block: Block, given: Address, one: Array) -> tuple[TensorMap, Array, Array, Array]:
    """Returns the tensor map that one thread copies a box by, and the :func:`box_places`."""
    (at,) = addresses(block, given, one)
    layout = struct.calcsize(TensorMap.LAYOUT)
    tensor = TensorMap.read(block.memory.bytes_at(int(at), layout))
    place = [int(block.everywhere(block.read(x, "s32"))[one[0]]) for x in given.coordinates]
    return tensor, *box_places(tensor, place)


def barrier_at(block: Block, place: Address, chosen: Array) -> Barrier:
    """Returns the mbarrier at an address, which these threads use."""
    at = shared_address(block, place, chosen)
    warps = block.warp[chosen]
    block.shared.load(np.full(len(chosen), at), 8, 1, warps, block.now)
    if at not in block.barriers:
        raise FaultError(f"there is no mbarrier at {at:#x}")
    return block.barriers[at]


def decode_mbarrier(x: Instruction) -> Step:
    """Decodes what is done with mbarriers."""
    what, place = x.modifiers[0], next(y for y in x.operands if isinstance(y, Address))

    def overwrite(block: Block, mask: Mask) -> int:
        chosen = block.chosen(mask)
        at = shared_address(block, place, chosen)
        nothing = np.zeros((len(chosen), 1), np.uint64)
        block.shared.store(np.full(len(chosen), at), nothing, block.warp[chosen], block.now)
        return at

    def begin(block: Block, mask: Mask) -> None:
        count = int(block.read(x.operands[1], "u32")[0])
        at = overwrite(block, mask)
        block.barriers[at] = Barrier(count, count)

    def end(block: Block, mask: Mask) -> None:
        at = overwrite(block, mask)
        if block.barriers.pop(at).copies:
            raise FaultError("an mbarrier ends before its copies have arrived")

    def arrive(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        barrier = barrier_at(block, place, chosen)
        complete(barrier)
        barrier.arrivals -= len(chosen)
        if "expect_tx" in x.modifiers:
            barrier.expected += int(block.read(x.operands[-1], "u32")[0]) * len(chosen)

    def wait(block: Block, mask: Mask) -> None:
        chosen = block.chosen(mask)
        barrier = barrier_at(block, place, chosen)
        parity = np.unique(block.everywhere(block.read(x.operands[2], "u32"))[chosen])
        if len(parity) != 1:
            raise FaultError("threads wait for different phases of an mbarrier")
        if barrier.phase % 2 == parity[0]:
            complete(barrier)
        if barrier.phase % 2 == parity[0]:
            sent = sum(size for size, _ in barrier.copies)
            raise WaitsError(
                f"waits forever: {barrier.arrivals} arrivals are missing, and"
                f" {barrier.expected - sent} of {barrier.expected} bytes"
            )
        block.write(x.operands[0], np.ones(1, bool), mask)

    steps: dict[str, Step] = {"init": begin, "inval": end, "arrive": arrive, "try_wait": wait}
    return steps[what]


def complete(barrier: Barrier) -> None:
    """Ends the phase of an mbarrier if nothing that it waits for is missing."""
    if barrier.arrivals == 0 and barrier.expected == sum(size for size, _ in barrier.copies):
        for _, arrive in barrier.copies:
            arrive()
        barrier.copies.clear()
        barrier.phase, barrier.arrivals, barrier.expected = barrier.phase + 1, barrier.count, 0


# ---- barriers of a program ----


def decode_bar(x: Instruction) -> Step:
    """Decodes the barrier of all threads, and of those of a warp, which run together anyway."""
    if x.modifiers[0] == "warp":
        return decode_nothing(x)
    if x.modifiers[0] != "sync" or x.operands != (Immediate(0),):
        raise PTXError(f"{x.text} is not emulated")

    return lambda block, mask: block.pass_barrier()


DECODERS = {
    "ld": decode_ld,
    "st": decode_st,
    "ldmatrix": decode_ldmatrix,
    "stmatrix": decode_stmatrix,
    "cp": decode_cp,
    "mbarrier": decode_mbarrier,
    "bar": decode_bar,
}
