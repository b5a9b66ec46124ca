"""What a finished demo shows: its figures as plain data, a table of them, and a page."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from vstar_kernels.analysis import band_share
from vstar_kernels.analysis.maps import Level
from vstar_kernels.analysis.plots import COLOUR_MAP
from vstar_kernels.cli.demo.denoise import EAGER, KERNELS, STOCK, Demo, Denoising, Panel
from vstar_kernels.cli.demo.transformer import TransformerDemo
from vstar_kernels.cli.info import info
from vstar_kernels.cli.page import DARK, LIGHT, Colours, data_uri, figure_uri, render

# Of the largest latent. Rounding alone gives some 1e-5; leaving TAR out, 1e-1.
RELATIVE_TOLERANCE = 1e-4
PANEL_FIELDS = ("name", "level", "height", "width", "layers", "sigma")
COLUMNS = (
    "attention core",
    "against eager",
    "whole step",
    "peak memory",
    "difference from eager TAR",
)


def results_of(demo: Demo | TransformerDemo) -> dict[str, Any]:
    """Returns everything that a demo measured and saw, for JSON."""
    denoisings = {denoising.variant.name: denoising for denoising in demo.denoisings}
    eager = denoisings[EAGER.name]
    variants = {name: _figures(denoising, eager, demo) for name, denoising in denoisings.items()}
    tolerance = RELATIVE_TOLERANCE * float(eager.latents.abs().max())
    _, _, frames, height, width = demo.model.latents.shape
    return {
        "model": {
            "description": demo.model.description,
            "parameters": sum(p.numel() for p in demo.model.unet.parameters()),
            "dtype": str(demo.model.unet.dtype),
            "frames": frames,
            "latent_height": height,
            "latent_width": width,
            "steps": len(demo.timesteps),
            "regularized_steps": demo.regularized_calls,
            "attention": demo.attention,
            "attention_layers": len(demo.layers),
            "regularized_layers": len(demo.regularized),
        },
        "environment": info(),
        "variants": variants,
        "core_speedup": (
            variants[EAGER.name]["core_seconds"] / variants[KERNELS.name]["core_seconds"]
        ),
        "tolerance": tolerance,
        # Not the other way round: a NaN agrees with nothing.
        "agrees": variants[KERNELS.name]["difference_from_eager"] <= tolerance,
        "maps": [_panel(panel, denoisings) for panel in demo.panels()],
    }


def _figures(
    denoising: Denoising, eager: Denoising, demo: Demo | TransformerDemo
) -> dict[str, Any]:
    by_level = {level: _core_seconds(denoising, demo, level) for level in demo.biases}
    peaks = [step.peak_bytes for step in denoising.figures if step.peak_bytes is not None]
    return {
        "label": denoising.variant.label,
        "core_seconds": sum(by_level.values()),
        "core_seconds_by_level": by_level,
        "step_seconds": median(step.seconds for step in denoising.figures),
        "peak_bytes": max(peaks, default=None),
        "difference_from_eager": float((denoising.latents - eager.latents).abs().max()),
        "steps": [dataclasses.asdict(step) for step in denoising.figures],
    }


def _core_seconds(denoising: Denoising, demo: Demo | TransformerDemo, level: Level) -> float:
    """Returns the seconds in one level's layers in a step: their number times their median.

    The layers of a level do the same work, so the median is over all of them in every step, which
    a busy machine disturbs less than a median over the few steps.
    """
    names = [layer.name for layer in demo.regularized if layer.level == level]
    seconds = (step.core_seconds[name] for step in denoising.figures for name in names)
    return len(names) * median(seconds)


def _panel(panel: Panel, denoisings: dict[str, Denoising]) -> dict[str, Any]:
    """Returns one panel's maps without and with TAR."""
    without, regularized = denoisings[STOCK.name].capture, denoisings[KERNELS.name].capture
    assert without is not None
    assert regularized is not None
    fields = {name: getattr(panel, name) for name in PANEL_FIELDS}
    return fields | {
        "without_tar": _map_figures(panel.select(without)),
        "with_tar": _map_figures(panel.select(regularized)),
    }


