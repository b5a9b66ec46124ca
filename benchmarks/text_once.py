"""``python -m benchmarks.text_once``: what projecting a text once for all frames saves.

diffusers' ``UNet3DConditionModel`` repeats the text for each frame, and every cross-attention
projects all copies; under a handle of this package it projects each text once
(``vstar_kernels/models/text.py``). This times forward passes of that UNet with random weights under
``apply_tar`` both ways, in turn; medians, and the median of the rounds' ratios. So it does for the
projections alone. Prints a Markdown table.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.report.tables import Table
from benchmarks.unet import PIXELS_PER_LATENT, TEXT_TOKENS, UNetOptions, unet3d
from vstar_kernels.cli.options import read_options
from vstar_kernels.models import text as sharing
from vstar_kernels.models.front_end import cross_layers


@dataclass(frozen=True)
class Options(UNetOptions):
    """Measure what projecting a text once for all frames saves."""

    rounds: int = 7


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """Returns the figures: medians in seconds, ratios, and operations of the projections."""
    torch.manual_seed(0)
    model = unet3d(options.width).eval().to(**options.tensors)
    height, width = (pixels // PIXELS_PER_LATENT for pixels in options.size)
    latents = torch.randn(options.batch, 4, options.frames, height, width, **options.tensors)
    channels = model.config.cross_attention_dim
    text = torch.randn(options.batch, TEXT_TOKENS, channels, **options.tensors)
    copies = text.repeat_interleave(options.frames, 0)
    projections = [
        x for layer in cross_layers(model) for x in (layer.module.to_k, layer.module.to_v)
    ]

    def forward() -> torch.Tensor:
        found: torch.Tensor = model(latents, 500, encoder_hidden_states=text, return_dict=False)[0]
        return found

    def project(given: torch.Tensor) -> list[torch.Tensor]:
        return [project(given) for project in projections]

    functions: dict[str, Callable[[], object]] = {
        "forward, once": forward,
        "forward, every copy": lambda: every_copy(forward),
        "projections, once": lambda: project(text),
        "projections, every copy": lambda: project(copies),
    }
    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None)):
        equal = torch.equal(forward(), every_copy(forward))
        clock = clock_for(options.device)
        calls = [clock.warm_up(TimedCall(key, call), [()]) for key, call in functions.items()]
        times = time_in_turn(clock, calls, 1, rounds=options.rounds, seconds=math.inf)
    parameters = sum(x.weight.numel() for x in projections)
    return {
        "seconds": {key: statistics.median(found) for key, found in times.items()},
        "times_as_long": {
            part: statistics.median(
                copy / once
                for once, copy in zip(
                    times[f"{part}, once"], times[f"{part}, every copy"], strict=True
                )
            )
            for part in ("forward", "projections")
        },
        "operations": {
            "once": 2 * parameters * text.shape[:2].numel(),
            "every copy": 2 * parameters * copies.shape[:2].numel(),
        },
        "same_bits": equal,
    }


def every_copy(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Runs a forward pass in which no text is projected once."""
    with mock.patch.object(sharing, "FEWEST_ROWS", sys.maxsize):
        return forward()


def table(result: dict[str, Any]) -> Table:
    """Returns the figures: a line for the forward pass and one for the projections alone."""
    rows = []
    for part, ratio in result["times_as_long"].items():
        seconds = (result["seconds"][f"{part}, {way}"] for way in ("every copy", "once"))
        rows.append((part, *(f"{1e3 * x:,.1f} ms" for x in seconds), f"{ratio:.3f}×"))
    return Table("", ("", "every copy", "once", "every copy takes"), rows, words=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = read_options(Options, arguments, prog="python -m benchmarks.text_once")
    result = measure(options)
    print(table(result).markdown())
    if options.json:
        settings = {key: x for key, x in asdict(options).items() if key != "json"}
        # Not where things are installed.
        facts = {name: fact for name, fact in vk.info().items() if "library" not in name}
        found = {"settings": settings, "environment": facts, **result}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
