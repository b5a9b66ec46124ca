"""``python -m benchmarks.columns_cpu``: what column_attention costs on this processor.

For the cross-attention of each level of a text-to-video UNet, with the maps of four words, the
peers of the ``cross`` suite are timed in turn with it, forward and, for the gradient of the queries
alone, forward and backward; medians. The time over that without maps is our own operator's. With
one thread it is the time that the processor gave to it, in which others' work is not. Prints a
Markdown table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.clock import CpuClock, TimedCall, WarmCall, time_in_turn
from benchmarks.column_adapters import PEERS, ColumnAttention, columns_of_words
from benchmarks.machine import Watch
from benchmarks.record import write_record
from benchmarks.report.tables import Table
from vstar_kernels.cli.options import read_options

OURS = "vstar_kernels"
WITH_MAPS, WITHOUT_MAPS = "operator with maps", "operator without maps"
GRADIENT_PEERS = ("eager",)


@dataclass(frozen=True)
class Options:
    """Measure what column_attention costs on the CPU."""

    levels: tuple[tuple[int, int], ...] = ((2560, 5), (640, 10), (160, 20), (40, 20))
    """Queries and heads of each level; the default is ModelScope's at 320 × 512."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    frames: int = 16
    keys: int = 77
    head_dim: int = 64
    rounds: int = 9
    seconds: float = 4.0
    """After so many, a size gets no more rounds than five."""
    threads: int = 0
    """0: as many as torch takes."""
    json: Path | None = None
    """A file for the figures."""


class ThreadClock(CpuClock):
    """Measures the processor's time of the calling thread, which is not to have others."""

    def seconds(self, call: WarmCall, index: int) -> float:
        """Returns the time of one call."""
        start = time.thread_time()
        call.run(index)
        return time.thread_time() - start


def ours(query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Computes both by this package's kernels."""
    return vk.column_attention(query, key, value, columns, backend="cpu")


def medians(
    calls: dict[str, Callable[[], object]], options: Options, shares: float
) -> dict[str, float]:
    """Returns the median seconds of calls, timed in turn."""
    clock = ThreadClock() if torch.get_num_threads() == 1 else CpuClock()
    warm = [clock.warm_up(TimedCall(name, call), [()]) for name, call in calls.items()]
    times = time_in_turn(clock, warm, 1, rounds=options.rounds, seconds=shares * options.seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(queries: int, heads: int, dtype: str, options: Options) -> dict[str, Any]:
    """Returns the figures of one level: medians in seconds, and ratios."""
    rows, text = (options.frames, queries), (options.frames, options.keys)
    kind = getattr(torch, dtype)
    query, key, value = (
        torch.randn(*shape, heads, options.head_dim).to(kind) for shape in (rows, text, text)
    )
    columns = columns_of_words(options.keys)
    attentions: dict[str, ColumnAttention] = {OURS: ours, **PEERS}
    calls: dict[str, Callable[[], object]] = {
        name: lambda attend=attend: attend(query, key, value, columns)  # type: ignore[misc]
        for name, attend in attentions.items()
    }
    out, maps = ours(query, key, value, columns)
    inputs = (query, key, value, columns[None], options.head_dim**-0.5)
    operator = torch.ops.vstar_kernels.cpu_columns_forward
    calls[WITH_MAPS] = lambda: operator(out, maps, *inputs)
    calls[WITHOUT_MAPS] = lambda: operator(out, None, *inputs)
    grads = torch.randn_like(out), torch.randn_like(maps)

    def gradient(attend: ColumnAttention) -> object:
        leaf = query.detach().requires_grad_()
        return torch.autograd.grad(attend(leaf, key, value, columns), leaf, grads)

    both: dict[str, Callable[[], object]] = {
        name: lambda attend=attentions[name]: gradient(attend)  # type: ignore[misc]
        for name in (OURS, *GRADIENT_PEERS)
    }
    watch = Watch()
    with torch.no_grad():
        seconds = medians(calls, options, 2 / 3)
    gradient_seconds = medians(both, options, 1 / 3)
    return {
        "queries": queries,
        "heads": heads,
        "dtype": dtype,
        "seconds": seconds,
        "gradient_seconds": gradient_seconds,
        "over_without_maps": seconds[WITH_MAPS] / seconds[WITHOUT_MAPS],
        "speedup": {name: seconds[name] / seconds[OURS] for name in PEERS},
        "gradient_speedup": {
            name: gradient_seconds[name] / gradient_seconds[OURS] for name in GRADIENT_PEERS
        },
        "others": watch.others(),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Returns the figures, a line for each level and type."""
    header = ["queries × heads", "type", "time", "over without maps", *PEERS]
    header += ["with dQ", *(f"{name} with dQ" for name in GRADIENT_PEERS)]
    rows = [
        [
            f"{x['queries']:,} × {x['heads']}",
            x["dtype"],
            f"{1e3 * x['seconds'][OURS]:.2f} ms",
            f"{x['over_without_maps']:.3f}×",
            *(f"{ratio:.2f}×" for ratio in x["speedup"].values()),
            f"{1e3 * x['gradient_seconds'][OURS]:.2f} ms",
            *(f"{ratio:.2f}×" for ratio in x["gradient_speedup"].values()),
        ]
        for x in results
    ]
    return Table("", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the file."""
    options = read_options(Options, arguments, prog="python -m benchmarks.columns_cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = [
        measure(*level, dtype, options) for dtype in options.dtypes for level in options.levels
    ]
    print(table(results).markdown())
    write_record(options, results)


if __name__ == "__main__":
    main()
