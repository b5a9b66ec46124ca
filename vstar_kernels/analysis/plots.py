"""Pictures of maps, of the similarity of frames and of the search for noise.

They are legible on light and on dark pages, and to the colour-blind. Matplotlib is imported by the
functions that draw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from vstar_kernels.analysis.frames import JointSimilarity, SimilarityHistogram
from vstar_kernels.analysis.maps import MapFigures, MeanMap, min_max

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

INK = "#7d7d7d"  # about as far from white as from black
# Okabe and Ito's colours, without those that vanish on white or on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
COLOUR_MAP = "viridis"
PANEL = 1.9  # inches, the side of a map
LEAST_SHOWN = 1e-3  # of the largest share of attention, on a logarithmic scale
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # texts are of whoever wrote them
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "image.cmap": COLOUR_MAP,
    "image.interpolation": "nearest",
}


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Returns a plotting function under this style, which leaves Matplotlib's settings alone.

    Raises:
        ImportError: From the function: Matplotlib is not installed.
    """

    @functools.wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise ImportError(
                'plots need Matplotlib: pip install "vstar-kernels[analysis]"'
            ) from error
        with mpl.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return run


@styled
def plot_maps(means: Sequence[MeanMap], *, batch: int = -1) -> Figure:
    """Draws maps in a grid: a row for each level and place, a column for each step (Figs. 3, 10).

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
        image = _show_matrix(axes, min_max(item.map[batch].detach().cpu()), (0, 1))
    for row, axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(f"{row}\nquery frame")
    for step, top, bottom in zip(steps, grid[0], grid[-1], strict=True):
        top.set_title("" if step is None else f"step {step}")
        bottom.set_xlabel("key frame")
    _add_colour_bar(figure, image, grid, "attention, each map from its minimum to its maximum")
    return figure


@styled
def plot_frame_maps(maps: Mapping[str, Tensor], *, batch: int = 0) -> Figure:
    """Draws maps between frames side by side on one logarithmic scale, text in the last column.

    What is masked stays empty.

    Args:
        maps: From :func:`vstar_kernels.frame_attention`, by title: ``(batch, F_q, F_k + 1)``, or
            ``(F_q, F_k + 1)``, of equal shapes. A column of text that is zero in all is left out.
        batch: Which element of the batch.

    Raises:
        ValueError: There are none.
    """
    if not maps:
        raise ValueError("maps must hold at least one map, got none")
    from matplotlib.colors import LogNorm

    shown = {name: (x[batch] if x.ndim == 3 else x).detach().cpu() for name, x in maps.items()}
    if not any(x[:, -1].any() for x in shown.values()):
        shown = {name: x[:, :-1] for name, x in shown.items()}
    largest = max(float(x.max()) for x in shown.values())
    figure = new_figure(PANEL * len(shown) + 1.4, PANEL + 0.7)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    image = None
    for axes, (name, matrix) in zip(panels, shown.items(), strict=True):
        visible = matrix.masked_fill(matrix <= 0, float("nan"))
        image = _show_matrix(axes, visible, LogNorm(largest * LEAST_SHOWN, largest))
        axes.set_title(name)
        axes.set_xlabel("key frame")
    panels[0].set_ylabel("query frame")
    _add_colour_bar(figure, image, panels, "share of the attention")
    return figure


@styled
def plot_figures(figures: Sequence[MapFigures], *, batch: int = -1) -> Figure:
    """Draws diagonalness and the band's share and width over steps, a line per level and place.

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
    """Draws the regularization matrices Δ on one scale, and their middle rows (Fig. S.13).

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
        image = _show_matrix(panels[index], matrix, limits)
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
    _add_colour_bar(figure, image, panels, "")
    return figure


class Loss(Protocol):
    """The loss of one iteration of the search for noise."""

    @property
    def total(self) -> float:
        """The number that is minimised."""

    @property
    def distance(self) -> float:
        """The distance of the maps, a mean of Frobenius norms."""

    @property
    def kl(self) -> float:
        """The KL divergence, in nats per pixel."""


class NoiseSearch(Protocol):
    """A search for noise, such as :class:`vstar_kernels.OptimizedNoise`."""

    @property
    def losses(self) -> Sequence[Loss]:
        """The loss of each iteration."""

    @property
    def best(self) -> int:
        """The iteration of the lowest loss."""


@styled
def plot_similarities(joint: JointSimilarity, *, video: int = 0) -> Figure:
    """Draws the similarity matrices of several methods side by side, on one scale (Fig. S.1).

    Args:
        joint: From :func:`vstar_kernels.analysis.normalize_jointly`.
        video: Which one of each method.
    """
    figure = new_figure(PANEL * len(joint.matrices) + 1.4, PANEL + 0.7)
    panels = figure.subplots(1, len(joint.matrices), squeeze=False)[0]
    image = None
    for axes, (name, matrices) in zip(panels, joint.matrices.items(), strict=True):
        image = _show_matrix(axes, matrices[video].cpu(), (0, 1))
        axes.set_title(name)
        axes.set_xlabel("frame")
    panels[0].set_ylabel("frame")
    label = f"similarity\n0: {joint.low:.3g}, 1: {joint.high:.3g}"
    _add_colour_bar(figure, image, panels, label)
    return figure


@styled
def plot_histogram(histogram: SimilarityHistogram | Mapping[str, SimilarityHistogram]) -> Figure:
    """Draws the shares of similarities, a row of bins for each interval, and means (Fig. S.2).

    Args:
        histogram: From :func:`vstar_kernels.analysis.similarity_histogram`; or several, by their
            methods' names, which are drawn side by side on one scale of colours.

    Raises:
        ValueError: There is none, or they have not the same intervals and edges of bins.
    """
    from matplotlib.ticker import MaxNLocator

    methods = histogram if isinstance(histogram, Mapping) else {"": histogram}
    _check_comparable(methods)
    first = next(iter(methods.values()))
    rows = range(len(first.intervals) + 1)
    figure = new_figure(2.2 + 3.0 * len(methods), max(2.4, 0.2 * len(rows) + 1.2))
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    largest = max(float(shown.shares.max()) for shown in methods.values())
    centres = [row + 0.5 for row in rows[:-1]]
    # White with a dark edge is seen on every colour of the map.
    style = {"color": "white", "markeredgecolor": "black", "marker": "o", "markersize": 5}
    image = None
    for axes, (name, shown) in zip(panels, methods.items(), strict=True):
        image = axes.pcolormesh(
            shown.edges.numpy(), rows, shown.shares.numpy(), vmin=0, vmax=largest
        )
        (means,) = axes.plot(shown.means.cpu().tolist(), centres, linestyle="", **style)
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("similarity of two frames")
    every = -(-len(centres) // 12)
    panels[0].set_yticks(centres[::every], [str(i) for i in first.intervals[::every]])
    panels[0].set_ylabel("interval (frames)")
    panels[0].invert_yaxis()  # and with it those that share it
    figure.legend([means], ["mean"], loc="outside upper right")
    _add_colour_bar(figure, image, panels, "share of the pairs")
    return figure


def _check_comparable(methods: Mapping[str, SimilarityHistogram]) -> None:
    """Raises ValueError unless there are histograms, over the same intervals and bins."""
    if not methods:
        raise ValueError("histogram must hold at least one method, got none")
    (first_name, first), *others = methods.items()
    for name, other in others:
        if other.intervals != first.intervals or not torch.equal(other.edges, first.edges):
            raise ValueError(
                f"the histograms of {first_name!r} and {name!r} must have the same intervals and "
                "edges of bins: give similarity_histogram the same intervals, bins and limits"
            )


@styled
def plot_losses(found: NoiseSearch) -> Figure:
    """Draws the loss, the maps' distance and the KL divergence over the iterations (App. B).

    Args:
        found: From :func:`vstar_kernels.optimize_noise`.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8.4, 2.9)
    panels = figure.subplots(1, 3)
    titles = {
        "total": "loss",
        "distance": "distance of the maps (Frobenius norm)",
        "kl": "KL divergence (nats per pixel)",
    }
    for index, ((name, title), axes) in enumerate(zip(titles.items(), panels, strict=True)):
        values = [getattr(loss, name) for loss in found.losses]
        axes.plot(values, color=COLOURS[index])
        best = axes.axvline(found.best, color=INK, linestyle=LINES[2])
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
    figure.legend([best], ["lowest loss"], loc="outside lower right")
    return figure


def _row(item: MeanMap) -> str:
    """Returns the label of a row: the part of a model that a map is of."""
    parts = [item.model] if item.model else []
    if item.level is not None and item.level != "init":
        parts.append(f"level {item.level}")
    parts += [item.place or "init"] if item.place or item.level == "init" else []
    parts += [f"branch {item.branch}"] if item.branch else []
    return ", ".join(parts) or "all layers"


def _line(item: MeanMap, figures: Sequence[MapFigures]) -> dict[str, Any]:
    """Returns a line's look: a colour for each level, a marker and a dash for each place."""
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


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure, in inches, which belongs to no window and needs no closing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _show_matrix(axes: Any, matrix: Any, scale: tuple[float, float] | Normalize) -> Any:
    """Shows a matrix over frames, the first at the upper left; returns it for a colour bar."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    norm = Normalize(*scale) if isinstance(scale, tuple) else scale
    image = axes.imshow(matrix.numpy(), norm=norm)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    return image


def _add_colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """Adds the scale of an image to the right of some axes."""
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)
