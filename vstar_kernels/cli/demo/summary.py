"""The figures of a finished demo, as plain data for the table, the report and JSON."""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import Any

from torch import Tensor

from vstar_kernels.analysis import band_share
from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import GaussianBias
from vstar_kernels.cli.demo.denoise import EAGER, KERNELS, STOCK, Demo, Denoising
from vstar_kernels.cli.demo.options import DemoOptions
from vstar_kernels.cli.info import info

# Of the largest latent. Rounding alone gives some 1e-5; leaving TAR out, 1e-1.
RELATIVE_TOLERANCE = 1e-4


def summarize(demo: Demo, options: DemoOptions) -> dict[str, Any]:
    """Everything that was asked for, measured and seen; JSON-serializable."""
    runs = {run.way.name: run for run in demo.runs}
    eager = runs[EAGER.name]
    ways = {name: _figures_of_way(run, eager, demo) for name, run in runs.items()}
    tolerance = RELATIVE_TOLERANCE * float(eager.latents.abs().max())
    settings = dataclasses.asdict(options) | {"output": str(options.output)}
    height, width = demo.model.latents.shape[-2:]
    return {
        "settings": settings,
        "model": {
            "description": demo.model.description,
            "parameters": sum(p.numel() for p in demo.model.unet.parameters()),
            "dtype": str(demo.model.unet.dtype),
            "frames": demo.model.latents.shape[2],
            "latent_height": height,
            "latent_width": width,
            "steps": len(demo.timesteps),
            "regularized_steps": demo.regularized_calls,
            "temporal_layers": len(demo.layers),
            "regularized_layers": len(demo.regularized),
        },
        "environment": info(),
        "ways": ways,
        "core_speedup": ways[EAGER.name]["core_seconds"] / ways[KERNELS.name]["core_seconds"],
        "tolerance": tolerance,
        # Not the other way round: a NaN agrees with nothing.
        "agrees": ways[KERNELS.name]["difference_from_eager"] <= tolerance,
        "maps": [_map_of_level(level, runs, demo) for level in _levels(demo)],
    }


def _figures_of_way(run: Denoising, eager: Denoising, demo: Demo) -> dict[str, Any]:
    by_level = {level: _core_seconds(run, demo, level) for level in demo.biases}
    peaks = [step.peak_bytes for step in run.figures if step.peak_bytes is not None]
    return {
        "label": run.way.label,
        "core_seconds": sum(by_level.values()),
        "core_seconds_by_level": by_level,
        "step_seconds": median(step.seconds for step in run.figures),
        "peak_bytes": max(peaks, default=None),
        "difference_from_eager": float((run.latents - eager.latents).abs().max()),
        "steps": [dataclasses.asdict(step) for step in run.figures],
    }


def _core_seconds(run: Denoising, demo: Demo, level: Level) -> float:
    """Seconds in one level's layers in a step: their number times their median.

    The layers of a level do the same work, so the median is over all of them in every step, which
    a busy machine disturbs less than a median over the few steps.
    """
    names = [layer.name for layer in demo.regularized if layer.level == level]
    return len(names) * median(step.core_seconds[name] for step in run.figures for name in names)


def _levels(demo: Demo) -> list[int]:
    return sorted({layer.level for layer in demo.layers if layer.level != "init"})


def _map_of_level(level: int, runs: dict[str, Denoising], demo: Demo) -> dict[str, Any]:
    """The maps of the two runs at one level, the mean over its layers and the batch."""
    bias: GaussianBias | None = demo.biases.get(level)
    without, regularized = runs[STOCK.name].capture, runs[KERNELS.name].capture
    assert without is not None
    assert regularized is not None
    # Each level halves the resolution, rounding up.
    height, width = (-(-extent // 2**level) for extent in demo.model.latents.shape[-2:])
    return {
        "level": level,
        "height": height,
        "width": width,
        "layers": sum(layer.level == level for layer in demo.layers),
        "sigma": bias.sigma if bias else None,
        "without_tar": _map_figures(without.mean(level=level).mean(dim=0)),
        "with_tar": _map_figures(regularized.mean(level=level).mean(dim=0)),
    }


def _map_figures(attention_map: Tensor) -> dict[str, Any]:
    return {
        "band_share": float(band_share(attention_map)),
        "map": [[round(weight, 7) for weight in row] for row in attention_map.tolist()],
    }


def table(results: dict[str, Any]) -> str:
    """The figures as lines of text."""
    header = ["", *COLUMNS]
    rows = [[way["label"], *cells(way, results)] for way in results["ways"].values()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


COLUMNS = (
    "attention core",
    "against eager",
    "whole step",
    "peak memory",
    "difference from eager TAR",
)


def cells(way: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """One way's figures for :data:`COLUMNS`, with their units."""
    eager = results["ways"][EAGER.name]
    peak, difference = way["peak_bytes"], way["difference_from_eager"]
    return [
        f"{way['core_seconds'] * 1e3:,.1f} ms",
        f"{eager['core_seconds'] / way['core_seconds']:.2f}×",
        f"{way['step_seconds']:.2f} s",
        "not measured" if peak is None else f"{peak / 2**20:,.0f} MiB",
        "–" if way is eager else f"{difference:.1e}",
    ]
