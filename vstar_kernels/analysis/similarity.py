"""How alike the frames of videos are (VSTAR, arXiv 2403.13501, Figs. 8, S.1 and S.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.analysis.embedders import (
    Embedder,
    check_embeddings,
    embed_pixels,
    structural_similarity,
)
from vstar_kernels.analysis.frames import as_frames
from vstar_kernels.attention.bias import DenseBias

LEAST_SPAN = 1e-5  # of similarities that are spread over 0 to 1; less is rounding


def frame_similarity(frames: Any, embedder: Embedder | str = "pixels") -> Tensor:
    """How alike each two frames of a video are (Fig. S.1).

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`.
        embedder: Maps ``(frames, 3, height, width)``, from 0 to 1, to ``(frames, channels)``, whose
            cosine is the similarity: :class:`DreamSimEmbedder`, as in the paper, or any other.
            ``"pixels"`` compares the pixels so, ``"ssim"`` by structural similarity instead.

    Returns:
        ``(frames, frames)``, symmetric, at least float32, from −1 to 1, with ones on the diagonal.

    Raises:
        TypeError, ValueError: ``frames`` or ``embedder`` is not that, or the embeddings are not.
    """
    video = as_frames(frames)
    if embedder == "ssim":
        return structural_similarity(video)
    if embedder == "pixels":
        embedder = embed_pixels
    elif not callable(embedder):
        raise ValueError(f'embedder must be "pixels", "ssim" or a callable, got {embedder!r}')
    directions = F.normalize(check_embeddings(embedder(video), len(video)), dim=1)
    similarity = directions @ directions.mT
    similarity.fill_diagonal_(1)  # but for rounding
    return similarity.clamp(-1, 1)


def bias_from_frames(
    frames: Any, embedder: Embedder | str = "pixels", *, min_max: bool = False, **weight: Any
) -> DenseBias:
    """Make Δ of the inter-frame similarity of a reference video, with peak 1 (Fig. 8).

    Args:
        frames, embedder: As for :func:`frame_similarity`.
        min_max: Spread the similarities over 0 to 1. Only their differences within a row tell in a
            softmax, and those of real frames are small.
        weight: ``strength``, ``stat``, … of the :class:`vstar_kernels.DenseBias`.

    Raises:
        TypeError, ValueError: As the similarity's; or ``min_max`` where all frames are alike.
    """
    similarity = frame_similarity(frames, embedder)
    if not min_max:
        return DenseBias(similarity / similarity.max(), **weight)
    low = similarity.min()
    if similarity.max() - low < LEAST_SPAN:
        raise ValueError("min_max needs frames that differ, and these are all alike")
    return DenseBias((similarity - low) / (similarity.max() - low), **weight)


@dataclass(frozen=True, eq=False)
class JointSimilarity:
    """Similarity matrices of several methods on one scale.

    Attributes:
        matrices: ``(videos, frames, frames)`` by method, from 0 to 1, the lowest and the highest
            similarity of all.
        low, high: What 0 and 1 stand for.
    """

    matrices: dict[str, Tensor]
    low: float
    high: float


def normalize_jointly(similarities: Mapping[str, Tensor | Sequence[Tensor]]) -> JointSimilarity:
    """Similarities on one scale for all methods (Fig. S.1), so that colours can be compared.

    Args:
        similarities: By method, one ``(frames, frames)`` matrix or several of its videos. The
            numbers of frames may differ between methods.

    Raises:
        ValueError: There are none, one is not square, or all the values are the same.
    """
    stacked = {name: _stack(name, value) for name, value in similarities.items()}
    if not stacked:
        raise ValueError("similarities must hold at least one method, got none")
    low = min(float(matrices.min()) for matrices in stacked.values())
    high = max(float(matrices.max()) for matrices in stacked.values())
    if high - low < LEAST_SPAN:
        raise ValueError(f"all similarities are {low:g}: there is no scale to put them on")
    scaled = {name: (matrices - low) / (high - low) for name, matrices in stacked.items()}
    return JointSimilarity(scaled, low, high)


@dataclass(frozen=True, eq=False)
class SimilarityHistogram:
    """How often which similarity occurs, by the interval between two frames (Fig. S.2).

    Attributes:
        intervals: In frames.
        edges: ``(bins + 1,)``, of the bins.
        shares: ``(intervals, bins)``: the share of an interval's pairs that is in each bin; rows
            add up to 1.
        means: ``(intervals,)``, the mean similarity at each interval.
    """

    intervals: tuple[int, ...]
    edges: Tensor
    shares: Tensor
    means: Tensor


def similarity_histogram(
    similarity: Tensor | Sequence[Tensor],
    intervals: Sequence[int] | None = None,
    *,
    bins: int = 20,
    limits: tuple[float, float] | None = None,
) -> SimilarityHistogram:
    """Histograms of the similarity of frames i and i + interval (Fig. S.2).

    Args:
        similarity: ``(frames, frames)``, or several such matrices, all counted together.
        intervals: In frames, each from 1 to frames − 1; None is all of them.
        bins: How many bins.
        limits: Where they begin and end; None is the lowest and the highest similarity there is.
            Give the same to videos that are compared.

    Raises:
        ValueError: An argument is out of range, or a similarity outside the limits.
    """
    matrices = _stack("similarity", similarity)
    frames = matrices.shape[-1]
    intervals = tuple(range(1, frames) if intervals is None else intervals)
    for interval in intervals:
        if not 1 <= interval < frames:
            raise ValueError(f"intervals of {frames} frames are 1 to {frames - 1}, got {interval}")
    if not intervals:
        raise ValueError(f"intervals must hold at least one, got none (of {frames} frames)")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    pairs = [matrices.diagonal(d, dim1=1, dim2=2).flatten() for d in intervals]
    edges = _edges(torch.cat(pairs), bins, limits)
    shares = torch.stack([torch.histogram(p.cpu(), edges)[0] / len(p) for p in pairs])
    return SimilarityHistogram(intervals, edges, shares, torch.stack([p.mean() for p in pairs]))


def _edges(values: Tensor, bins: int, limits: tuple[float, float] | None) -> Tensor:
    low, high = float(values.min()), float(values.max())
    if limits is None:
        # Bins of no width would hold nothing.
        limits = (low, high) if low < high else (low - 0.5, high + 0.5)
    elif not limits[0] < limits[1]:
        raise ValueError(f"limits must be (low, high) with low < high, got {limits}")
    elif low < limits[0] or high > limits[1]:
        raise ValueError(f"similarities are from {low:g} to {high:g}, outside limits {limits}")
    return torch.linspace(*limits, bins + 1, dtype=values.dtype)


def _stack(name: str, matrices: Tensor | Sequence[Tensor]) -> Tensor:
    stacked = matrices if isinstance(matrices, Tensor) else torch.stack(list(matrices))
    if stacked.ndim == 2:
        stacked = stacked[None]
    if stacked.ndim != 3 or stacked.shape[1] != stacked.shape[2]:
        raise ValueError(
            f"{name} must be one (frames, frames) matrix or several, got {tuple(stacked.shape)}"
        )
    return stacked.detach()
