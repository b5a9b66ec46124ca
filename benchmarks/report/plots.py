"""The report's plots, as SVG for light and for dark screens."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from benchmarks.frames import RULES
from benchmarks.peers import EAGER, PEERS, SDPA, VSTAR_KERNELS
from benchmarks.report import figures
from benchmarks.report.tables import TITLES, geometric_mean
from benchmarks.results import Run
from benchmarks.suites import SUITES

# Readable on white and on near black; the palette of Okabe and Ito but for black, and three more.
COLOURS = {
    VSTAR_KERNELS: "#009E73",
    EAGER: "#D55E00",
    "eager-compiled": "#E69F00",
    "sdpa-bias": "#CC79A7",
    "flex": "#0072B2",
    "xformers-bias": "#A6761D",
    "reference": "#8C8C8C",
    SDPA: "#56B4E9",
    "xformers": "#9467BD",
    "flash-attn": "#B0A000",
    "composed": "#003F5C",
    "flex-frames": "#7A5195",
    "ultravico": "#FF6361",
    "sage": "#58508D",
}
PALETTE = {TITLES[peer]: colour for peer, colour in COLOURS.items()}
FLOOR_PEERS = [TITLES[peer] for peer in (EAGER, SDPA, VSTAR_KERNELS)]
DASHES = {TITLES[peer]: "" if PEERS[peer].tar else (4, 2) for peer in COLOURS}
WIDTH = 9.4  # inches, of the page's column
LEAST_MEMORY = 1e-4  # of the query's bytes, which a logarithmic axis can still show
THEMES = {
    "light": {"text": "#1d2329", "soft": "#5b6670", "line": "#d8dde2"},
    "dark": {"text": "#e4e8ec", "soft": "#9aa5af", "line": "#37404a"},
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vstar_kernels",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A drawn plot, once for each of ``THEMES``."""

    title: str
    note: str
    svg: dict[str, str]


def all_plots(run: Run) -> list[Plot]:
    """Returns the plots that the run has figures for."""
    steps, short = figures.steps(run), figures.kernel_rows(run, "short")
    drawn = [
        _plot(
            "Time against frames",
            "The temporal self-attention of one denoising step, all levels at full size. Dashed: "
            "attention without TAR.",
            steps,
            _step_times,
        ),
        _plot(
            "Speed-up by model",
            "How many times as long as vstar_kernels the others take in the same step.",
            steps[steps.peer.isin((EAGER, SDPA))],
            _speed_up,
        ),
        _plot(
            "Share of the floor",
            "Each point is a case of the models' calls: the least time at the measured bandwidth "
            "and matrix rate, over the time taken.",
            short[short.share.notna() & short.peer.isin((EAGER, SDPA, VSTAR_KERNELS))],
            _floors,
        ),
        _plot(
            "Memory against frames",
            "Peak of one call beyond its inputs and output, over the bytes of the query; medians "
            "over the models' calls.",
            short[short.peak_bytes.notna()],
            _memory,
        ),
        *(
            _plot(suite.title, suite.plot, figures.kernel_rows(run, name), _frame_times)
            for name, suite in SUITES.items()
            if suite.plot
        ),
        _plot(
            "What a rule costs",
            "Attention over frames of tokens: the time under a rule over that of vstar_kernels "
            "without one; geometric means over the models' shapes. Plain attention obeys no rule.",
            figures.frames(run),
            _costs,
        ),
        _plot(
            "Scaling with threads",
            "Speed over that of one thread; dotted: in proportion.",
            figures.kernel_rows(run, "threads"),
            _threads,
        ),
    ]
    return [plot for plot in drawn if plot]


def _plot(
    name: str, note: str, rows: pd.DataFrame, draw: Callable[[pd.DataFrame], sns.FacetGrid]
) -> Plot | None:
    """Returns what is drawn, if there is anything to show."""
    shown = rows[rows.peer.isin(COLOURS) & rows.time.notna()].sort_values("frames", kind="stable")
    if shown.empty:
        return None
    shown = shown.assign(peer=shown.peer.map(TITLES))
    svg = {}
    for theme, colours in THEMES.items():
        with plt.rc_context(STYLE | _coloured(**colours)):
            grid, buffer = draw(shown), io.StringIO()
            columns = min(5, len(grid.legend.get_texts()))
            place = {"bbox_to_anchor": (0.5, 0), "ncols": columns, "title": None}
            sns.move_legend(grid, "upper center", **place)
            grid.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            plt.close(grid.figure)
            svg[theme] = buffer.getvalue()
    return Plot(name, note, svg)


def _coloured(text: str, soft: str, line: str) -> dict[str, str]:
    texts = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), text)
    softer = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), soft)
    return texts | softer | {"grid.color": line}


def _step_times(steps: pd.DataFrame) -> sns.FacetGrid:
    shown = steps.assign(panel=steps.model + "\n" + steps.dtype, y=steps.time * 1e3)
    return _against_frames(shown, "ms", columns=4, height=2.1)


def _frame_times(rows: pd.DataFrame) -> sns.FacetGrid:
    """Draws the time per frame and head, a panel for each head size."""
    panel = "D = " + rows.head_dim.astype(str) + ", " + rows.dtype
    time = 1e6 * rows.time / (rows.batch * rows.frames * rows.heads)
    shown = rows.assign(panel=panel, y=time)
    return _against_frames(shown, "µs per frame and head", columns=3, height=2.6)


def _memory(rows: pd.DataFrame) -> sns.FacetGrid:
    """Draws the peaks in sizes of the query."""
    sizes = rows.batch * rows.frames * rows.heads * rows.head_dim * rows.item_bytes
    shown = rows.assign(panel="", y=(rows.peak_bytes / sizes).clip(lower=LEAST_MEMORY))
    return _against_frames(shown, "times the query's bytes", columns=1, height=3.0)


