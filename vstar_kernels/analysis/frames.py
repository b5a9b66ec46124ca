"""Videos as users have them, and how alike their frames are (VSTAR, Figs. 8, S.1 and S.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.attention.bias import DenseBias

# (frames, 3, height, width) from 0 to 1 -> (frames, channels).
Embedder = Callable[[Tensor], Tensor]

FORMS = (
    "a (frames, channels, height, width) tensor, a (frames, height, width, channels) array, or a "
    "list of PIL images or of (height, width, channels) arrays"
)
OTHER_MODES = {"1", "P", "PA", "HSV", "CMYK", "YCbCr", "LAB"}  # of PIL images: no shares of colours
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, as are the constants
SSIM_CONSTANTS = (0.01**2, 0.03**2)
DREAMSIM_SIZE = 224  # pixels
LEAST_SPAN = 1e-5  # of similarities that are spread over 0 to 1; less is rounding


def as_frames(frames: Any) -> Tensor:
    """Returns a video as ``(frames, 3, height, width)``, float32, from 0 (black) to 1.

    Args:
        frames: A tensor ``(frames, channels, height, width)``; a NumPy array ``(frames, height,
            width, channels)``, as pipelines return with ``output_type="np"``; or a list of PIL
            images or of such arrays. Integers are of 0 to 255, floating-point numbers of 0 to 1;
            one channel is grey.

    Raises:
        TypeError: It is of another kind.
        ValueError: There are no frames, or they are of another shape or range.
    """
    video = frames if isinstance(frames, Tensor) else _from_arrays(frames)
    if video.ndim != 4 or not len(video) or video.shape[1] not in (1, 3):
        raise ValueError(
            f"frames must be {FORMS}, with one or three channels; as a tensor it has shape "
            f"{tuple(video.shape)}"
        )
    if video.dtype == torch.uint8:
        video = video.float() / 255
    elif not video.is_floating_point():
        raise ValueError(f"frames must be uint8 or floating point, got {video.dtype}")
    video = video.float()
    if not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(
            f"frames must be from 0 to 1, got {video.min():g} to {video.max():g}: models' own "
            "values of -1 to 1 are (frames + 1) / 2"
        )
    return video.expand(-1, 3, -1, -1)


def _from_arrays(frames: Any) -> Tensor:
    import numpy as np

    if isinstance(frames, str) or not isinstance(frames, np.ndarray | Sequence):
        raise TypeError(f"frames must be {FORMS}, got {type(frames).__name__}")
    arrays = [
        np.asarray(x.convert("RGB") if getattr(x, "mode", "") in OTHER_MODES else x) for x in frames
    ]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"frames must be of one size, got {', '.join(map(str, shapes))}")
    video = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
    if video.ndim == 3:  # grey images
        video = video[..., None]
    return video.movedim(-1, 1) if video.ndim == 4 else video


def frame_similarity(frames: Any, embedder: Embedder | str = "pixels") -> Tensor:
    """Returns how alike each two frames of a video are (Fig. S.1).

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
    """Makes Δ of the inter-frame similarity of a reference video, with peak 1 (Fig. 8).

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
    """Puts the similarities of all methods on one scale (Fig. S.1), to compare their colours.

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
    """Counts the similarities of frames i and i + interval (Fig. S.2).

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
    return torch.linspace(*limits, bins + 1, dtype=values.dtype, device="cpu")


def _stack(name: str, matrices: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(matrices, Tensor):
        stacked = matrices
    else:
        several = list(matrices)
        stacked = torch.stack(several) if several else torch.empty(0, 0, 0)
    if stacked.ndim == 2:
        stacked = stacked[None]
    if stacked.ndim != 3 or stacked.shape[1] != stacked.shape[2]:
        raise ValueError(
            f"{name} must be one (frames, frames) matrix or several, got {tuple(stacked.shape)}"
        )
    if stacked.numel() == 0:
        raise ValueError(f"{name} must be one (frames, frames) matrix or several, got none")
    return stacked.detach()


def embed_pixels(frames: Tensor) -> Tensor:
    """Returns the pixels themselves, from −1 to 1, so that a black frame has a direction too."""
    return (2 * frames - 1).flatten(1)


def structural_similarity(frames: Tensor) -> Tensor:
    """Returns the SSIM (Wang et al. 2004) of each pair of frames, in grey; at most 1.

    Args:
        frames: ``(frames, 3, height, width)``, from 0 to 1, at least 11 × 11 pixels.

    Returns:
        ``(frames, frames)``, symmetric, with ones on the diagonal.

    Raises:
        ValueError: The frames are smaller than the window.
    """
    if min(frames.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {SSIM_WINDOW} × {SSIM_WINDOW} pixels, "
            f"got {frames.shape[-2]} × {frames.shape[-1]}"
        )
    grey = (frames * frames.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    mean = _blur(grey)
    variance = _blur(grey.square()) - mean.square()
    low, high = SSIM_CONSTANTS
    rows = []
    for frame, frame_mean, frame_variance in zip(grey, mean, variance, strict=True):
        covariance = _blur(grey * frame) - mean * frame_mean
        light = (2 * mean * frame_mean + low) / (mean.square() + frame_mean.square() + low)
        structure = (2 * covariance + high) / (variance + frame_variance + high)
        rows.append((light * structure).mean((1, 2, 3)))
    return torch.stack(rows)


def _blur(images: Tensor) -> Tensor:
    """Weighs ``(images, 1, height, width)`` by a Gaussian window, where it fits."""
    offset = torch.arange(SSIM_WINDOW, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offset / SSIM_SIGMA) ** 2).to(images)
    window = window / window.sum()
    return F.conv2d(F.conv2d(images, window[None, None, :, None]), window[None, None, None])


class DreamSimEmbedder:
    """Embeds frames by DreamSim (Fu et al. 2023), as the paper does (Figs. 8, S.1, S.2).

    Args:
        model: What ``dreamsim.dreamsim`` returns, without its preprocessing; None loads it, with
            ``options``, from its own files, downloaded where they are not there yet.
        batch_size: How many frames it embeds at a time.
        options: Of ``dreamsim.dreamsim``, such as ``dreamsim_type``. Unless they are given, its
            ``device`` is a GPU where there is one and else the CPU, and its ``cache_dir`` a folder
            in :func:`torch.hub.get_dir`.

    Raises:
        ImportError: ``model`` is None and the package ``dreamsim`` is not installed.
    """

    def __init__(self, model: Any = None, *, batch_size: int = 16, **options: Any) -> None:
        self._model = _load_dreamsim(options) if model is None else model
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Returns ``(frames, channels)``, on the device of ``frames``."""
        parameter = next(self._model.parameters())
        size = (DREAMSIM_SIZE, DREAMSIM_SIZE)
        resized = F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        batches = resized.split(self._batch_size)
        return torch.cat([self._model.embed(b.to(parameter)) for b in batches]).to(frames)


def _load_dreamsim(options: dict[str, Any]) -> Any:
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ImportError(
            'DreamSimEmbedder needs the package dreamsim (pip install dreamsim); "pixels" and '
            '"ssim" need nothing'
        ) from error
    # Its own defaults are a GPU, and a folder in the one that happens to be the current one.
    ours = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cache_dir": os.path.join(torch.hub.get_dir(), "dreamsim"),
    }
    model, _ = dreamsim(pretrained=True, **{**ours, **options})
    return model


def check_embeddings(embeddings: Any, num_frames: int) -> Tensor:
    """Checks what an embedder returned, and returns it in at least float32.

    Raises:
        TypeError: It is not a tensor.
        ValueError: It is not one vector for each frame, or one that has no direction.
    """
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"the embedder must return a tensor, got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or len(embeddings) != num_frames:
        raise ValueError(
            f"the embedder must return (frames, channels) for its {num_frames} frames, "
            f"got {tuple(embeddings.shape)}"
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    for frame, length in enumerate(embeddings.norm(dim=1).tolist()):
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"the embedding of frame {frame} has length {length:g}: no direction")
    return embeddings
