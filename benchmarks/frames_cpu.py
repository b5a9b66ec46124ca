"""``python -m benchmarks.frames_cpu``: what frame_attention's rules cost on this processor.

For each size, one call without a rule, TAR with both statistics, a window, and the map are timed in
turn with scaled_dot_product_attention and with tar_attention without a bias; medians. The share of
the floor is that of the larger of two times: the call's operations at the rate of a float32 matrix
product, and its bytes at that of a copy, both measured in the same rounds. It may be above 100 %,
as torch's matrix product is not the fastest on every processor. Prints a Markdown table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

import vstar_kernels as vk
from benchmarks.clock import CpuClock, TimedCall, time_in_turn
from benchmarks.machine import Watch, peak_bytes
from benchmarks.record import write_record
from benchmarks.report.tables import Table
from vstar_kernels.cli.options import read_options

MATRIX = 2048  # of the product that is timed
COPY = 1 << 24  # floats that are copied
RULES = ("TAR row_max", "TAR frame_max", "window", "map")


@dataclass(frozen=True)
class Options:
    """Measure what frame_attention's rules cost on the CPU."""

    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384)
    head_dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    frames: int = 16
    window: int = 2
    """How many frames a window reaches to either side."""
    rounds: int = 15
    seconds: float = 3.0
    """After so many, a size gets no more rounds than five."""
    threads: int = 0
    """0: as many as torch takes."""
    json: Path | None = None
    """A file for the figures."""


def heads_of(tokens: int) -> int:
    """Returns few heads for long sequences: each size takes about as long."""
    return max(1, 4 * 2048 // tokens)


def kept_share(frames: int, window: int) -> float:
    """Returns the share of keys that a window keeps."""
    return sum(abs(f - g) <= window for f in range(frames) for g in range(frames)) / frames**2


def calls_of(
    tokens: int, head_dim: int, dtype: torch.dtype, options: Options
) -> dict[str, Callable[[], object]]:
    """Returns what is timed in turn."""
    shape = (3, 1, tokens, heads_of(tokens), head_dim)
    q, k, v = torch.randn(shape).to(dtype).unbind()
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    layout = vk.Layout(vk.Frames(options.frames, tokens // options.frames))
    matrix, source = torch.randn(MATRIX, MATRIX), torch.ones(COPY)
    target = torch.empty_like(source)

    def attend(rule: vk.FrameRule | None = None, return_map: bool = False) -> object:
        return vk.frame_attention(q, k, v, layout, rule, return_map=return_map, backend="cpu")

    return {
        "SDPA": lambda: F.scaled_dot_product_attention(*heads_first),
        "tar_attention": lambda: vk.tar_attention(
            q, k, v, vk.GaussianBias(1.0, strength=0.0), backend="cpu"
        ),
        "none": attend,
        "TAR row_max": lambda: attend(vk.FrameRule.tar(1.0, stat="row_max")),
        "TAR frame_max": lambda: attend(vk.FrameRule.tar(1.0, stat="frame_max")),
        "window": lambda: attend(vk.FrameRule.window(options.window)),
        "map": lambda: attend(return_map=True),
        "product": lambda: matrix @ matrix,
        "copy": lambda: target.copy_(source),
    }


@torch.no_grad()
def measure(tokens: int, head_dim: int, dtype: str, options: Options) -> dict[str, Any]:
    """Returns the figures of one size: medians in seconds, ratios and the share of the floor."""
    calls = calls_of(tokens, head_dim, getattr(torch, dtype), options)
    clock, watch = CpuClock(), Watch()
    warm = [clock.warm_up(TimedCall(name, call), [()]) for name, call in calls.items()]
    times = time_in_turn(clock, warm, 1, rounds=options.rounds, seconds=options.seconds)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    heads = heads_of(tokens)
    operations = 4 * tokens**2 * head_dim * heads
    moved = 4 * tokens * heads * head_dim * getattr(torch, dtype).itemsize
    floor = max(
        operations * seconds["product"] / (2 * MATRIX**3),
        moved * seconds["copy"] / (8 * COPY),
    )
    none = seconds["none"]
    return {
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "seconds": seconds,
        "floor_share": floor / none,
        "over_none": {name: seconds[name] / none for name in RULES},
        "sdpa_over_none": seconds["SDPA"] / none,
        "tar_attention_over_none": seconds["tar_attention"] / none,
        "kept_share": kept_share(options.frames, options.window),
        "peak_bytes": peak_bytes("cpu", calls["TAR frame_max"]),
        "others": watch.others(),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Returns the figures, a line for each size, and the mean of the speed-ups."""
    header = ["tokens", "D", "type", "none", "of floor", "SDPA", "tar_attention"]
    rows = [
        [
            f"{x['tokens']:,} × {x['heads']}",
            str(x["head_dim"]),
            x["dtype"],
            f"{1e3 * x['seconds']['none']:.1f} ms",
            f"{x['floor_share']:.0%}",
            f"{x['sdpa_over_none']:.2f}×",
            f"{x['tar_attention_over_none']:.2f}×",
            *(f"{x['over_none'][name]:.3f}×" for name in RULES),
            f"{x['kept_share']:.3f}",
        ]
        for x in results
    ]
    mean = math.exp(statistics.fmean(math.log(x["sdpa_over_none"]) for x in results))
    rows.append(["geometric mean", "", "", "", "", f"{mean:.2f}×", *[""] * (len(RULES) + 2)])
    return Table("", [*header, *RULES, "kept keys"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the file."""
    options = read_options(Options, arguments, prog="python -m benchmarks.frames_cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = [
        measure(tokens, head_dim, dtype, options)
        for tokens in options.tokens
        for head_dim in options.head_dims
        for dtype in options.dtypes
    ]
    print(table(results).markdown())
    write_record(options, results)


if __name__ == "__main__":
    main()
