"""What a kernel asks of a GPU's units, counted as it runs.

These are what the counters of a GPU count: instructions of warps, exponentials of threads,
operations of matrix instructions, sectors of global memory and cycles of shared memory.

Shared memory has 32 banks of four bytes and gives a warp one word of each in a cycle. So a warp's
access takes a cycle for each 128 bytes, of eight threads where each has 16 bytes, and more where
different words are in one bank. Matrix instructions that read shared memory themselves are counted
with as many cycles as their matrices have bytes, as the layouts that they read have no conflicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np

from benchmarks.emulator.block import LANES, Array, Block, Mask, Step
from benchmarks.emulator.matrices import GROUP, SHAPE
from benchmarks.emulator.ptx import TYPES, Address, Instruction, Vector
from benchmarks.emulator.tensor_memory import DEPTH, size_of
from benchmarks.emulator.transfers import ROW, addresses, box_of, copies, count_of

SECTOR = 32  # bytes that global memory moves at least
BANKS, WORD = 32, 4  # of shared memory; bytes
CYCLE = BANKS * WORD  # bytes of shared memory in a cycle
ROW_BYTES = 16  # of a matrix of ldmatrix


@dataclass(frozen=True)
class Counts:
    """What programs have asked for."""

    instructions: int = 0  # of warps, of PTX, without branches and what no thread runs
    exponentials: int = 0  # of threads
    operations: int = 0  # of matrix instructions, two for a multiply-add
    sectors: int = 0  # of global memory, read and written; a warp asks for each once
    shared: int = 0  # cycles of shared memory
    conflicts: int = 0  # those of them that the banks cost

    def __add__(self, other: Counts) -> Counts:
        """Returns both together."""
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


Counting = Callable[[Block, Mask], Counts]


def counted(x: Instruction, step: Step, add: Callable[[Counts], None]) -> Step:
    """Returns an instruction's step that says first what it asks for."""
    count = KINDS[x.name](x) if x.name in KINDS else None

    def run(block: Block, mask: Mask) -> None:
        chosen = block.warp[block.chosen(mask)]
        found = Counts(instructions=int(np.count_nonzero(np.diff(chosen, prepend=-1))))
        add(found + count(block, mask) if count else found)
        step(block, mask)

    return run


def distinct(first: Array, second: Array) -> tuple[Array, Array]:
    """Returns the pairs of numbers that there are, each once, in order."""
    found = np.unique(first.astype(np.int64) << 48 | second)
    return found >> 48, found & ((1 << 48) - 1)


def asked(at: Array, width: int, warps: Array) -> Counts:
    """Counts sectors, of threads that each want so many bytes from an address."""
    places = np.concatenate([at, at + width - 1]) // SECTOR
    return Counts(sectors=len(distinct(np.concatenate([warps, warps]), places)[0]))


def cycles(at: Array, width: int, threads: Array) -> Counts:
    """Counts cycles of shared memory, of threads that each want so many bytes from an address."""
    turns = threads * max(width, WORD) // CYCLE  # those of a warp have theirs in one cycle
    words = at[:, None] // WORD + np.arange(max(width // WORD, 1))
    turn, word = distinct(np.broadcast_to(turns[:, None], words.shape).ravel(), words.ravel())
    place, count = np.unique(turn * BANKS + word % BANKS, return_counts=True)
    longest = np.zeros(int(turns.max(initial=-1)) + 1, np.int64)
    np.maximum.at(longest, place // BANKS, count)
    total = int(longest.sum())
    return Counts(shared=total, conflicts=total - len(np.unique(turns)))


def count_access(x: Instruction) -> Counting | None:
    """Counts loads and stores."""
    place = next(y for y in x.operands if isinstance(y, Address))
    width = TYPES[x.type].itemsize * count_of(x)
    if x.modifiers[0] == "param":
        return None

    def count(block: Block, mask: Mask) -> Counts:
        chosen = block.chosen(mask)
        at = addresses(block, place, chosen)
        if x.modifiers[0] == "global":
            return asked(at, width, block.warp[chosen])
        return cycles(at, width, chosen)

    return count


def count_rows(x: Instruction) -> Counting:
    """Counts ldmatrix and stmatrix: a matrix' eight rows in a cycle."""
    place = next(y for y in x.operands if isinstance(y, Address))
    (registers,) = (y for y in x.operands if isinstance(y, Vector))

    def count(block: Block, mask: Mask) -> Counts:
        chosen = block.thread[block.thread % LANES < ROW * len(registers.parts)]
        return cycles(addresses(block, place, chosen), ROW_BYTES, chosen)

    return count


def count_copy(x: Instruction) -> Counting | None:
    """Counts asynchronous copies to shared memory, at both ends."""
    if x.modifiers[:3] == ("async", "bulk", "tensor"):

        def count_box(block: Block, mask: Mask) -> Counts:
            given = x.operands[1]
            assert isinstance(given, Address)
            return sum((of_box(block, given, n) for n in block.chosen(mask)), Counts())

        return count_box
    if x.modifiers[1] in ("commit_group", "wait_group"):
        return None

    def count(block: Block, mask: Mask) -> Counts:
        found = copies(block, x, mask)
        read = asked(found.source[found.loads], found.size, found.warps[found.loads])
        return read + cycles(found.target, found.size, block.chosen(mask))

    return count


def of_box(block: Block, given: Address, thread: int) -> Counts:
    """Counts the copy of a box that a thread asks for: what of it is there, and its room."""
    tensor, source, there, _ = box_of(block, given, np.array([thread]))
    touched = len(np.unique(source[there] // SECTOR))
    return Counts(sectors=touched, shared=tensor.bytes // CYCLE)


def count_product(x: Instruction) -> Counting | None:
    """Counts products of matrices, and what those of four warps read of shared memory."""
    found = next(filter(None, map(SHAPE.fullmatch, x.modifiers)), None)
    if not found:  # of wgmma, fences and waits
        return None
    rows, columns, depth = map(int, found.groups())
    width = 4 if x.type == "tf32" else 2
    in_registers = isinstance(x.operands[1], Vector)
    warps = GROUP if x.name == "wgmma" else 1
    read = (columns + (0 if in_registers else rows)) * depth * width if x.name == "wgmma" else 0

    def count(block: Block, mask: Mask) -> Counts:
        groups = block.threads // LANES // warps
        return Counts(operations=groups * 2 * rows * columns * depth, shared=groups * read // CYCLE)

    return count


def count_tensor_memory(x: Instruction) -> Counting | None:
    """Counts the products of sm_100."""
    if x.modifiers[0] != "mma":
        return None

    _, a, _, told, _ = x.operands
    width = 4 if x.type == "kind::tf32" else 2

    def count(block: Block, mask: Mask) -> Counts:
        flags = int(block.everywhere(block.read(told, "u32"))[block.chosen(mask)[0]])
        rows, columns = size_of(flags)
        read = (columns + (0 if isinstance(a, Address) else rows)) * DEPTH
        operations = 2 * rows * columns * DEPTH // width
        return Counts(operations=operations, shared=read // CYCLE)

    return count


def count_exponential(x: Instruction) -> Counting:
    """Counts exponentials."""
    return lambda block, mask: Counts(exponentials=len(block.chosen(mask)))


KINDS: dict[str, Callable[[Instruction], Counting | None]] = {
    "ld": count_access,
    "st": count_access,
    "ldmatrix": count_rows,
    "stmatrix": count_rows,
    "cp": count_copy,
    "mma": count_product,
    "wgmma": count_product,
    "tcgen05": count_tensor_memory,
    "ex2": count_exponential,
}