def _map_figures(attention_map: Tensor) -> dict[str, Any]:
    return {
        "band_share": float(band_share(attention_map)),
        "map": [[round(weight, 7) for weight in row] for row in attention_map.tolist()],
    }


def table(results: dict[str, Any]) -> str:
    """Returns the figures as lines of text."""
    rows = [["", *COLUMNS], *_rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each variant: its label, and its figures for :data:`COLUMNS`."""
    eager = results["variants"][EAGER.name]
    rows = []
    for variant in results["variants"].values():
        peak, difference = variant["peak_bytes"], variant["difference_from_eager"]
        rows.append(
            [
                variant["label"],
                f"{variant['core_seconds'] * 1e3:,.1f} ms",
                f"{eager['core_seconds'] / variant['core_seconds']:.2f}×",
                f"{variant['step_seconds']:.2f} s",
                "not measured" if peak is None else f"{peak / 2**20:,.0f} MiB",
                "–" if variant is eager else f"{difference:.1e}",
            ]
        )
    return rows


def page(results: dict[str, Any], videos: Mapping[str, Path]) -> str:
    """Returns the page of :func:`results_of`'s results and of GIFs by their labels."""
    rows = _rows(results)
    bars = {}
    for figure, column in (("core_seconds", 1), ("step_seconds", 3)):
        values = [variant[figure] for variant in results["variants"].values()]
        bars[figure] = [_bars(values, rows, column, colours) for colours in (LIGHT, DARK)]
    eager = results["variants"][EAGER.name]
    return render(
        "demo.html",
        results=results,
        header=["", *COLUMNS],
        rows=rows,
        ours=list(results["variants"]).index(KERNELS.name),
        bars=bars,
        core_percent=100 * eager["core_seconds"] / eager["step_seconds"],
        scale=_map_image([[step / 255 for step in range(256)]]),
        map_rows=[
            list(_map_row(results, "without_tar", "without TAR")),
            list(_map_row(results, "with_tar", "with TAR")),
        ],
        videos={label: data_uri(path.read_bytes(), "gif") for label, path in videos.items()},
        settings=_settings(results),
    )


def _bars(values: list[float], rows: list[list[str]], column: int, colours: Colours) -> str:
    """Returns an image with a bar for each variant and the cell of a column beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.3), layout="constrained", facecolor="none")
    axes = figure.subplots()
    labels = [row[0] for row in rows]
    fills = [colours.ours if label == KERNELS.label else colours.peers for label in labels]
    bars = axes.barh(labels, values, height=0.62, color=fills)
    axes.bar_label(bars, [row[column] for row in rows], padding=6, color=colours.text)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=colours.text)
    axes.set_xticks([])
    return figure_uri(figure)


def _map_image(rows: list[list[float]]) -> str:
    """Returns a matrix as an image, a pixel for each element, from its minimum to its maximum."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    colours = mpl.colormaps[COLOUR_MAP].with_extremes(bad="grey")
    imsave(buffer, np.ma.masked_invalid(rows), cmap=colours, format="png")
    return data_uri(buffer.getvalue(), "png")


def _map_row(results: dict[str, Any], key: str, title: str) -> Iterator[dict[str, Any]]:
    """Yields the image of each level's map with its label and the lines of its caption."""
    for level in results["maps"]:
        rows = level[key]["map"]
        setting = ""
        if key == "with_tar":
            setting = f", σ = {level['sigma']:g}" if level["sigma"] is not None else ""
            setting = setting or ", not regularized"
        label = f"{level['name']}, {title}{setting}"
        low, high = min(map(min, rows)), max(map(max, rows))
        neighbours = f"neighbours {100 * level[key]['band_share']:.1f} %"
        yield {
            "image": _map_image(rows),
            "label": label,
            "caption": [label, f"{low:.4f} to {high:.4f}", neighbours],
        }


def _settings(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the options that counted, and facts of the model."""
    given = (
        (f"--{name}", " ".join(map(str, value)) if isinstance(value, tuple) else value)
        for name, value in results["settings"].items()
        if value is not None
    )
    facts = ((name.replace("_", " "), value) for name, value in results["model"].items())
    return [*given, *facts, ("seconds in all", f"{results['total_seconds']:.0f}")]
