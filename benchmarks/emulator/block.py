"""One program: its threads, registers and memory, and the way of its threads through the code.

All threads run an instruction together. A register is an array of a number for each thread, or of a
single one where all have the same. Where threads part at a branch, those that are behind run first,
until they come to the others, wait or end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.emulator.memory import UNWRITTEN, FaultError, Memory, Moment, Region
from benchmarks.emulator.ptx import TYPES, Immediate, Kernel, Operand, PTXError, Register

LANES = 32
SHARED_START = 1024  # of a program's shared memory, as on sm_90; TMA asks for multiples of that
Array = NDArray[Any]
Mask = NDArray[np.bool_] | None  # of threads; None for all of them
Step = Callable[["Block", Mask], None]  # what an instruction does


class WaitsError(FaultError):
    """Threads that wait for what others have yet to do."""


@dataclass
class Barrier:
    """An mbarrier: what its phase waits for, and the copies that it has been told of."""

    count: int
    arrivals: int
    expected: int = 0  # bytes
    phase: int = 0
    copies: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # bytes, and how


@dataclass
class Product:
    """A product of matrices that is under way."""

    registers: set[str]  # its result's
    check: Callable[[], None]  # raises FaultError where its matrices are others by now


class Block:
    """A program of a launch."""

    def __init__(
        self, number: int, programs: int, threads: int, shared: int, memory: Memory, epoch: int
    ) -> None:
        self.threads = threads
        self.thread = np.arange(threads)
        self.warp = self.thread // LANES
        self.memory = memory
        self.first = self.epoch = epoch
        space = np.full(shared, UNWRITTEN, np.uint8)
        self.shared = Region("shared memory", SHARED_START, space)
        self.barriers: dict[int, Barrier] = {}
        self.copies: deque[list[Callable[[], None]]] = deque([[]])  # cp.async, by group
        self.products: deque[list[Product]] = deque([[]])  # wgmma, by group
        # The names of registers that something will be in, by what has to be waited for.
        self.pending: dict[str, str] = {}
        # Of sm_100: sums of products, and products that no mbarrier has been told of.
        self.tensor_memory = np.full((128, 512), 0xFFFFFFFF, np.uint32)
        self.tensor_products: list[Callable[[], None]] = []
        self.parameters: dict[str, NDArray[np.uint8]] = {}
        self.registers: dict[str, Array] = {
            "%tid.x": self.thread.astype(np.uint32),
            "%laneid": (self.thread % LANES).astype(np.uint32),
            "%warpid": self.warp.astype(np.uint32),
            "%ctaid.x": np.array([number], np.uint32),
            "%nctaid.x": np.array([programs], np.uint32),
            "%ntid.x": np.array([threads], np.uint32),
            "global_smem": np.array([SHARED_START], np.uint32),
        }

    def add_parameter(self, name: str, data: NDArray[np.uint8]) -> None:
        """Adds a kernel's parameter, whose name stands for its address."""
        self.parameters[name] = data
        self.registers[name] = np.array([data.ctypes.data], np.uint64)

    @property
    def now(self) -> Moment:
        """Which barrier was the last."""
        return Moment(self.epoch, self.first)

    def refuse_parts_of_warps(self, mask: Mask) -> None:
        """Sees to it that all lanes of a warp come to an instruction that waits for them.

        Raises:
            WaitsError: Some are elsewhere.
        """
        if mask is not None and np.any(np.ptp(mask.reshape(-1, LANES).view(np.int8), 1)):
            raise WaitsError("a part of a warp does what all of it must")

    def pass_barrier(self) -> None:
        """All threads have met."""
        self.epoch += 1

    def chosen(self, mask: Mask) -> NDArray[np.int64]:
        """Returns the numbers of the threads in a mask."""
        return self.thread if mask is None else np.flatnonzero(mask)

    def everywhere(self, value: Array) -> Array:
        """Returns a number for each thread."""
        return value if value.shape == self.thread.shape else np.broadcast_to(value, self.threads)

    def read(self, operand: Operand, kind: str) -> Array:
        """Returns an operand as numbers of a type."""
        dtype = TYPES[kind]
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array([operand.bits != 0])
            size = dtype.itemsize
            bits = operand.bits & ((1 << 8 * size) - 1)
            return np.array([bits], f"u{size}").view(dtype)
        assert isinstance(operand, Register), operand
        found = self.registers.get(operand.name)
        if operand.name in self.pending:
            raise FaultError(f"reads {operand.name} without {self.pending[operand.name]}")
        if found is None:
            if operand.dtype is None:
                raise PTXError(f"{operand.name} is not emulated")
            found = ~np.zeros(1, operand.dtype)  # of what nobody has written: NaN
        if found.dtype == dtype:
            return found
        if found.dtype.itemsize > dtype.itemsize:  # the low part, as of b16 for b8
            found = found.astype(f"u{dtype.itemsize}")
        return found.view(dtype)

    def write(self, operand: Operand, value: Array, mask: Mask) -> None:
        """Writes numbers to a register, of the threads in the mask."""
        assert isinstance(operand, Register), operand
        if operand.name == "_":
            return
        dtype = operand.dtype
        if dtype is None:
            raise PTXError(f"{operand.name} is written, and is no register")
        if operand.name in self.pending:
            raise FaultError(f"writes {operand.name} without {self.pending[operand.name]}")
        if value.dtype != dtype:
            if value.dtype.itemsize == dtype.itemsize:
                value = value.view(dtype)
            elif value.dtype.kind == "f":
                raise PTXError(f"{value.dtype} is written to {operand.name}, {dtype}")
            else:
                value = value.astype(dtype if value.dtype.kind != "i" else f"i{dtype.itemsize}")
                value = value.view(dtype)
        if mask is not None:
            before = self.registers.get(operand.name)
            value = np.where(mask, value, ~np.zeros(1, dtype) if before is None else before)
        self.registers[operand.name] = value

    def run(self, kernel: Kernel, steps: Sequence[Step | None]) -> None:
        """Runs the program to its end; a step is what an instruction does, None for branches.

        Raises:
            FaultError: It does what a GPU would fail at, or compute wrongly by chance.
        """
        ways = [Way(0, None)]
        while ways:
            running = [x for x in ways if not x.waits and x.misses is None]
            if running:
                way = min(running, key=lambda x: x.at)
                ways.remove(way)
                found = self._follow(way, ways, kernel, steps)
                if [x.at for x in found] != [way.at]:  # what others have waited for may be there
                    for other in ways:
                        other.misses = None
                ways = _joined([*ways, *found])
                continue
            for way in ways:
                if way.misses is not None:
                    raise way.misses
            ways = _joined(ways)
            for way in ways:
                self.refuse_parts_of_warps(way.threads)
                way.waits = False
            self.pass_barrier()
        # Copies would arrive in what is another program's memory by then.
        if any(size for x in self.barriers.values() for size, _ in x.copies):
            raise FaultError(f"program {self.registers['%ctaid.x'][0]} ends before its copies")

    def _follow(
        self,
        way: Way,
        others: list[Way],
        kernel: Kernel,
        steps: Sequence[Step | None],
    ) -> list[Way]:
        """Runs threads until they end, part, wait, or come to where others are; returns them."""
        at, active, code = way.at, way.threads, kernel.instructions
        running = [x.at for x in others if not x.waits and x.misses is None]
        until = min(running, default=len(code))
        while at < until:
            instruction = code[at]
            at += 1
            mask = active
            if instruction.guard is not None:
                told = self.read(instruction.guard, "pred") != instruction.negated
                mask = _both(active, told)
                if mask is not active and not mask.any():  # type: ignore[union-attr]
                    continue
            if instruction.name == "bar" and instruction.modifiers[0] != "warp":
                if mask is not active:
                    raise FaultError(f"a part of the threads waits: {instruction.text}")
                if others:
                    return [Way(at, active, waits=True)]
                self.refuse_parts_of_warps(active)
            if instruction.name in ("bra", "ret", "exit"):
                target = kernel.labels[instruction.target] if instruction.target else len(code)
                if mask is not active:
                    left = ~mask if active is None else active & ~mask  # type: ignore[operator]
                    return [Way(target, mask), Way(at, left)]
                at = target
                continue
            step = steps[at - 1]
            assert step is not None
            try:
                step(self, mask)
            except FaultError as fault:
                number = self.registers["%ctaid.x"][0]
                where = f"program {number}, {instruction.source}, {instruction.text}"
                named = FaultError(f"{fault}: {where}")
                if isinstance(fault, WaitsError) and others:
                    return [Way(at - 1, active, misses=named)]
                raise named from None
        return [Way(at, active)] if at < len(code) else []


@dataclass
class Way:
    """Threads that are at the same instruction, or wait there for all or for an mbarrier."""

    at: int
    threads: Mask
    waits: bool = False  # at the barrier before it
    misses: FaultError | None = None  # what is missing as long as nobody else does anything


def _joined(ways: list[Way]) -> list[Way]:
    """Joins threads that are at the same place, where some may have missed the others."""
    found: dict[tuple[int, bool], Way] = {}
    for way in ways:
        other = found.setdefault((way.at, way.waits), way)
        if other is not way:
            assert other.threads is not None
            assert way.threads is not None
            together = other.threads | way.threads
            other.threads = None if together.all() else together
            other.misses = None
    return list(found.values())


def _both(active: Mask, told: Array) -> Mask:
    """Returns the mask of the active threads that a guard lets run; ``active`` if it is all."""
    if told.size == 1:
        return active if told[0] else np.zeros(1, bool)
    mask = told if active is None else told & active
    everyone = mask.all() if active is None else not (active & ~mask).any()
    return active if everyone else mask
