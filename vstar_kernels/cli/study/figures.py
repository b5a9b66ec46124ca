"""The figures of a study: scores over variants, over σ, and similarity over the interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vstar_kernels.analysis.plots import COLOURS, INK, LINES, MARKERS, new_figure, styled
from vstar_kernels.cli.study.plan import BY_TYPE, SYMBOLS
from vstar_kernels.cli.study.table import Column, Row, mean_of
from vstar_kernels.reading import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_LABEL, LONGEST_LINE = 44, 90  # characters of a label, and of a line in a legend below
ACROSS, WIDEST = 3, 11.0  # panels beside each other, and inches


def labels_of(names: Iterable[str], longest: int = LONGEST_LABEL) -> dict[str, str]:
    """Returns names as figures show them: short ones, which are different if the names are."""
    labels: dict[str, str] = {}
    for name in names:
        label = shorten(name, longest)
        labels.setdefault(
            name, f"{label} ({len(labels) + 1})" if label in labels.values() else label
        )
    return labels


@styled
def plot_variants(rows: Sequence[Row], columns: Sequence[Column]) -> Figure:
    """Draws each score over the variants: a point for each video, and their mean."""
    names = list(dict.fromkeys(row.variant.name for row in rows))
    figure, panels = _panels(len(columns), 1.2 + 0.36 * len(names))
    for axes, column in zip(panels, columns, strict=False):
        for index, name in enumerate(names):
            values = [
                row.values[column]
                for row in rows
                if row.variant.name == name and column in row.values
            ]
            spread = [
                index + 0.24 * (i / max(len(values) - 1, 1) - 0.5) for i in range(len(values))
            ]
            axes.plot(
                spread, values, "o", color=COLOURS[index % len(COLOURS)], alpha=0.5, markersize=3
            )
            if values:
                mean = mean_of(values)
                axes.plot([index - 0.3, index + 0.3], [mean, mean], color=INK, linewidth=2)
        axes.set_title(column)
        labels = list(labels_of(names).values())
        axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.grid(axis="y")
    return figure


def swept_names(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the options of which numbers were tried, from lists."""
    found = (pair for row in rows for pair in row.variant.swept.items())
    return list(dict.fromkeys(name for name, value in found if _is_number(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@styled
def plot_sweep(rows: Sequence[Row], columns: Sequence[Column], name: str, label: str) -> Figure:
    """Draws each score's mean over the values of an option, a line for each of what else varies.

    Values that are no numbers, such as a σ for each level, have no place on the axis.

    Args:
        rows, columns: The scores.
        name: The option's.
        label: What it is called on the axis.
    """
    figure, panels = _panels(len(columns), 3.0)
    swept = [row for row in rows if _is_number(row.variant.swept.get(name))]
    kinds = {type(row.variant.swept[name]) for row in swept} if name in BY_TYPE else set()

    def line_of(row: Row) -> str:
        """Returns which line a row is of: shares and indices of steps are not of one."""
        kind = ""
        if len(kinds) > 1:
            kind = " (shares)" if isinstance(row.variant.swept[name], float) else " (indices)"
        return _others(row, name) + kind

    groups = list(dict.fromkeys(line_of(row) for row in swept))
    labels = labels_of(groups, LONGEST_LINE)
    for axes, column in zip(panels, columns, strict=False):
        for index, group in enumerate(groups):
            values: dict[float, list[float]] = {}
            for row in swept:
                if line_of(row) == group and column in row.values:
                    values.setdefault(row.variant.swept[name], []).append(row.values[column])
            places = sorted(values)
            axes.plot(
                places,
                [mean_of(values[place]) for place in places],
                label=labels[group],
                color=COLOURS[index % len(COLOURS)],
                linestyle=LINES[index // len(COLOURS) % len(LINES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
            )
        axes.set_title(column)
        axes.set_xlabel(label)
        axes.grid()
    if len(groups) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def plot_intervals(rows: Sequence[Row], curve: str) -> Figure:
    """Draws the mean similarity of frames over their interval, a line a variant (Fig. S.2)."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.4, 3.0)
    axes = figure.subplots()
    names = list(dict.fromkeys(row.variant.name for row in rows))
    labels = labels_of(names)
    for index, name in enumerate(names):
        curves = [
            row.curves[curve] for row in rows if row.variant.name == name and curve in row.curves
        ]
        if not curves:
            continue
        shortest = min(map(len, curves))
        means = [mean_of([one[i] for one in curves]) for i in range(shortest)]
        axes.plot(
            range(1, shortest + 1),
            means,
            label=labels[name],
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("interval (frames)")
    axes.set_ylabel(curve)
    axes.grid()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _others(row: Row, name: str) -> str:
    """Returns what else a variant is: what its entry has fixed, and what else was swept."""
    others: Mapping[str, Any] = {n: x for n, x in row.variant.swept.items() if n != name}
    swept = (f"{SYMBOLS.get(n, n)} = {x}" for n, x in others.items())
    return ", ".join(filter(None, (row.variant.fixed, *swept))) or "mean"


def _panels(count: int, width: float) -> tuple[Any, list[Any]]:
    width = max(3.2, width)
    across = max(1, min(count, ACROSS, int(WIDEST / width)))
    down = -(-count // across)
    figure = new_figure(width * across, 2.9 * down)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels
