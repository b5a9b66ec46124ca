"""Triton's driver above an emulated GPU: kernels are compiled for it, launched, and run.

``installed`` makes the package take it for a GPU, with tensors of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaLauncher

from benchmarks import stub_driver
from benchmarks.emulator import arithmetic, matrices, ptx, tensor_memory, transfers
from benchmarks.emulator.block import Block, Step
from benchmarks.emulator.counts import Counts, counted
from benchmarks.emulator.memory import Memory
from benchmarks.emulator.ptx import Instruction, Kernel, PTXError
from vstar_kernels.attention.triton.devices import Device

DECODERS = {
    **arithmetic.DECODERS,
    **transfers.DECODERS,
    **matrices.DECODERS,
    **tensor_memory.DECODERS,
}
LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes of a program at most
ENTERED: list[EmulatedGPU] = []  # of this process
NOTHING = {"bra", "ret", "exit"}  # which the block does itself


def decode(instruction: Instruction) -> Step | None:
    """Returns what runs an instruction.

    Raises:
        PTXError: It is not emulated.
    """
    if instruction.name in NOTHING:
        return None
    if instruction.name not in DECODERS:
        raise PTXError(f"{instruction.text} is not emulated")
    try:
        return DECODERS[instruction.name](instruction)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, PTXError):
            raise
        raise PTXError(f"{instruction.text} is not emulated") from error


class Program:
    """A kernel whose instructions are decoded."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps = [decode(x) for x in kernel.instructions]

    def run(
        self,
        grid: int,
        threads: int,
        shared: int,
        parameters: bytes,
        memory: Memory,
        add: Callable[[Counts], None] | None = None,
    ) -> None:
        """Runs all programs of a launch, one after the other; ``add`` is told what they ask for.

        Raises:
            FaultError: One does what a GPU would fail at, or compute wrongly by chance.
        """
        kernel, steps, epoch = self.kernel, self.steps, 1
        if add is not None:
            pairs = zip(kernel.instructions, steps, strict=True)
            steps = [step and counted(x, step, add) for x, step in pairs]
        data = np.frombuffer(parameters, np.uint8).copy()
        memory.add("parameters", data.ctypes.data, len(data))
        with np.errstate(all="ignore"):
            for number in range(grid):
                block = Block(number, grid, threads, shared, memory, epoch)
                for x in kernel.parameters:
                    block.add_parameter(x.name, data[x.offset : x.offset + x.size])
                block.run(kernel, steps)
                epoch = block.epoch + 1


class EmulatedGPU:
    """A GPU of an architecture, with so many processors; few make persistent programs loop."""

    def __init__(self, architecture: str = "sm_90", processors: int = 2) -> None:
        if architecture not in SHARED:
            raise ValueError(
                f"architecture must be one of {', '.join(SHARED)}, got {architecture!r}"
            )
        self.device = Device(architecture, SHARED[architecture], processors)
        self.tensors: list[tuple[int, int]] = []  # of the launch: addresses, bytes
        self.fault: BaseException | None = None
        self.lock = threading.RLock()  # one launch at a time
        self.kernels: dict[int, Program | PTXError] = {}  # or what they have, by their handles
        # What kernels ask for, by their names; None where nobody wants to know.
        self.counts: dict[str, Counts] | None = None

    def at_launch(self, programs: int, threads: int, shared: int, handle: int, given: Any) -> int:
        """Runs a launch; returns the driver's result."""
        try:
            program = self.kernels[handle]
            if isinstance(program, PTXError):
                raise program
            kernel, memory = program.kernel, Memory()
            data = bytearray(kernel.parameter_bytes)
            for x, address in zip(kernel.parameters, given, strict=False):
                data[x.offset : x.offset + x.size] = ctypes.string_at(address, x.size)
            for address, size in self.tensors:
                memory.add("a tensor", address, size)
            add = None if self.counts is None else functools.partial(self.add, kernel.name)
            program.run(programs, threads, shared, bytes(data), memory, add)
        except BaseException as error:  # Ctrl-C too: ctypes would print it, and go on
            self.fault = error
            return LAUNCH_FAILED
        return 0

    def add(self, kernel: str, found: Counts) -> None:
        """Adds to what a kernel has asked for."""
        assert self.counts is not None
        self.counts[kernel] = self.counts.get(kernel, Counts()) + found

    def loaded(self, module: Any, handle: int, name: str, files: dict[str, str], key: str) -> None:
        """Notes the PTX of a kernel that Triton loads."""
        (path,) = (x for x in files.values() if x.endswith(".ptx"))
        try:
            self.kernels[handle] = program_of(Path(path).read_text())
        except PTXError as error:  # each launch raises it: Triton loads a kernel once
            self.kernels[handle] = error

    @contextlib.contextmanager
    def installed(self, folder: Path) -> Iterator[None]:
        """A context in which Triton's kernels run on this GPU, on tensors of the CPU.

        A process may enter one, once.

        Raises:
            RuntimeError: There is no C compiler, or it fails; the process has entered one before,
                or interprets kernels.
        """
        if knobs.runtime.interpret:
            raise RuntimeError("kernels are emulated or interpreted: unset TRITON_INTERPRET")
        if ENTERED:
            raise RuntimeError("this process has had an emulated GPU, and can have no other")
        ENTERED.append(self)
        launch, gpu = CudaLauncher.__call__, self

        def launched(self: CudaLauncher, *arguments: Any) -> None:
            with gpu.lock:
                gpu.tensors = list(extents(arguments))
                gpu.fault = None
                try:
                    launch(self, *arguments)
                except RuntimeError:
                    if gpu.fault is None:
                        raise
                if gpu.fault is not None:
                    raise gpu.fault

        with (
            stub_driver.installed(folder, self.device, self.at_launch),
            knobs.runtime.scope(),
            mock.patch.object(CudaLauncher, "__call__", launched),
            # The assembler would take as long as all before it, and what it makes is not run.
            mock.patch.object(CUDABackend, "make_cubin", return_value=b"not assembled"),
        ):
            knobs.runtime.kernel_load_end_hook.add(self.loaded)
            try:
                yield
            finally:
                knobs.runtime.kernel_load_end_hook.remove(self.loaded)


@functools.lru_cache(maxsize=256)
def program_of(text: str) -> Program:
    """Returns the program of some PTX."""
    return Program(ptx.read(text))


def extents(arguments: Any) -> Iterator[tuple[int, int]]:
    """Yields the memory of tensors among a launch's arguments, those of descriptors too.

    Of a view that is from its first element to its last.
    """
    for x in arguments:
        if isinstance(x, torch.Tensor):
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            yield x.data_ptr(), (last + 1) * x.element_size() if x.numel() else 0
        elif isinstance(x, tuple):
            yield from extents(x)
        elif isinstance(base := getattr(x, "base", None), torch.Tensor):
            yield from extents((base,))
