"""What a map between frames says: how far attention reaches, and which kind a head is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import check_count, check_number
from vstar_kernels.attention.frames.match import frame_profile, split_text
from vstar_kernels.attention.frames.rules import FrameRule

__all__ = ["frame_entropy", "frame_profile", "head_rules", "spatial_heads", "without_text"]


def without_text(frame_map: Tensor) -> Tensor:
    """Returns how a frame's attention to the video is divided among the frames.

    :func:`band_share`, :func:`band_width` and :func:`diagonalness` take what it returns.

    Args:
        frame_map: ``(…, F, F)``, or ``(…, F, F + 1)`` with text in the last column.

    Returns:
        ``(…, F, F)`` in float64, whose rows add up to 1; to 0 where nothing goes to the video.

    Raises:
        TypeError, ValueError: It is not such a map.
    """
    between, _ = split_text(frame_map, "frame_map")
    total = between.sum(-1, keepdim=True)
    return torch.where(total > 0, between / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def frame_entropy(frame_map: Tensor) -> Tensor:
    """Returns how evenly frames attend to all frames: 0 to one frame each, 1 to all alike.

    It is the mean over the rows of their entropy, over that of uniform attention, log F.

    Args:
        frame_map: As for :func:`without_text`.

    Returns:
        ``(…,)`` in float64; 0 for a single frame.
    """
    weights = without_text(frame_map)
    frames = weights.shape[-1]
    if frames == 1:
        return weights.new_zeros(weights.shape[:-2])
    return torch.special.entr(weights).sum(-1).mean(-1) / math.log(frames)


def spatial_heads(frame_map: Tensor, w: float = 1, sink: int = 1, threshold: float = 0.5) -> Tensor:
    """Returns which heads are spatial, as Sparse VideoGen calls them (arXiv 2502.01776).

    A spatial head attends within its own frame and the next ones, a temporal head to one place in
    all frames. Sparse VideoGen samples rows and compares the error of each kind's mask. A map
    between frames knows no places, but a temporal head looks alike to all frames in it, so what
    counts is how far the share k that a spatial head's mask keeps lies above u, that of uniform
    attention: a head is spatial where (k − u) / (1 − u) reaches the threshold.

    Args:
        frame_map: ``(…, heads, F, F)``, or with a column more for text, which both masks keep:
            ``frame_attention(…, return_map=True, map_heads=True)``.
        w: How many frames away the mask keeps.
        sink: How many of the first frames it keeps for all.
        threshold: From 0, what the mask keeps of uniform attention, to 1, all.

    Returns:
        ``(…, heads)`` booleans.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of its range.
    """
    check_number(w, "w", least=0)
    check_count(sink, "sink", 0)
    check_number(threshold, "threshold", least=0)
    weights = without_text(frame_map)
    frame = torch.arange(weights.shape[-1], device=weights.device)
    kept = (((frame[:, None] - frame).abs() <= w) | (frame < sink)).double()
    lost = 1 - (weights * kept).sum(-1).mean(-1)
    return lost <= (1 - threshold) * (1 - kept.mean()) + 1e-9  # of rounding, where nothing is lost


def head_rules(
    frame_map: Tensor, width: int, w: float = 1, sink: int = 1, threshold: float = 0.5
) -> list[FrameRule]:
    """Returns Sparse VideoGen's rule of each head: a window of frames, or a band of places.

    Masks of whole frames may differ by head in one call, bands may not: attend with the heads of
    each kind in a call of their own.

    Args:
        frame_map: ``(heads, F, F)``, or ``(batch, heads, F, F)``, of which the mean counts; with a
            column more where there is text.
        width: How far apart the places of a temporal head may be, see :meth:`FrameRule.band`.
        w, sink, threshold: See :func:`spatial_heads`.
    """
    mean = frame_map.mean(0) if frame_map.ndim == 4 else frame_map
    if mean.ndim != 3:
        raise ValueError(
            "frame_map must be (heads, F, F) or (batch, heads, F, F), with a column more for text, "
            f"got {tuple(frame_map.shape)}"
        )
    spatial, temporal = FrameRule.window(w, sink), FrameRule.band(width, sink=sink)
    found = spatial_heads(mean, w, sink, threshold).tolist()
    return [spatial if is_spatial else temporal for is_spatial in found]
