"""Pictures of a plan: its boxes over frames, the maps of its words, and what guidance did.

As of :mod:`vstar_kernels.analysis.plots`, they are legible on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vstar_kernels.analysis.plots import COLOURS, INK, LINES, MARKERS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # frames, at equal distances
SIDE = 1.35  # inches, of a frame
KEY_TO_LINES = 0.5  # inches, of a legend


class Update(Protocol):
    """One update of the latents, such as :class:`vstar_kernels.GuidanceUpdate`."""

    @property
    def step(self) -> int:
        """The index of the denoising step."""

    @property
    def spatial(self) -> float | None:
        """The loss of the nouns; None where it is not in use."""

    @property
    def syntax(self) -> float | None:
        """The loss of the verbs; None where it is not in use."""

    @property
    def mass(self) -> float:
        """The share of the nouns' maps in their boxes, of 1."""


@styled
def plot_plan(
    boxes: Tensor, present: Tensor, labels: Sequence[str], frames: Sequence[Any] | None = None
) -> Figure:
    """Draws where the subjects of a plan are, over up to eight frames.

    Args:
        boxes: ``(subjects, frames, 4)``, x0, y0, x1, y1 as shares of width and height.
        present: Whether each subject is in each frame, bool ``(subjects, frames)``.
        labels: Of the subjects.
        frames: The video, as PIL images or arrays ``(height, width, 3)``; None draws the boxes
            alone.

    Raises:
        ValueError: There are no subjects, or not as many labels or frames.
    """
    _check(boxes, present, labels, frames)
    shown = _shown(boxes.shape[1])
    aspect = 0.625 if frames is None else _aspect(frames[0])
    figure = new_figure(SIDE * len(shown), SIDE * aspect + KEY_TO_LINES + 0.25)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, frame in zip(panels, shown, strict=True):
        if frames is not None:
            axes.imshow(frames[frame], extent=(0, 1, 1, 0), aspect="auto")
        _frame_of_video(axes, frame, aspect)
        _draw_boxes(axes, boxes[:, frame], present[:, frame])
    _name_subjects(figure, labels)
    return figure


@styled
def plot_word_maps(
    maps: Tensor,
    words: Sequence[str],
    boxes: Tensor | None = None,
    present: Tensor | None = None,
    subjects: Sequence[Sequence[int]] | None = None,
) -> Figure:
    """Draws the cross-attention maps of words, a row each, over up to eight frames.

    Each row has a scale of its own, from 0 to its maximum.

    Args:
        maps: ``(frames, words, height, width)``.
        words: Their names.
        boxes, present: As for :func:`plot_plan`; None draws no boxes.
        subjects: Of each word the subjects whose boxes are drawn; None is all of them.

    Raises:
        ValueError: There are no words, or not as many names.
    """
    if maps.ndim != 4 or maps.shape[1] != len(words) or not len(words):
        raise ValueError(
            "maps must be (frames, words, height, width) with a name for each word, got shape "
            f"{tuple(maps.shape)} and {len(words)} names"
        )
    shown = _shown(maps.shape[0])
    aspect = maps.shape[-2] / maps.shape[-1]
    figure = new_figure(SIDE * len(shown), (SIDE * aspect + 0.1) * len(words) + 0.3)
    grid = figure.subplots(len(words), len(shown), squeeze=False)
    for row, word in enumerate(words):
        largest = float(maps[:, row].max())
        for axes, frame in zip(grid[row], shown, strict=True):
            cells = maps[frame, row].detach().float().cpu().numpy()
            axes.imshow(cells, vmin=0, vmax=largest or 1.0, extent=(0, 1, 1, 0), aspect="auto")
            _frame_of_video(axes, frame if row == 0 else None, aspect)
            if boxes is not None and present is not None:
                chosen = range(len(boxes)) if subjects is None else subjects[row]
                _draw_boxes(axes, boxes[:, frame], present[:, frame], chosen)
        grid[row, 0].set_ylabel(word)
    return figure