def _against_frames(rows: pd.DataFrame, y: str, *, columns: int, height: float) -> sns.FacetGrid:
    """Draws lines on logarithmic axes, panel by panel."""
    grid = _lines(rows, "frames", y, columns=columns, height=height)
    for name, ax in grid.axes_dict.items():
        ax.set(xscale="log", yscale="log")
        frames = rows[rows.panel == name].frames.unique()
        ax.set_xticks(frames, map(str, frames), fontsize=7)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    return grid


def _costs(rows: pd.DataFrame) -> sns.FacetGrid:
    """Draws bars for each rule: what it costs whom."""
    shown = rows.assign(rule=rows.rule.map(lambda name: RULES[name].title.replace(", ", ",\n")))
    peers = [name for name in PALETTE if name in set(rows.peer)]
    look = {"hue": "peer", "hue_order": peers, "palette": PALETTE, "height": 2.6}
    look |= {"estimator": geometric_mean, "errorbar": None, "aspect": WIDTH / 2.6}
    grid = sns.catplot(shown, kind="bar", x="rule", y="cost", row="dtype", **look)
    grid.refline(y=1, color=plt.rcParams["xtick.color"], linestyle="-", linewidth=1)
    return grid.set_titles("{row_name}").set_axis_labels("", "times as long")


def _threads(rows: pd.DataFrame) -> sns.FacetGrid:
    """Draws the speed against threads, a panel for each number of frames."""
    rows = rows.assign(panel="N = " + rows.frames.astype(str) + ", " + rows.dtype)
    one = rows[rows.threads == 1].set_index(["panel", "peer"]).time
    rows = rows.join(one.rename("of_one"), on=["panel", "peer"]).eval("y = of_one / time")
    grid = _lines(rows, "threads", "speed", columns=3, height=2.2)
    counts = sorted(rows.threads.unique())
    for ax in grid.axes.flat:
        ax.plot(counts, counts, ":", color=plt.rcParams["xtick.color"], linewidth=1)
        ax.set_xticks(counts)
        ax.set_ylim(bottom=0)
    return grid


def _lines(rows: pd.DataFrame, x: str, y: str, *, columns: int, height: float) -> sns.FacetGrid:
    """Draws a line for each peer in each panel; the medians, where cases share a place."""
    peers = [name for name in PALETTE if name in set(rows.peer)]
    look = {"hue": "peer", "hue_order": peers, "palette": PALETTE, "marker": "o", "mew": 0}
    look |= {"style": "peer", "dashes": DASHES, "estimator": "median", "errorbar": None}
    look |= _panels("panel", rows.panel, columns, height)
    grid = sns.relplot(rows, kind="line", x=x, y="y", **look)
    return grid.set_titles("{col_name}").set_ylabels(y)


def _panels(name: str, values: pd.Series, columns: int, height: float) -> dict[str, Any]:
    """Returns how seaborn lays out a panel for each of the values."""
    columns = min(columns, values.nunique())
    size = {"height": height, "aspect": WIDTH / columns / height}
    axes = {"sharex": False, "sharey": False}
    return {"col": name, "col_wrap": columns, "facet_kws": axes} | size


def _speed_up(steps: pd.DataFrame) -> sns.FacetGrid:
    """Draws bars for each model and number of frames: who is how many times slower."""
    names = steps.model.str.replace("-", "-\n", n=1) + "\n" + steps.dtype
    shades = [plt.rcParams["grid.color"], COLOURS[VSTAR_KERNELS]]
    frames = "N = " + steps.frames.astype(str)
    palette = sns.blend_palette(shades, frames.nunique() + 1)[1:]
    look = {"hue": "frames", "palette": palette, "height": 2.6, "aspect": WIDTH / 2.6}
    shown = steps.assign(model=names, frames=frames)
    grid = sns.catplot(shown, kind="bar", x="model", y="ratio", row="peer", sharey=False, **look)
    grid.refline(y=1, color=plt.rcParams["xtick.color"], linestyle="-", linewidth=1)
    grid.set_titles("{row_name} over vstar_kernels").set_axis_labels("", "times as long")
    return grid.tick_params(axis="x", labelsize=7)


def _floors(rows: pd.DataFrame) -> sns.FacetGrid:
    """Draws the floor over the time, a point for each case."""
    head_dims, frames = sorted(rows.head_dim.unique()), sorted(rows.frames.unique())
    aside = 0.09 * (rows.head_dim.map(head_dims.index) - (len(head_dims) - 1) / 2)
    shown = rows.assign(place=rows.frames.map(frames.index) + aside, D=rows.head_dim)
    look = {
        "hue": "peer",
        "hue_order": FLOOR_PEERS,
        "palette": PALETTE,
        "style": "D",
        "s": 28,
        "linewidth": 0,
    }
    look |= _panels("dtype", rows.dtype, 2, 3.0)
    grid = sns.relplot(shown, kind="scatter", x="place", y="share", **look)
    grid.refline(y=1, color=plt.rcParams["xtick.color"], linestyle="-", linewidth=1)
    grid.set(xticks=range(len(frames)), xticklabels=frames, ylim=(0, None))
    for text, handle in zip(grid.legend.get_texts(), grid.legend.legend_handles, strict=True):
        if text.get_text().isdigit():  # seaborn draws head sizes in black
            handle.set_markerfacecolor(plt.rcParams["text.color"])
    grid.set_titles("{col_name}: floor over time").set_axis_labels("frames", "")
    for ax in grid.axes.flat:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return grid
