"""What is drawn in the report's plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.peers import by_name
from benchmarks.report import figures
from benchmarks.report.figures import OURS, PLAIN, THEIRS
from benchmarks.results import Record

# Readable on white and on near black; the palette of Okabe and Ito but for black, and three more.
COLOURS = {
    "vstar_kernels": "#009E73",
    "eager": "#D55E00",
    "eager-compiled": "#E69F00",
    "sdpa-bias": "#CC79A7",
    "flex": "#0072B2",
    "xformers-bias": "#A6761D",
    "reference": "#8C8C8C",
    "sdpa": "#56B4E9",
    "xformers": "#9467BD",
    "flash-attn": "#B0A000",
}
WIDTH = 9.4  # inches, of the page's column


def steps(steps: Sequence[figures.Step]) -> Figure:
    """Time against frames, a panel for each model."""
    panels = _groups(steps, lambda x: f"{x.model}, {x.dtype}")
    figure, axes = _grid(len(panels), columns=4, height=2.1)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        rows = sorted(rows, key=lambda x: x.frames)
        for peer in COLOURS:
            points = [(x.frames, x.seconds[peer] * 1e3) for x in rows if peer in x.seconds]
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", **_style(peer))
        ax.set_title(name.replace(", ", "\n"))
        _log_axes(ax, "frames", "ms")
    _legend(figure, axes)
    return figure


def speed_up(steps: Sequence[figures.Step]) -> Figure:
    """Bars for each model and number of frames: who is how many times slower."""
    others = [x for x in (THEIRS, PLAIN) if any(x in step.seconds for step in steps)]
    figure, axes = _grid(len(others), columns=1, height=2.6)
    models = _groups(steps, lambda x: f"{x.model}\n{x.dtype}")
    frames = sorted({step.frames for step in steps})
    for ax, peer in zip(axes, others, strict=True):
        for index, count in enumerate(frames):
            found = [
                next((x.seconds[peer] / x.seconds[OURS] for x in rows if _is(x, count, peer)), 0)
                for rows in models.values()
            ]
            offset = (index - (len(frames) - 1) / 2) * 0.8 / len(frames)
            places = [place + offset for place in range(len(models))]
            shade = 0.35 + 0.65 * (index + 1) / len(frames)
            ax.bar(
                places,
                found,
                0.74 / len(frames),
                color=COLOURS[OURS],
                alpha=shade,
                label=f"N = {count}",
            )
        ax.axhline(1, color=plt.rcParams["xtick.color"], linewidth=1)
        labels = [name.replace("-", "-\n", 1) for name in models]
        ax.set_xticks(range(len(models)), labels, fontsize=7)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel("times as long")
        ax.set_title(f"{figures.title(peer)} over vstar_kernels", loc="left")
    _legend(figure, axes)
    return figure


def shares(records: Sequence[Record]) -> Figure:
    """The floor over the time, a point for each case."""
    dtypes = _groups(records, lambda x: x.case.dtype)
    figure, axes = _grid(len(dtypes), columns=2, height=3.0)
    head_dims = sorted({x.case.head_dim for x in records})
    frames = sorted({x.case.frames for x in records})
    markers = dict(zip(head_dims, "osD^vP*X", strict=False))
    for ax, (dtype, rows) in zip(axes, dtypes.items(), strict=True):
        for peer in (THEIRS, PLAIN, OURS):
            for head_dim in head_dims:
                mine = [x for x in rows if x.case.head_dim == head_dim and x.median(peer)]
                slide = 0.09 * (head_dims.index(head_dim) - (len(head_dims) - 1) / 2)
                places = [frames.index(x.case.frames) + slide for x in mine]
                shares = [x.share_of_floor(peer) for x in mine]
                ax.plot(
                    places,
                    shares,
                    markers.get(head_dim, "o"),
                    color=COLOURS[peer],
                    label=f"{figures.title(peer)}, D = {head_dim}" if peer == OURS else None,
                )
        for peer in (THEIRS, PLAIN):
            ax.plot([], [], "o", color=COLOURS[peer], label=figures.title(peer))
        ax.axhline(1, color=plt.rcParams["xtick.color"], linewidth=1)
        ax.set_xticks(range(len(frames)), [str(x) for x in frames])
        ax.set_xlabel("frames")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        ax.set_ylim(bottom=0)
        ax.set_title(f"{dtype}: floor over time")
    _legend(figure, axes)
    return figure


def memory(records: Sequence[Record]) -> Figure:
    """Peak memory against frames."""
    figure, (ax,) = _grid(1, columns=1, height=3.0)
    frames = sorted({x.case.frames for x in records})
    for peer in COLOURS:
        points = []
        for count in frames:
            found = sorted(
                peak / (x.case.elements * x.case.torch_dtype.itemsize)
                for x in records
                if x.case.frames == count and (peak := _peak(x, peer)) is not None
            )
            if found:
                points.append((count, max(found[len(found) // 2], 1e-4)))
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", **_style(peer))
    _log_axes(ax, "frames", "times the query's bytes")
    _legend(figure, [ax])
    return figure


def lines(records: Sequence[Record]) -> Figure:
    """Time per frame and head against frames, a panel for each head size."""
    panels = _groups(records, lambda x: f"D = {x.case.head_dim}, {x.case.dtype}")
    figure, axes = _grid(len(panels), columns=3, height=2.6)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        for peer in COLOURS:
            points = sorted(
                (x.case.frames, 1e6 * seconds * x.case.head_dim / x.case.elements)
                for x in rows
                if (seconds := x.median(peer)) is not None
            )
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", **_style(peer))
        ax.set_title(name)
        _log_axes(ax, "frames", "µs per frame and head")
    _legend(figure, axes)
    return figure


def threads(records: Sequence[Record]) -> Figure:
    """Speed against threads, a panel for each number of frames."""
    panels = _groups(records, lambda x: f"N = {x.case.frames}, {x.case.dtype}")
    figure, axes = _grid(len(panels), columns=3, height=2.2)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        rows = sorted(rows, key=lambda x: x.case.threads or 0)
        counts = [x.case.threads or 1 for x in rows]
        for peer in COLOURS:
            found = [x.median(peer) for x in rows]
            if all(found):
                ax.plot(counts, [found[0] / x for x in found], marker="o", **_style(peer))
        ax.plot(counts, counts, ":", color=plt.rcParams["xtick.color"], linewidth=1)
        ax.set_xticks(counts)
        ax.set_xlabel("threads")
        ax.set_ylabel("speed")
        ax.set_ylim(bottom=0)
        ax.set_title(name)
    _legend(figure, axes)
    return figure


def _style(peer: str) -> dict[str, Any]:
    return {
        "color": COLOURS[peer],
        "label": figures.title(peer),
        "linestyle": "-" if by_name(peer).tar else "--",
        "zorder": 3 if peer == OURS else 2,
    }


def _log_axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lines = [count for line in ax.get_lines() for count in line.get_xdata()]
    ax.set_xticks(sorted({int(count) for count in lines}))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=7)
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def _grid(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(WIDTH, height * rows + 0.5))
    found = list(axes.flat)
    for ax in found[count:]:
        ax.set_visible(False)
    return figure, found[:count]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles))
    )


def _groups(rows: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _is(step: figures.Step, frames: int, peer: str) -> bool:
    return step.frames == frames and peer in step.seconds


def _peak(record: Record, peer: str) -> int | None:
    return record.peers[peer].peak_bytes if peer in record.peers else None
