"""What frames are compared by: embedders of single frames, and structural similarity of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (frames, 3, height, width) from 0 to 1 -> (frames, channels).
Embedder = Callable[[Tensor], Tensor]

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, as are the constants
SSIM_CONSTANTS = (0.01**2, 0.03**2)
DREAMSIM_SIZE = 224  # pixels


def embed_pixels(frames: Tensor) -> Tensor:
    """The pixels themselves, from −1 to 1, so that a black frame has a direction too."""
    return (2 * frames - 1).flatten(1)


def structural_similarity(frames: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of each pair of frames, in grey; of 1.

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
    for own, own_mean, own_variance in zip(grey, mean, variance, strict=True):
        covariance = _blur(grey * own) - mean * own_mean
        light = (2 * mean * own_mean + low) / (mean.square() + own_mean.square() + low)
        structure = (2 * covariance + high) / (variance + own_variance + high)
        rows.append((light * structure).mean((1, 2, 3)))
    return torch.stack(rows)


def _blur(images: Tensor) -> Tensor:
    """A Gaussian window over ``(images, 1, height, width)``, where it fits."""
    offset = torch.arange(SSIM_WINDOW, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offset / SSIM_SIGMA) ** 2).to(images)
    window = window / window.sum()
    return F.conv2d(F.conv2d(images, window[None, None, :, None]), window[None, None, None])


class DreamSimEmbedder:
    """Frames by DreamSim (Fu et al. 2023), by which the paper compares them (Figs. 8, S.1, S.2).

    Args:
        model: What ``dreamsim.dreamsim`` returns, without its preprocessing; None loads it, with
            ``options``, from its own files, downloaded where they are not there yet.
        batch_size: How many frames it embeds at a time.
        options: Of ``dreamsim.dreamsim``, such as ``cache_dir`` and ``dreamsim_type``.

    Raises:
        ImportError: ``model`` is None and the package ``dreamsim`` is not installed.
    """

    def __init__(self, model: Any = None, *, batch_size: int = 16, **options: Any) -> None:
        self._model = _load_dreamsim(options) if model is None else model
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """``(frames, channels)``, on the device of ``frames``."""
        parameter = next(self._model.parameters())
        size = (DREAMSIM_SIZE, DREAMSIM_SIZE)
        resized = F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        parts = [self._model.embed(part.to(parameter)) for part in resized.split(self._batch_size)]
        return torch.cat(parts).to(frames)


def _load_dreamsim(options: dict[str, Any]) -> Any:
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ImportError(
            'DreamSimEmbedder needs the package dreamsim (pip install dreamsim); "pixels" and '
            '"ssim" need nothing'
        ) from error
    model, _ = dreamsim(pretrained=True, **options)
    return model


def check_embeddings(embeddings: Any, num_frames: int) -> Tensor:
    """What an embedder returned, in at least float32.

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
