"""How all figures look: legible on light and on dark pages, and to the colour-blind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

INK = "#7d7d7d"  # about as far from white as from black
# Okabe and Ito's colours, without those that vanish on white or on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
COLOUR_MAP = "viridis"
PANEL = 1.9  # inches, the side of a map
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
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "image.cmap": COLOUR_MAP,
    "image.interpolation": "nearest",
}


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """A plotting function under this style, which leaves Matplotlib's settings as they are.

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


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, which belongs to no window and needs no closing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def show_matrix(axes: Any, matrix: Any, limits: tuple[float, float]) -> Any:
    """A matrix over frames, the first one at the upper left; the image, for a colour bar."""
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(matrix.numpy(), vmin=limits[0], vmax=limits[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    return image


def add_colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """The scale of an image, to the right of some axes."""
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)
