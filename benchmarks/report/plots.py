"""The report's plots, as SVG for light and for dark screens."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report import figures, panels
from benchmarks.results import Run

THEMES = {
    "light": {"text": "#1d2329", "soft": "#5b6670", "line": "#d8dde2"},
    "dark": {"text": "#e4e8ec", "soft": "#9aa5af", "line": "#37404a"},
}


@dataclass(frozen=True)
class Plot:
    """A drawn plot, once for each of ``THEMES``."""

    title: str
    note: str
    svg: dict[str, str]


def all_plots(run: Run) -> list[Plot]:
    """Those that the run has figures for."""
    records = figures.kernels(run)
    found = [
        _plot(
            "Time against frames",
            "The temporal self-attention of one denoising step, all levels at full size. Dashed: "
            "attention without TAR.",
            panels.steps,
            figures.steps(run),
        ),
        _plot(
            "Speed-up by model",
            "How many times as long as vstar_kernels the others take in the same step.",
            panels.speed_up,
            figures.steps(run),
        ),
        _plot(
            "Share of the floor",
            "Each point is a case of the models' calls: the least time at the measured bandwidth "
            "and matrix rate, over the time taken.",
            panels.shares,
            [x for x in figures.of_suite(records, "short") if x.floor],
        ),
        _plot(
            "Memory against frames",
            "Peak of one call beyond its inputs and output, over the bytes of the query; medians "
            "over the models' calls.",
            panels.memory,
            figures.of_suite(records, "short"),
        ),
        *(
            _plot(title, note, panels.lines, figures.of_suite(records, suite))
            for suite, title, note in (
                ("long", "Long sequences", "Time per frame and head, σ = 1."),
                ("backward", "Forward and backward", "Time per frame and head, finest levels."),
                ("maps", "With the mean map", "Time per frame and head, finest levels."),
            )
        ),
        _plot(
            "Scaling with threads",
            "Speed over that of one thread; dotted: in proportion.",
            panels.threads,
            figures.of_suite(records, "threads"),
        ),
    ]
    return [plot for plot in found if plot is not None]


def _plot(title: str, note: str, draw: Callable[[Any], Figure], rows: Sequence[Any]) -> Plot | None:
    if not rows:
        return None
    svg = {}
    for name, colours in THEMES.items():
        with _theme(colours):
            figure = draw(rows)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
            svg[name] = buffer.getvalue()
    return Plot(title, note, svg)


@contextmanager
def _theme(colours: dict[str, str]) -> Iterator[None]:
    text, soft, line = colours["text"], colours["soft"], colours["line"]
    options = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vstar_kernels",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.titlecolor": text,
        "axes.titlesize": 9,
        "axes.edgecolor": soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": soft,
        "ytick.color": soft,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    with plt.rc_context(options):
        yield
