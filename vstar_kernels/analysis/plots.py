"""Figures of attention maps; each function draws what one in :mod:`.summary` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vstar_kernels.analysis.plots_style import (
    COLOURS,
    LINES,
    MARKERS,
    PANEL,
    add_colour_bar,
    new_figure,
    show_matrix,
    styled,
)
from vstar_kernels.analysis.summary import MapFigures, MeanMap, min_max

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_maps(means: Sequence[MeanMap], *, batch: int = -1) -> Figure:
    """Maps in a grid: a row for each level and place, a column for each step (Figs. 3, 10, S.10).

    Each map has a scale of its own, from its minimum to its maximum, as in the paper.

    Args:
        means: From :func:`vstar_kernels.analysis.mean_maps`.
        batch: Which element; under classifier-free guidance the last is with the prompt.

    Raises:
        ValueError: There are none.
    """
    if not means:
        raise ValueError("means must hold at least one map, got none")
    rows = list(dict.fromkeys(_row(item) for item in means))
    steps = list(dict.fromkeys(item.step for item in means))
    figure = new_figure(PANEL * len(steps) + 1.4, PANEL * len(rows) + 0.5)
    grid = figure.subplots(len(rows), len(steps), squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_axis_off()  # of what there is no map of
    image = None
    for item in means:
        axes = grid[rows.index(_row(item)), steps.index(item.step)]
        axes.set_axis_on()
        image = show_matrix(axes, min_max(item.map[batch].detach().cpu()), (0, 1))
    for row, axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(f"{row}\nquery frame")
    for step, first, last in zip(steps, grid[0], grid[-1], strict=True):
        first.set_title("" if step is None else f"step {step}")
        last.set_xlabel("key frame")
    add_colour_bar(figure, image, grid, "attention, each map from its minimum to its maximum")
    return figure


@styled
def plot_figures(figures: Sequence[MapFigures], *, batch: int = -1) -> Figure:
    """Diagonalness, share of the band and band width over the steps, a line per level and place.

    Args:
        figures: From :func:`vstar_kernels.analysis.map_figures`.
        batch: As for :func:`plot_maps`.

    Raises:
        ValueError: There are none.
    """
    if not figures:
        raise ValueError("figures must hold those of at least one map, got none")
    quantities = {
        "diagonalness": "diagonalness (correlation)",
        "band_share": f"share of attention with |j − i| ≤ {figures[0].half_width}",
        "band_width": "band width (frames)",
    }
    figure = new_figure(9.6, 3.4)
    panels = figure.subplots(1, len(quantities))
    rows = list(dict.fromkeys(_row(item.source) for item in figures))
    for (name, title), axes in zip(quantities.items(), panels, strict=True):
        for row in rows:
            of_row = [item for item in figures if _row(item.source) == row]
            values = [float(getattr(item, name)[batch]) for item in of_row]
            steps = [item.source.step or 0 for item in of_row]
            axes.plot(steps, values, label=row, **_line(of_row[0].source, figures))
        axes.set_title(title)
        _label_steps(axes, [item.source.step for item in figures])
        axes.grid(axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def plot_deltas(deltas: Mapping[str, Tensor]) -> Figure:
    """The regularization matrices Δ on one scale, and their middle rows (Fig. S.13).

    Args:
        deltas: From :func:`vstar_kernels.analysis.delta_matrices`; of several heads, the first is
            shown.

    Raises:
        ValueError: There are none.
    """
    if not deltas:
        raise ValueError("deltas must hold at least one matrix, got none")
    matrices = {
        name: (delta[0] if delta.ndim == 3 else delta).detach().cpu()
        for name, delta in deltas.items()
    }
    limits = (
        min(0.0, *(float(m.min()) for m in matrices.values())),
        max(float(m.max()) for m in matrices.values()),
    )
    figure = new_figure(PANEL * len(matrices) + 4.0, PANEL + 0.6)
    widths = [1.0] * len(matrices) + [1.3]
    *panels, profile = figure.subplots(1, len(matrices) + 1, width_ratios=widths)
    image = None
    for index, (name, matrix) in enumerate(matrices.items()):
        image = show_matrix(panels[index], matrix, limits)
        panels[index].set_title(f"Δ, {name}")
        panels[index].set_xlabel("key frame")
        middle = len(matrix) // 2
        profile.plot(
            [key - middle for key in range(len(matrix))],
            matrix[middle].tolist(),
            label=name,
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
        )
    panels[0].set_ylabel("query frame")
    profile.set_title("Δ of the middle query frame")
    profile.set_xlabel("key frame − query frame")
    profile.grid()
    figure.legend(*profile.get_legend_handles_labels(), loc="outside right upper")
    add_colour_bar(figure, image, panels, "")
    return figure


def _row(item: MeanMap) -> str:
    """What a map is of, but for the step."""
    parts = [item.model] if item.model else []
    if item.level is not None and item.level != "init":
        parts.append(f"level {item.level}")
    parts += [item.place or "init"] if item.place or item.level == "init" else []
    return ", ".join(parts) or "all layers"


def _line(item: MeanMap, figures: Sequence[MapFigures]) -> dict[str, Any]:
    """A colour for each level, a marker and a dash for each place."""
    levels = list(dict.fromkeys(f.source.level for f in figures))
    places = list(dict.fromkeys((f.source.model, f.source.place) for f in figures))
    place = places.index((item.model, item.place))
    return {
        "color": COLOURS[levels.index(item.level) % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
    }


def _label_steps(axes: Any, steps: Sequence[int | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    if any(step is not None for step in steps):
        axes.set_xlabel("denoising step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.set_xticks([])
