"""``python -m benchmarks.grid``: attention over a grid of frames, and factorised attention (ETC).

For each of the settings of ETC's Table 3, at one layer of C = 4 channels and at Stable Diffusion
2.1's finest level: scaled_dot_product_attention over all tokens, this package's attention without a
rule and under TAR, over the tokens in the image's own order, and spatial followed by temporal
attention; timed in turn, medians. Beside the times stand the operations that each needs, and the
memory of TAR beyond its result. With ``--sweep`` also Fig. 10's: B sequences of 16,384 / B tokens.
The paper's sizes are those of GPUs: on a CPU the sides of frames are halved, and there is one head,
unless ``--full`` says otherwise. Prints Markdown tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.machine import Watch, peak_bytes
from benchmarks.record import write_record
from benchmarks.report.tables import Table
from vstar_kernels.analysis import attention_cost, grid_layout, grid_shape
from vstar_kernels.cli.options import read_options

# Table 3: frames and the height and width of a frame, in tokens. Its "Res 512" has 2,048 tokens.
SETTINGS = {
    "256, 16 frames": (16, 32, 32),
    "256, 32 frames": (32, 32, 32),
    "512, 16 frames": (16, 64, 32),
    "512, 32 frames": (32, 64, 32),
}
LAYERS = {"C = 4": (1, 4), "SD 2.1": (5, 64)}  # heads and their size
SWEEP_TOKENS = 16384
NAMES = ("SDPA", "no rule", "TAR", "factorised")


@dataclass(frozen=True)
class Options:
    """Measure attention over a grid of frames."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Of Table 3, by name."""
    layers: tuple[str, ...] = tuple(LAYERS)
    full: bool = False
    """The paper's sizes on a CPU too; one head, all the same."""
    sweep: bool = False
    """Fig. 10: sequences of fewer and fewer tokens."""
    rounds: int = 7
    seconds: float = 4.0
    """After so many, a case gets no more rounds than five."""
    threads: int = 0
    """0: as many as torch takes."""
    json: Path | None = None
    """A file for the figures."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes plain attention over ``(batch, tokens, heads, head_dim)``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v)


def factorised(frames: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes spatial, then temporal attention, of tokens in the order of frames."""
    spatial = [x.unflatten(1, (frames, -1)).flatten(0, 1) for x in (query, key, value)]
    sdpa(*spatial)
    temporal = [x.unflatten(1, (frames, -1)).transpose(1, 2) for x in (query, key, value)]
    return sdpa(*(x.flatten(0, 1) for x in temporal))


def measure(
    calls: dict[str, Callable[..., Tensor]], shape: tuple[int, ...], options: Options
) -> dict[str, float]:
    """Returns the median seconds of each call of query, key and value, taken in turn."""
    inputs = torch.randn(3, *shape, device=options.device).to(getattr(torch, options.dtype))
    clock = clock_for(options.device)
    triple = tuple(inputs.unbind())
    warm = [clock.warm_up(TimedCall(name, call), [triple]) for name, call in calls.items()]
    times = time_in_turn(clock, warm, 1, rounds=options.rounds, seconds=options.seconds)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def setting(name: str, layer: str, options: Options) -> dict[str, Any]:
    """Returns the figures of one of Table 3's settings at one layer."""
    frames, h, w = SETTINGS[name]
    heads, head_dim = LAYERS[layer]
    if options.device == "cpu":
        heads = 1
        if not options.full:
            h, w = h // 2, w // 2
    tokens, channels = frames * h * w, heads * head_dim
    layout = grid_layout(*grid_shape(frames), h, w)
    rule = vk.FrameRule.tar(1.0, stat="row_max")
    calls: dict[str, Callable[..., Tensor]] = {
        "SDPA": sdpa,
        "no rule": partial(vk.frame_attention, layout=layout),
        "TAR": partial(vk.frame_attention, layout=layout, rule=rule),
        "factorised": partial(factorised, frames),
    }
    watch = Watch()
    seconds = measure(calls, (1, tokens, heads, head_dim), options)
    others = watch.others()
    q, k, v = torch.randn(3, 1, tokens, heads, head_dim, device=options.device).to(
        getattr(torch, options.dtype)
    )
    apart = attention_cost(h * w, channels, frames) + attention_cost(frames, channels, h * w)
    return {
        "setting": name,
        "layer": layer,
        "frames": frames,
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "seconds": seconds,
        "operations": attention_cost(tokens, channels).products,
        "factorised_operations": apart.products,
        "peak_bytes": peak_bytes(options.device, lambda: calls["TAR"](q, k, v)),
        "others": others,
    }


@torch.no_grad()
def sweep(options: Options) -> list[dict[str, Any]]:
    """Returns the figures of B sequences of 16,384 / B tokens each (Fig. 10)."""
    results = []
    total = SWEEP_TOKENS if options.device == "cuda" or options.full else SWEEP_TOKENS // 4
    for power in range(0, total.bit_length(), 2):
        batch, tokens = 2**power, total // 2**power
        layout = vk.Layout(vk.Frames(1, tokens))
        calls = {"SDPA": sdpa, "no rule": partial(vk.frame_attention, layout=layout)}
        results.append(
            {
                "batch": batch,
                "receptive_field": tokens,
                "seconds": measure(calls, (batch, tokens, 1, 64), options),
                "operations": attention_cost(tokens, 64, batch).products,
            }
        )
    return results


def settings_table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns the settings' figures, a line for each."""
    header = ["setting", "layer", "frames × tokens", *NAMES, "TAR / no rule", "SDPA / no rule"]
    header += ["GFLOP", "factorised", "TAR's memory"]
    rows = []
    for x in results:
        seconds, memory = x["seconds"], x["peak_bytes"]
        rows.append(
            [
                x["setting"],
                f"{x['layer']} ({x['heads']} × {x['head_dim']})",
                f"{x['frames']} × {x['tokens'] // x['frames']:,}",
                *(f"{1e3 * seconds[name]:.2f} ms" for name in NAMES),
                f"{seconds['TAR'] / seconds['no rule']:.3f}×",
                f"{seconds['SDPA'] / seconds['no rule']:.2f}×",
                f"{x['operations'] / 1e9:.2f}",
                f"{x['factorised_operations'] / 1e9:.2f}",
                "" if memory is None else f"{memory / 2**20:.1f} MiB",
            ]
        )
    return Table("", header, rows)


def sweep_table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns the sweep's figures, a line for each number of sequences."""
    header = ["sequences", "receptive field", "SDPA", "no rule", "GFLOP"]
    rows = [
        [
            f"{x['batch']:,}",
            f"{x['receptive_field']:,}",
            *(f"{1e3 * x['seconds'][name]:.2f} ms" for name in ("SDPA", "no rule")),
            f"{x['operations'] / 1e9:.3f}",
        ]
        for x in results
    ]
    return Table("", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the file."""
    options = read_options(Options, arguments, prog="python -m benchmarks.grid")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = [
        setting(name, layer, options) for name in options.settings for layer in options.layers
    ]
    swept = sweep(options) if options.sweep else []
    print(settings_table(results).markdown())
    if swept:
        print(sweep_table(swept).markdown())
    write_record(options, results, sweep=swept)


if __name__ == "__main__":
    main()
