"""The report's plots, as SVG for light and for dark screens."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.peers import EAGER, PEERS, SDPA, VSTAR_KERNELS
from benchmarks.report import figures
from benchmarks.report.tables import title
from benchmarks.results import Record, Run
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
}
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
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

Item = TypeVar("Item")
Points = Iterable[tuple[str, str, float, float]]  # of lines: panel, peer, x, y


@dataclass(frozen=True)
class Plot:
    """A drawn plot, once for each of ``THEMES``."""

    title: str
    note: str
    svg: dict[str, str]


def all_plots(run: Run) -> list[Plot]:
    """Returns the plots that the run has figures for."""
    steps, short = figures.steps(run), figures.kernel_records(run, "short")
    drawn = [
        _plot(
            "Time against frames",
            "The temporal self-attention of one denoising step, all levels at full size. Dashed: "
            "attention without TAR.",
            steps,
            lambda x: _against_frames(_step_times(x), "ms", columns=4, height=2.1),
        ),
        _plot(
            "Speed-up by model",
            "How many times as long as vstar_kernels the others take in the same step.",
            steps,
            _speed_up,
        ),
        _plot(
            "Share of the floor",
            "Each point is a case of the models' calls: the least time at the measured bandwidth "
            "and matrix rate, over the time taken.",
            [x for x in short if x.floor],
            _floors,
        ),
        _plot(
            "Memory against frames",
            "Peak of one call beyond its inputs and output, over the bytes of the query; medians "
            "over the models' calls.",
            short,
            lambda x: _against_frames(_memory(x), "times the query's bytes", columns=1, height=3),
        ),
        *(
            _plot(
                suite.title,
                suite.plot,
                figures.kernel_records(run, name),
                lambda x: _against_frames(_frame_times(x), "µs per frame and head"),
            )
            for name, suite in SUITES.items()
            if suite.plot
        ),
        _plot(
            "Scaling with threads",
            "Speed over that of one thread; dotted: in proportion.",
            figures.kernel_records(run, "threads"),
            _threads,
        ),
    ]
    return [plot for plot in drawn if plot]


def _plot(
    name: str, note: str, shown: Sequence[Item], draw: Callable[[Sequence[Item]], Figure]
) -> Plot | None:
    """Returns what is drawn, if there is anything to show."""
    if not shown:
        return None
    svg = {}
    for theme, colours in THEMES.items():
        with plt.rc_context(STYLE | _coloured(**colours)):
            figure, buffer = draw(shown), io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
            svg[theme] = buffer.getvalue()
    return Plot(name, note, svg)


def _coloured(text: str, soft: str, line: str) -> dict[str, str]:
    texts = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), text)
    softer = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), soft)
    return texts | softer | {"grid.color": line}


def _step_times(steps: Sequence[figures.Step]) -> Points:
    for step in sorted(steps, key=lambda x: x.frames):
        for peer, seconds in step.seconds.items():
            yield f"{step.model}\n{step.dtype}", peer, step.frames, seconds * 1e3


def _frame_times(records: Sequence[Record]) -> Points:
    """Yields the time per frame and head, a panel for each head size."""
    for record in sorted(records, key=lambda x: x.case.frames):
        case = record.case
        for peer in record.peers:
            if seconds := record.median(peer):
                time = 1e6 * seconds * case.head_dim / case.elements
                yield f"D = {case.head_dim}, {case.dtype}", peer, case.frames, time


def _memory(records: Sequence[Record]) -> Points:
    """Yields the median of the peaks by frames, in sizes of the query."""
    peaks = defaultdict(list)
    for record in sorted(records, key=lambda x: x.case.frames):
        for peer, outcome in record.peers.items():
            if outcome.peak_bytes is not None:
                query = record.case.elements * record.case.torch_dtype.itemsize
                peaks[peer, record.case.frames].append(outcome.peak_bytes / query)
    for (peer, frames), found in peaks.items():
        yield "", peer, frames, max(float(np.median(found)), LEAST_MEMORY)


def _against_frames(points: Points, y: str, *, columns: int = 3, height: float = 2.6) -> Figure:
    """Draws lines on logarithmic axes, panel by panel."""
    panels = _groups(points, lambda point: point[0])
    figure, axes = _grid(len(panels), columns=columns, height=height)
    for ax, (name, found) in zip(axes, panels.items(), strict=True):
        lines = _groups(found, lambda point: point[1])
        for peer in (x for x in COLOURS if x in lines):
            _, _, frames, values = zip(*lines[peer], strict=True)
            ax.plot(frames, values, marker="o", **_line_style(peer))
        ax.set_title(name)
        ax.set(xscale="log", yscale="log", xlabel="frames", ylabel=y)
        ax.set_xticks(sorted({int(frames) for _, _, frames, _ in found}))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="x", labelsize=7)
    _legend(figure, axes)
    return figure


def _threads(records: Sequence[Record]) -> Figure:
    """Draws the speed against threads, a panel for each number of frames."""
    panels = _groups(records, lambda x: f"N = {x.case.frames}, {x.case.dtype}")
    figure, axes = _grid(len(panels), columns=3, height=2.2)
    for ax, (name, found) in zip(axes, panels.items(), strict=True):
        found = sorted(found, key=lambda x: x.case.threads or 0)
        counts = [x.case.threads or 1 for x in found]
        for peer in COLOURS:
            seconds = [x.median(peer) for x in found]
            if all(seconds):
                speeds = [seconds[0] / x for x in seconds]
                ax.plot(counts, speeds, marker="o", **_line_style(peer))
        ax.plot(counts, counts, ":", color=plt.rcParams["xtick.color"], linewidth=1)
        ax.set(xticks=counts, xlabel="threads", ylabel="speed", title=name)
        ax.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _speed_up(steps: Sequence[figures.Step]) -> Figure:
    """Draws bars for each model and number of frames: who is how many times slower."""
    others = [x for x in (EAGER, SDPA) if any(x in step.seconds for step in steps)]
    figure, axes = _grid(len(others), columns=1, height=2.6)
    models = _groups(steps, lambda x: f"{x.model}\n{x.dtype}")
    frames = sorted({step.frames for step in steps})
    for ax, peer in zip(axes, others, strict=True):
        for index, count in enumerate(frames):
            heights = [
                next((x.times_as_long(peer) or 0 for x in found if x.frames == count), 0)
                for found in models.values()
            ]
            offset = (index - (len(frames) - 1) / 2) * 0.8 / len(frames)
            ax.bar(
                np.arange(len(models)) + offset,
                heights,
                0.74 / len(frames),
                color=COLOURS[VSTAR_KERNELS],
                alpha=0.35 + 0.65 * (index + 1) / len(frames),
                label=f"N = {count}",
            )
        ax.axhline(1, color=plt.rcParams["xtick.color"], linewidth=1)
        labels = [name.replace("-", "-\n", 1) for name in models]
        ax.set_xticks(range(len(models)), labels, fontsize=7)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel("times as long")
        ax.set_title(f"{title(peer)} over vstar_kernels", loc="left")
    _legend(figure, axes)
    return figure


def _floors(records: Sequence[Record]) -> Figure:
    """Draws the floor over the time, a point for each case."""
    dtypes = _groups(records, lambda x: x.case.dtype)
    figure, axes = _grid(len(dtypes), columns=2, height=3.0)
    head_dims = sorted({x.case.head_dim for x in records})
    frames = sorted({x.case.frames for x in records})
    for ax, (dtype, found) in zip(axes, dtypes.items(), strict=True):
        for peer in (EAGER, SDPA, VSTAR_KERNELS):
            for index, head_dim in enumerate(head_dims):
                shown = [x for x in found if x.case.head_dim == head_dim and x.median(peer)]
                offset = 0.09 * (index - (len(head_dims) - 1) / 2)
                ax.plot(
                    [frames.index(x.case.frames) + offset for x in shown],
                    [x.floor_over_time(peer) for x in shown],
                    "osD^vP*X"[index % 8],
                    color=COLOURS[peer],
                    label=f"{title(peer)}, D = {head_dim}" if peer == VSTAR_KERNELS else None,
                )
        for peer in (EAGER, SDPA):
            ax.plot([], [], "o", color=COLOURS[peer], label=title(peer))
        ax.axhline(1, color=plt.rcParams["xtick.color"], linewidth=1)
        ax.set_xticks(range(len(frames)), [str(x) for x in frames])
        ax.set_xlabel("frames")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        ax.set_ylim(bottom=0)
        ax.set_title(f"{dtype}: floor over time")
    _legend(figure, axes)
    return figure


def _line_style(peer: str) -> dict[str, Any]:
    return {
        "color": COLOURS[peer],
        "label": title(peer),
        "linestyle": "-" if PEERS[peer].tar else "--",
        "zorder": 3 if peer == VSTAR_KERNELS else 2,
    }


def _grid(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(WIDTH, height * rows + 0.5))
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles))
    )


def _groups(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)
