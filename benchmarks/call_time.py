"""``python -m benchmarks.call_time``: a call's Python time on the Triton backend, without a GPU.

A call goes all the way from the public function through Triton's launcher in C, down to a driver
that does nothing (``stub_driver``). A tensor on a GPU asks torch for the current device and its
stream besides, and allocates from torch's own pool. Prints a Markdown table, in microseconds:

- *call*: the whole call;
- *launch*: what of it Triton's launch of a compiled kernel takes;
- *torch*: torch's operators in it, by themselves: allocations, and with columns two more;
- *rest*: what is left, this package's own;
- *checked*, with ``--compare``: the whole call, where it is not known again but checked every time;
- *searched*, with ``--compare``: and where Triton searches for its kernel every time, too.

Each time is the least of several rounds, in which what is timed alternates and Python's garbage
collector is off (``timeit``). *launch* is the difference of two such times, and *rest* what is left
of the call. Needs a C compiler, as Triton does.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel

import vstar_kernels as vk
from benchmarks.report.tables import Table
from benchmarks.stub_driver import installed
from vstar_kernels.attention import triton as tar
from vstar_kernels.attention.call_cache import CallCache
from vstar_kernels.attention.triton import columns, frames
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.cli.options import integer, parsed, read_options

HEADS, HEAD_DIM = 8, 64
Variants = list[tuple[Callable[[], Any], Callable[[], AbstractContextManager[None]]]]
HEAD = ["call", "call, µs", "launch", "torch", "rest"]


@dataclass(frozen=True)
class Options:
    """Measure the Python time of a call on the Triton backend."""

    rounds: Annotated[int, parsed(integer(1), "N")] = 15
    calls: Annotated[int, parsed(integer(1), "N")] = 2000
    """Of a round."""
    compare: bool = False
    """Measure each call, too, where it is checked every time, and its kernel is searched for."""


def tensors(*tokens: int) -> list[torch.Tensor]:
    """Returns a tensor of each of these lengths."""
    return [torch.zeros(2, n, HEADS, HEAD_DIM, dtype=torch.bfloat16) for n in tokens]


@dataclass(frozen=True)
class Case:
    """A call, its tensors, and torch's operators in it."""

    name: str
    tensors: list[torch.Tensor]
    call: Callable[[], Any]
    of_torch: Callable[[], Any]


def cases() -> Iterator[Case]:
    """Yields the calls."""
    bias, table = vk.GaussianBias(1.0), vk.ToeplitzBias(torch.rand(16))
    for name, length, given in (
        ("tar_attention, 16 frames", 16, bias),
        ("tar_attention, 16 frames, a table", 16, table),
        ("tar_attention, 1,024 frames", 1024, bias),
    ):
        qkv = tensors(length, length, length)

        def attend(qkv: Any = qkv, given: Any = given) -> Any:
            return vk.tar_attention(*qkv, given, backend="triton")

        yield Case(name, qkv, attend, functools.partial(torch.empty_like, qkv[0]))
    query, key, value = tensors(256, 77, 77)
    weights = torch.rand(77, 4)
    # The maps of a share of the heads, which are added up, as there are few queries for this GPU.
    maps = torch.empty(HEADS, 2, 256, 4)

    def of_columns() -> None:
        torch.empty_like(query)
        torch.empty(maps.shape, dtype=torch.float32, device=query.device)
        weights.expand(2, 77, 4)
        maps.sum(0)

    yield Case(
        "column_attention, 77 keys",
        [query, key, value, weights],
        lambda: vk.column_attention(query, key, value, weights, backend="triton"),
        of_columns,
    )
    layout, rule = vk.Layout(vk.Frames(4, 64)), vk.FrameRule.window(1)
    video = tensors(256, 256, 256)
    yield Case(
        "frame_attention, a window",
        video,
        lambda: vk.frame_attention(*video, layout, rule, backend="triton"),
        functools.partial(torch.empty_like, video[0]),
    )


def check(call: Callable[[], Any], given: Iterable[torch.Tensor]) -> None:
    """Raises AssertionError unless a later call launches what the first one launched.

    Tensors are compared by their type, and those that are given to the call by their address;
    the call makes the others anew. Nothing of a profiler's metadata need be the same.
    """
    launches: list[Any] = []
    launch = CudaLauncher.__call__
    addresses = {x.data_ptr() for x in given}

    def shown(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            address = x.data_ptr()
            return x.dtype, address if address in addresses else None
        return x if x is None or isinstance(x, int | float) else type(x)

    def recorded(self: Any, *arguments: Any) -> None:
        launches.append((self, [shown(x) for x in _leaves(arguments)]))
        launch(self, *arguments)

    forget()
    with mock.patch.object(CudaLauncher, "__call__", recorded):
        call()
        first = list(launches)
        launches.clear()
        call()
    assert first, "nothing was launched"
    assert launches == first, "a later call launches something else"


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for one in x:
            yield from _leaves(one)
    else:
        yield x


def forget() -> None:
    """Forgets all plans, and with them the compiled kernels."""
    for module in (tar, columns, frames):
        module._forward_plan.cache_clear()


@contextmanager
def keeping_nothing_to_launch() -> Iterator[None]:
    """A context in which plans keep kernels that launch nothing, after a first launch by Triton."""

    def nothing(*arguments: Any) -> None:
        pass

    with mock.patch.object(CompiledKernel, "__getitem__", return_value=nothing):
        yield


@contextmanager
def checking() -> Iterator[None]:
    """A context in which no call is known again."""

    def nothing(*arguments: Any) -> None:
        pass

    with mock.patch.multiple(CallCache, get=nothing, put=nothing):
        yield


@contextmanager
def searching() -> Iterator[None]:
    """The same, in which plans keep no kernel, and Triton searches for it at every launch."""
    with checking(), mock.patch.object(Launch, "_keeps", False):
        yield


def microseconds(variants: Variants, options: Options) -> list[float]:
    """Returns the least time of each function in its context, divided by its calls."""
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(options.rounds):
        for (function, context), found in zip(variants, times, strict=True):
            forget()
            with context():
                function()
                found.append(timeit.timeit(function, number=options.calls))
    forget()
    return [1e6 * min(x) / options.calls for x in times]


@torch.no_grad()
def measure(options: Options) -> Iterator[list[str]]:
    """Yields a row for each call."""
    for case in cases():
        check(case.call, case.tensors)
        variants: Variants = [
            (case.call, nullcontext),
            (case.call, keeping_nothing_to_launch),
            (case.of_torch, nullcontext),
        ]
        if options.compare:
            variants += [(case.call, checking), (case.call, searching)]
        whole, without, of_torch, *compared = microseconds(variants, options)
        figures = (whole, whole - without, of_torch, without - of_torch, *compared)
        yield [case.name, *(f"{x:.1f}" for x in figures)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table; returns the exit status."""
    options = read_options(Options, arguments, prog="python -m benchmarks.call_time")
    if tar.interpreted():
        print("interpreted kernels are not launched: unset TRITON_INTERPRET", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            with installed(Path(folder)):
                note = f"Triton {triton.__version__}, torch {torch.__version__}."
                head = [*HEAD, "checked", "searched"] if options.compare else HEAD
                print(Table("", head, list(measure(options)), note).markdown())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
