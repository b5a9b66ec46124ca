"""From boxes to cells of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns which cells of a grid lie in boxes: those whose centre is inside.

    A box that is too narrow to hold a centre is one cell wide, at the cell nearest to its own
    centre; one that is too low is one cell high.

    Args:
        boxes: ``(…, 4)``, x0, y0, x1, y1 as shares of the width and the height, from the top left.
        height, width: Of the grid, in cells.

    Returns:
        ``(…, height, width)``, bool, on the boxes' device.

    Raises:
        TypeError: ``boxes`` is not a tensor.
        ValueError: It is not of boxes in [0, 1] with x0 < x1 and y0 < y1, or there are no cells.
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes must be a torch.Tensor, got {type(boxes).__name__}")
    if boxes.ndim < 1 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"boxes must be floating-point (…, 4), got {boxes.dtype} of shape {tuple(boxes.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1 cell, got {height} and {width}")
    low, high = boxes[..., :2], boxes[..., 2:]
    is_box = (low >= 0).all(-1) & (high <= 1).all(-1) & (low < high).all(-1)
    if not is_box.all():
        wrong = boxes[~is_box][0].tolist()
        raise ValueError(
            "boxes must be x0, y0, x1, y1 in [0, 1] with x0 < x1 and y0 < y1, got "
            + ", ".join(f"{value:g}" for value in wrong)
        )
    inside_x, inside_y = (
        _inside(boxes[..., axis], boxes[..., axis + 2], count)
        for axis, count in ((0, width), (1, height))
    )
    return inside_y[..., :, None] & inside_x[..., None, :]


def _inside(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Returns which of some cells in a row have their centre in an interval, ``(…, count)``."""
    centres = (torch.arange(count, dtype=torch.float64, device=low.device) + 0.5) / count
    low, high = low.double()[..., None], high.double()[..., None]
    inside = (centres >= low) & (centres <= high)
    distance = (centres - (low + high) / 2).abs()
    nearest = torch.arange(count, device=low.device) == distance.argmin(-1, keepdim=True)
    return torch.where(inside.any(-1, keepdim=True), inside, nearest)
