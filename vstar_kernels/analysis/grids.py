"""Videos as grid images: frames laid out in rows and columns of one picture (ETC).

ETC turns the frames of a video into the cells of one image, so that an image model's spatial
attention is attention over all tokens of all frames. Its eq. 1 counts frames down the columns:
cell (i, j) of a grid of R rows holds frame i + j · R. The functions here take that order by
default (``order="column"``); ``"row"`` counts along the rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vstar_kernels.analysis.frames import as_frames
from vstar_kernels.attention.bias import check_finite
from vstar_kernels.attention.frames.layout import Frames, Layout, check_count

Order = Literal["column", "row"]
EmbeddingIndex = Literal["paper", "time"]
THETA = 10000.0  # the paper only says that it is a big number


def grid_shape(frames: int, *, rows: int | None = None) -> tuple[int, int]:
    """Returns the rows and columns of a grid: the most square factors, rows no more than columns.

    16 frames are 4 × 4, 32 are 4 × 8, 256 are 16 × 16.

    Args:
        frames: Number of frames, at least 1.
        rows: Number of rows, which divides ``frames``; None chooses.

    Raises:
        ValueError: A number is less than 1, or ``rows`` does not divide ``frames``.
        TypeError: A number is not an integer.
    """
    check_count(frames, "frames", 1)
    if rows is None:
        rows = next(n for n in range(math.isqrt(frames), 0, -1) if frames % n == 0)
    check_count(rows, "rows", 1)
    if frames % rows:
        raise ValueError(f"rows must divide the {frames} frames, got {rows}")
    return rows, frames // rows


def to_grid(video: Tensor, rows: int, cols: int, order: Order = "column") -> Tensor:
    """Returns a video as one image, its frames in the cells of a grid (ETC, eq. 1).

    It is a view and one copy, for latents or pixels, and differentiable.

    Args:
        video: ``(batch, frames, channels, h, w)``.
        rows, cols: Of the grid, ``rows · cols`` frames.
        order: ``"column"``: frames count down the columns, as in the paper; ``"row"``.

    Returns:
        ``(batch, channels, rows · h, cols · w)``.

    Raises:
        ValueError, TypeError: An argument is bad, or the numbers do not fit.
    """
    _check_grid(rows, cols, order)
    if not isinstance(video, Tensor):
        raise TypeError(f"video must be a torch.Tensor, got {type(video).__name__}")
    if video.ndim != 5:
        raise ValueError(
            f"video must be (batch, frames, channels, h, w), got shape {tuple(video.shape)}"
        )
    if rows * cols != video.shape[1]:
        raise ValueError(
            f"a grid of {rows} × {cols} cells holds {rows * cols} frames, video has "
            f"{video.shape[1]}"
        )
    if order == "column":
        cells = video.unflatten(1, (cols, rows)).permute(0, 3, 2, 4, 1, 5)
    else:
        cells = video.unflatten(1, (rows, cols)).permute(0, 3, 1, 4, 2, 5)
    return cells.flatten(4, 5).flatten(2, 3)


def from_grid(image: Tensor, rows: int, cols: int, order: Order = "column") -> Tensor:
    """Returns the video whose frames are the cells of a grid image: the inverse of `to_grid`.

    Args:
        image: ``(batch, channels, rows · h, cols · w)``.
        rows, cols, order: As for :func:`to_grid`.

    Returns:
        ``(batch, frames, channels, h, w)``.

    Raises:
        ValueError, TypeError: An argument is bad, or a size is not divisible.
    """
    _check_grid(rows, cols, order)
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
    if image.ndim != 4:
        raise ValueError(
            f"image must be (batch, channels, height, width), got shape {tuple(image.shape)}"
        )
    h, w = cell_size(image.shape[2], image.shape[3], rows, cols)
    cells = image.unflatten(3, (cols, w)).unflatten(2, (rows, h))  # (B, C, rows, h, cols, w)
    order_of_cells = (0, 4, 2, 1, 3, 5) if order == "column" else (0, 2, 4, 1, 3, 5)
    return cells.permute(order_of_cells).flatten(1, 2)


def cell_size(height: int, width: int, rows: int, cols: int) -> tuple[int, int]:
    """Returns the height and width of a frame in a grid image.

    Raises:
        ValueError: The image's size is not divisible by the grid's.
    """
    if height % rows or width % cols:
        raise ValueError(
            f"an image of {height} × {width} does not divide into {rows} rows and {cols} columns"
        )
    return height // rows, width // cols


def token_frames(rows: int, cols: int, h: int, w: int, order: Order = "column") -> Tensor:
    """Returns the frame of each token of a grid image, row by row: ``(rows · h · cols · w,)``.

    Args:
        rows, cols, order: As for :func:`to_grid`.
        h, w: The size of a frame, in tokens.

    Raises:
        ValueError, TypeError: An argument is bad.
    """
    i, j = _cells(rows, cols, h, w, order)
    return (i + j * rows if order == "column" else i * cols + j).flatten()


def frame_order(rows: int, cols: int, h: int, w: int, order: Order = "column") -> Tensor:
    """Returns the permutation that puts a grid image's tokens in the order of frames.

    >>> frame_major = tokens[:, vk.analysis.frame_order(4, 4, h, w)]

    A frame's own tokens stay row by row. ``argsort`` of it is the inverse.

    Returns:
        ``(rows · h · cols · w,)``, int64.

    Raises:
        ValueError, TypeError: An argument is bad.
    """
    return token_frames(rows, cols, h, w, order).argsort(stable=True)


@functools.lru_cache(maxsize=64)
def grid_layout(rows: int, cols: int, h: int, w: int, order: Order = "column") -> Layout:
    """Returns the layout of a grid image's tokens, row by row, for :func:`frame_attention`.

    No token is moved: the kernels find the frames in the image's own order. Frames are numbered by
    first appearance, along the rows; their coordinates are the frames' times.

    Raises:
        ValueError, TypeError: An argument is bad.
    """
    _check_grid(rows, cols, order)
    check_count(h, "h", 1)
    lines = []
    for i in range(rows):
        first, step = (i, rows) if order == "column" else (i * cols, 1)
        lines += [Frames(cols, w, first=first, step=step)] * h
    return Layout(*lines)


def mixed_embedding(
    rows: int,
    cols: int,
    h: int,
    w: int,
    channels: int,
    *,
    theta: float = THETA,
    index: EmbeddingIndex = "paper",
    order: Order = "column",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the mixed embedding, which tells each token its place and its frame (ETC, eq. 25).

    With C the number of channels, (x, y) the token's row and column in the image and (i, j) its
    frame's cell::

        ME[c, x, y] = sin((x mod h) / θ^(c/C)) + cos((y mod w) / θ^(c/C))        for c < ⌊C/2⌋
        ME[c, x, y] = sin(u / θ^((c − ⌊C/2⌋)/C)) + cos(u / θ^((c − ⌊C/2⌋)/C))    for the others

    Args:
        rows, cols, h, w: As for :func:`token_frames`.
        channels: C, at least 2: the latents' channels.
        theta: θ > 1.
        index: ``"paper"``: u = i · rows · h + j, as eqs. 19 and 21 have it, which grows along the
            rows while eq. 1 counts frames down the columns. ``"time"``: u is the frame's number.
        order: Of the frames, for ``index="time"``.
        dtype: Of the result; it is computed in float64.

    Returns:
        ``(channels, rows · h, cols · w)``.

    Raises:
        ValueError, TypeError: An argument is bad.
    """
    check_count(channels, "channels", 2)
    check_finite(theta, "theta")
    if theta <= 1:
        raise ValueError(f"theta must be more than 1, got {theta}")
    if index not in get_args(EmbeddingIndex):
        raise ValueError(f"index must be 'paper' or 'time', got {index!r}")
    i, j = _cells(rows, cols, h, w, order)
    x = torch.arange(rows * h, device="cpu")[:, None] % h
    y = torch.arange(cols * w, device="cpu")[None] % w
    time = i + j * rows if order == "column" else i * cols + j
    u = i * (rows * h) + j if index == "paper" else time
    half = channels // 2
    power = torch.arange(max(half, channels - half), dtype=torch.float64, device="cpu") / channels
    scale = (theta**power)[:, None, None]
    place = torch.sin(x / scale[:half]) + torch.cos(y / scale[:half])
    frame = torch.sin(u / scale[: channels - half]) + torch.cos(u / scale[: channels - half])
    return torch.cat([place.expand(-1, *frame.shape[1:]), frame]).to(dtype)


