"""``python -m benchmarks.call_time``: a call's Python time on the Triton backend, without a GPU.

A call goes all the way from the public function through Triton's launcher in C, down to a driver
that does nothing (``stub_driver``). A tensor on a GPU asks torch for the current device and its
stream besides, and allocates from torch's own pool. Prints a Markdown table, in microseconds:

- *call*: the whole call;
- *launch*: what of it Triton's launch of a compiled kernel takes;
- *output*: allocating the output, by itself;
- *rest*: what is left, this package's own.

Each is the least of several rounds. Needs a C compiler, as Triton does.
"""

from __future__ import annotations

import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import tyro
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel

import vstar_kernels as vk
from benchmarks.report.tables import Table
from benchmarks.stub_driver import installed
from vstar_kernels.attention import triton as tar
from vstar_kernels.attention.triton import columns, frames

HEADS, HEAD_DIM = 8, 64
HEAD = ["call", "call, µs", "launch", "output", "rest"]


@dataclass(frozen=True)
class Options:
    """Measure the Python time of a call on the Triton backend."""

    rounds: int = 15
    calls: int = 2000
    """Of a round."""


def tensors(*tokens: int) -> list[torch.Tensor]:
    """Returns a tensor of each of these lengths."""
    return [torch.zeros(2, n, HEADS, HEAD_DIM, dtype=torch.bfloat16) for n in tokens]


def cases() -> Iterator[tuple[str, torch.Tensor, Callable[[], Any]]]:
    """Yields the names of calls, the tensor that their output is like, and the calls."""
    bias, table = vk.GaussianBias(1.0), vk.ToeplitzBias(torch.rand(16))
    for name, length, given in (
        ("tar_attention, 16 frames", 16, bias),
        ("tar_attention, 16 frames, a table", 16, table),
        ("tar_attention, 1,024 frames", 1024, bias),
    ):
        qkv = tensors(length, length, length)

        def attend(qkv: Any = qkv, given: Any = given) -> Any:
            return vk.tar_attention(*qkv, given, backend="triton")

        yield name, qkv[0], attend
    query, key, value = tensors(256, 77, 77)
    weights = torch.rand(77, 4)
    yield (
        "column_attention, 77 keys",
        query,
        lambda: vk.column_attention(query, key, value, weights, backend="triton"),
    )
    layout, rule = vk.Layout(vk.Frames(4, 64)), vk.FrameRule.window(1)
    video = tensors(256, 256, 256)
    yield (
        "frame_attention, a window",
        video[0],
        lambda: vk.frame_attention(*video, layout, rule, backend="triton"),
    )


def check(call: Callable[[], Any]) -> None:
    """Raises AssertionError unless a later call launches what the first one launched."""
    launches: list[Any] = []
    launch = CudaLauncher.__call__

    def recorded(self: Any, *arguments: Any) -> None:
        # Neither the outputs' addresses nor a profiler's metadata need be the same.
        numbers = [x for x in _leaves(arguments) if isinstance(x, int | float)]
        launches.append((self, numbers))
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
def launching_nothing() -> Iterator[None]:
    """A context in which what is compiled launches nothing."""

    def nothing(*arguments: Any) -> None:
        pass

    forget()
    with mock.patch.object(CompiledKernel, "__getitem__", return_value=nothing):
        yield
    forget()


def microseconds(function: Callable[[], Any], options: Options) -> float:
    """Returns the least time of a round, divided by its calls."""
    function()
    times = timeit.repeat(function, number=options.calls, repeat=options.rounds)
    return 1e6 * min(times) / options.calls


@torch.no_grad()
def measure(options: Options) -> Iterator[list[str]]:
    """Yields a row for each call."""
    for name, like, call in cases():
        check(call)
        whole = microseconds(call, options)
        with launching_nothing():
            without = microseconds(call, options)
        output = microseconds(lambda like=like: torch.empty_like(like), options)
        figures = (whole, whole - without, output, without - output)
        yield [name, *(f"{x:.1f}" for x in figures)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table; returns the exit status."""
    options = tyro.cli(Options, prog="python -m benchmarks.call_time", args=arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with installed(Path(folder)):
                note = f"Triton {triton.__version__}, torch {torch.__version__}."
                print(Table("", HEAD, list(measure(options)), note).markdown())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