@styled
def plot_guidance(updates: Sequence[Update]) -> Figure:
    """Draws the losses and the share of the nouns' attention in the boxes, update by update.

    Args:
        updates: Such as ``handle.updates`` of :func:`vstar_kernels.guide_latents`.

    Raises:
        ValueError: There are none.
    """
    if not updates:
        raise ValueError("updates must hold at least one update, got none")
    figure = new_figure(7.2, 2.5)
    panels = figure.subplots(1, 3)
    values: dict[str, list[float | None]] = {
        "spatial loss": [item.spatial for item in updates],
        "syntax loss": [item.syntax for item in updates],
        "nouns' attention in boxes": [item.mass for item in updates],
    }
    begins = [
        place
        for place, item in enumerate(updates)
        if place == 0 or updates[place - 1].step != item.step
    ]
    marked = begins[:: -(-len(begins) // 6)]
    for (title, series), axes, colour, marker, line in zip(
        values.items(), panels, COLOURS, MARKERS, LINES, strict=False
    ):
        axes.set_title(title)
        axes.set_xticks(marked, [str(updates[place].step) for place in marked])
        axes.set_xlabel("denoising step")
        axes.grid(True)
        axes.set_xlim(-0.5, len(updates) - 0.5)
        if all(value is None for value in series):
            axes.text(0.5, 0.5, "not in use", transform=axes.transAxes, ha="center", va="center")
            axes.set_yticks([])
            continue
        for first, last in zip(begins, [*begins[1:], len(updates)], strict=True):
            step = [float("nan") if value is None else value for value in series[first:last]]
            axes.plot(
                range(first, last), step, color=colour, marker=marker, linestyle=line, markersize=3
            )
    panels[2].set_ylim(0, 1)
    return figure


def _shown(frames: int) -> list[int]:
    """Returns up to eight frames, the first and the last among them."""
    count = min(frames, SHOWN)
    return [round(x) for x in torch.linspace(0, frames - 1, count, dtype=torch.float64).tolist()]


def _aspect(frame: Any) -> float:
    if hasattr(frame, "size") and isinstance(frame.size, tuple):  # PIL's (width, height)
        width, height = frame.size
    else:
        height, width = frame.shape[:2]
    return float(height / width)


def _frame_of_video(axes: Any, frame: int | None, aspect: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_box_aspect(aspect)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    if frame is not None:
        axes.set_title(f"frame {frame}")


def _draw_boxes(
    axes: Any, boxes: Tensor, present: Tensor, chosen: Sequence[int] | range | None = None
) -> None:
    from matplotlib.patches import Rectangle

    for subject in range(len(boxes)) if chosen is None else chosen:
        if not present[subject]:
            continue
        x0, y0, x1, y1 = boxes[subject].tolist()
        # A light line under the coloured one, so that it shows on any picture.
        for colour, width, line in (
            ("white", 3.0, "-"),
            (COLOURS[subject % len(COLOURS)], 1.6, _line(subject)),
        ):
            axes.add_patch(
                Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                    linestyle=line,
                    clip_on=False,
                )
            )


def _line(subject: int) -> Any:
    """Returns the line of a subject's box: each colour comes again with another one."""
    return LINES[subject // len(COLOURS) % len(LINES)]


def _name_subjects(figure: Any, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=COLOURS[index % len(COLOURS)],
            linestyle=_line(index),
        )
        for index in range(len(labels))
    ]
    figure.legend(handles, labels, loc="outside lower left", ncols=4, labelcolor=INK)


def _check(
    boxes: Tensor, present: Tensor, labels: Sequence[str], frames: Sequence[Any] | None
) -> None:
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or not boxes.numel():
        raise ValueError(f"boxes must be (subjects, frames, 4), got shape {tuple(boxes.shape)}")
    if present.shape != boxes.shape[:2]:
        raise ValueError(
            f"present must be (subjects, frames), {tuple(boxes.shape[:2])}, got "
            f"{tuple(present.shape)}"
        )
    if len(labels) != len(boxes):
        raise ValueError(f"labels must be of {len(boxes)} subjects, got {len(labels)}")
    if frames is not None and len(frames) != boxes.shape[1]:
        raise ValueError(f"frames must be the plan's {boxes.shape[1]}, got {len(frames)}")
