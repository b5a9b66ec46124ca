"""``python -m benchmarks.columns_gpu``: what column_attention costs on a GPU, beside its floor.

For the cross-attention of each level of a text-to-video UNet, with the maps of four words, the
peers of ``benchmarks.column_adapters`` are timed in turn with it: forward, and with the gradient of
the queries alone; medians, on inputs that no cache holds. The floor of the forward pass is its
traffic, queries and text read, outputs and maps written, over the bandwidth of a copy of the same
size, which is timed in the same rounds. Prints a Markdown table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.column_adapters import PEERS, ColumnAttention, columns_of_words
from benchmarks.machine import environment
from benchmarks.report.tables import Table

OURS, COPY = "vstar_kernels", "copy"
GRADIENT_PEERS = ("eager", "SDPA of [V, G]")


@dataclass(frozen=True)
class Options:
    """Measure what column_attention costs on a GPU."""

    levels: tuple[tuple[int, int], ...] = ((2560, 5), (640, 10), (160, 20), (40, 20))
    """Queries and heads of each level; the default is ModelScope's at 320 × 512."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("bfloat16",)
    frames: int = 32
    """Rows of the batch: frames, twice under guidance."""
    keys: int = 77
    head_dim: int = 64
    rounds: int = 15
    seconds: float = 20.0
    """After so many, a size gets no more rounds than five."""
    device: str = "cuda"
    json: Path | None = None
    """A file for the figures."""


def measure(queries: int, heads: int, dtype: str, options: Options) -> dict[str, Any]:
    """Returns the figures of one level: medians in seconds, and bytes."""
    clock = clock_for(options.device)
    columns = columns_of_words(options.keys).to(options.device)
    shapes = [(options.frames, n, heads, options.head_dim) for n in (queries, options.keys)]
    kind = getattr(torch, dtype)
    maps = 4 * options.frames * queries * columns.shape[-1]
    elements = 2 * torch.Size(shapes[0]).numel() + 2 * torch.Size(shapes[1]).numel()
    traffic = elements * kind.itemsize + maps
    given = (shapes[0], shapes[1], shapes[1])
    inputs = [
        tuple(torch.randn(shape, device=options.device).to(kind) for shape in given)
        for _ in range(clock.sets(traffic))
    ]

    def ours(query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return vk.column_attention(query, key, value, columns)

    grads = torch.randn_like(inputs[0][0]), torch.randn(maps // 4, device=options.device)

    def with_gradient(attend: ColumnAttention) -> Callable[..., object]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> object:
            leaf = query.detach().requires_grad_()
            out, found = attend(leaf, key, value, columns)
            return torch.autograd.grad((out, found), leaf, (grads[0], grads[1].view_as(found)))

        return run

    def forward(attend: ColumnAttention) -> Callable[..., object]:
        return lambda query, key, value: attend(query, key, value, columns)

    moved = torch.empty(traffic // 2, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(moved)
    attentions: dict[str, ColumnAttention] = {OURS: ours, **PEERS}
    functions = {name: forward(attend) for name, attend in attentions.items()}
    functions[COPY] = lambda *_: target.copy_(moved)
    for name in (OURS, *GRADIENT_PEERS):
        functions[f"{name} with dQ"] = with_gradient(attentions[name])
    calls = [clock.warm_up(TimedCall(name, f), inputs) for name, f in functions.items()]
    times = time_in_turn(clock, calls, len(inputs), rounds=options.rounds, seconds=options.seconds)
    return {
        "queries": queries,
        "heads": heads,
        "dtype": dtype,
        "bytes": traffic,
        "operations": 4 * options.frames * heads * queries * options.keys * options.head_dim,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Returns the figures, a line for each level and type."""
    header = ["queries × heads", "type", "time", "share of a copy's speed", *PEERS, "with dQ"]
    header += [f"{name} with dQ" for name in GRADIENT_PEERS]
    rows = []
    for x in results:
        seconds = x["seconds"]
        own, own_gradient = seconds[OURS], seconds[f"{OURS} with dQ"]
        rows.append(
            [
                f"{x['queries']:,} × {x['heads']}",
                x["dtype"],
                f"{1e6 * own:,.1f} µs",
                f"{seconds[COPY] / own:.0%}",
                *(f"{seconds[name] / own:.2f}×" for name in PEERS),
                f"{1e6 * own_gradient:,.1f} µs",
                *(f"{seconds[f'{name} with dQ'] / own_gradient:.2f}×" for name in GRADIENT_PEERS),
            ]
        )
    return Table("", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, prog="python -m benchmarks.columns_gpu", args=arguments)
    torch.manual_seed(0)
    results = [
        measure(*level, dtype, options) for dtype in options.dtypes for level in options.levels
    ]
    print(table(results).markdown())
    if options.json is not None:
        settings = {key: x for key, x in asdict(options).items() if key != "json"}
        record = {
            "settings": settings,
            "environment": environment(options.device, torch.get_num_threads()),
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
