"""``python -m benchmarks.frames_cost``: what a rule of frame_attention must do, counted.

One call of one sequence at the sizes of video transformers, in 16 bits. Nothing is measured, and
nothing but the plan of the Triton kernels is asked: which keys tiles of so many rows see, and how.
Prints a Markdown table:

- *kept*: the share of all pairs of a query and a key that the rule shows;
- *TFLOP*: QKᵀ and PV over those;
- *GB*: queries, keys and values read once, the output written;
- *split, GB*: partial outputs, written and read, where the bias waits for a statistic;
- *revisit*: QKᵀ once more over the keys with a bias, as a share of the TFLOP;
- *way*: which of these the plan takes on an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.frames import RULES, layout_of
from benchmarks.report.tables import Table
from benchmarks.suites import WORKLOADS
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.attention.frames.cost import kept_pairs
from vstar_kernels.attention.triton import configs, frames_plan, frames_slots
from vstar_kernels.cli.options import read_options

MODELS = WORKLOADS["dit"]["models"]
ITEMSIZE = 2
HEAD = ["model", "rule", "kept", "TFLOP", "GB", "split, GB", "revisit", "way"]


@dataclass(frozen=True)
class Options:
    """Count what rules cost."""

    transformers: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    rules: tuple[Literal[tuple(RULES)], ...] = tuple(RULES)
    rows: int = 128
    """Of a tile."""
    target: Literal[configs.ARCHITECTURES] = "sm_90"
    """Whose plan is asked for the way."""


def count(model: str, rule: str, options: Options) -> list[str]:
    """Returns the cells of one model and rule."""
    size = MODELS[model]
    layout = layout_of(size["text_first"], size["frames"], size["tokens"], size["text_last"])
    shape = (1, layout.tokens, size["heads"], size["head_dim"])
    query = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    wanted = RULES[rule]
    call = check_call(
        query, query, query, layout, wanted.make(size["frames"]), return_map=wanted.with_map
    )
    pairs = kept_pairs(call)
    operations = 4 * size["head_dim"] * pairs
    cells = [
        model,
        wanted.title,
        f"{pairs / (call.heads * call.tokens * call.keys):.0%}",
        f"{operations / 1e12:.3g}",
        f"{4 * query.numel() * ITEMSIZE / 1e9:.2g}",
    ]
    key = frames_plan.frames_key(call, query)
    tables = key.rule_tables()
    if key.statistic(tables) == "none":
        return [*cells, "–", "–", "known"]
    runs = layout.run_table().tolist()
    seen = frames_slots.tile_tables(runs, runs, tables, rows=options.rows, ordered=key.ordered)
    slots, keys = (x.sum().item() * call.heads * options.rows for x in seen.counts())
    parts = 2 * slots * size["head_dim"] * ITEMSIZE
    again = 2 * keys * size["head_dim"]
    below = configs.revisit_below(options.target, key.kind)
    way = "revisit" if seen.biased_keys_of_a_slot() < below else "split"
    return [*cells, f"{parts / 1e9:.2g}", f"{again / operations:+.0%}", way]


def measure(options: Options) -> Iterator[list[str]]:
    """Yields a row for each model and rule."""
    for model in options.transformers:
        for rule in options.rules:
            yield count(model, rule, options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts and prints the table."""
    options = read_options(Options, arguments, prog="python -m benchmarks.frames_cost")
    print(Table("", HEAD, list(measure(options)), words=2).markdown())


if __name__ == "__main__":
    main()