def seam_error(frames: Any, threshold: float = 4.0) -> float:
    """Returns the share of a video's frames that are cut wrongly: with a seam inside (our measure).

    ETC's Table 2 has an Err. of wrongly cut frames and does not define it. Here a frame is cut
    wrongly if the step of the picture across some inner row or column is more than ``threshold``
    times what it is across most of them, and no more than that on both sides of it: one sharp line
    from edge to edge, as the border of a neighbouring cell makes it. The step across a row or
    column is the median over its pixels, so that an object's outline is none.

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`, at least 4 × 4 pixels.
        threshold: How many times the median is too much, more than 1.

    Raises:
        TypeError, ValueError: An argument is bad.
    """
    check_finite(threshold, "threshold")
    if threshold <= 1:
        raise ValueError(f"threshold must be more than 1, got {threshold}")
    video = as_frames(frames)
    if min(video.shape[-2:]) < 4:
        raise ValueError(
            f"frames must have at least 4 × 4 pixels, got {video.shape[-2]} × {video.shape[-1]}"
        )
    down = (video[..., 1:, :] - video[..., :-1, :]).abs().mean(1).median(2).values
    across = (video[..., 1:] - video[..., :-1]).abs().mean(1).median(1).values  # (frames, w − 1)
    level = threshold * torch.cat([down, across], 1).median(1, keepdim=True).values
    level = level.clamp(min=1 / 255)  # a step of a picture without texture
    cut = torch.zeros(len(video), dtype=torch.bool, device=video.device)
    for steps in (down, across):
        sharp = (steps > level)[:, 1:-1] & (steps <= level)[:, :-2] & (steps <= level)[:, 2:]
        cut |= sharp.any(1)
    return float(cut.float().mean())


def _cells(rows: int, cols: int, h: int, w: int, order: Any) -> tuple[Tensor, Tensor]:
    """Returns the row and the column of each token's cell, each ``(rows · h, cols · w)``."""
    _check_grid(rows, cols, order)
    check_count(h, "h", 1)
    check_count(w, "w", 1)
    i = torch.arange(rows * h, device="cpu")[:, None] // h
    j = torch.arange(cols * w, device="cpu")[None] // w
    return i.expand(-1, cols * w), j.expand(rows * h, -1)


def _check_grid(rows: Any, cols: Any, order: Any) -> None:
    check_count(rows, "rows", 1)
    check_count(cols, "cols", 1)
    check_order(order)


def check_order(order: Any) -> None:
    """Raises ValueError unless it is an order of frames."""
    if order not in get_args(Order):
        raise ValueError(f"order must be 'column' or 'row', got {order!r}")
