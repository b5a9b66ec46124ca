"""Figures of the similarity of frames, and of the search for noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vstar_kernels.analysis.plots_style import (
    COLOURS,
    INK,
    LINES,
    PANEL,
    add_colour_bar,
    new_figure,
    show_matrix,
    styled,
)
from vstar_kernels.analysis.similarity import JointSimilarity, SimilarityHistogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Loss(Protocol):
    """The loss of one iteration of the search for noise."""

    @property
    def total(self) -> float:
        """What is minimised."""

    @property
    def distance(self) -> float:
        """Of the maps: a mean of Frobenius norms."""

    @property
    def kl(self) -> float:
        """In nats per pixel."""


class NoiseSearch(Protocol):
    """A search for noise, such as :class:`vstar_kernels.OptimizedNoise`."""

    @property
    def losses(self) -> Sequence[Loss]:
        """Of each iteration."""

    @property
    def best(self) -> int:
        """The iteration of the lowest loss."""


@styled
def plot_similarities(joint: JointSimilarity, *, video: int = 0) -> Figure:
    """Similarity matrices of several methods side by side, on one scale (Fig. S.1).

    Args:
        joint: From :func:`vstar_kernels.analysis.normalize_jointly`.
        video: Which one of each method.
    """
    figure = new_figure(PANEL * len(joint.matrices) + 1.4, PANEL + 0.7)
    panels = figure.subplots(1, len(joint.matrices), squeeze=False)[0]
    image = None
    for axes, (name, matrices) in zip(panels, joint.matrices.items(), strict=True):
        image = show_matrix(axes, matrices[video].cpu(), (0, 1))
        axes.set_title(name)
        axes.set_xlabel("frame")
    panels[0].set_ylabel("frame")
    label = f"similarity\n0: {joint.low:.3g}, 1: {joint.high:.3g}"
    add_colour_bar(figure, image, panels, label)
    return figure


@styled
def plot_histogram(histogram: SimilarityHistogram) -> Figure:
    """The shares of similarities, a row of bins for each interval, and their means (Fig. S.2).

    Args:
        histogram: From :func:`vstar_kernels.analysis.similarity_histogram`.
    """
    from matplotlib.ticker import MaxNLocator

    rows = range(len(histogram.intervals) + 1)
    figure = new_figure(5.2, max(2.4, 0.2 * len(rows) + 1.2))
    axes = figure.subplots()
    image = axes.pcolormesh(histogram.edges.numpy(), rows, histogram.shares.numpy(), vmin=0)
    centres = [row + 0.5 for row in rows[:-1]]
    # White with a dark edge is seen on every colour of the map.
    style = {"color": "white", "markeredgecolor": "black", "marker": "o", "markersize": 5}
    axes.plot(histogram.means.cpu().tolist(), centres, linestyle="", label="mean", **style)
    axes.invert_yaxis()
    every = -(-len(centres) // 12)
    axes.set_yticks(centres[::every], [str(i) for i in histogram.intervals[::every]])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("similarity of two frames")
    axes.set_ylabel("interval (frames)")
    figure.legend(loc="outside upper right")
    add_colour_bar(figure, image, axes, "share of the pairs")
    return figure


@styled
def plot_losses(found: NoiseSearch) -> Figure:
    """The loss, the maps' distance and the KL divergence over the iterations (App. B).

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
