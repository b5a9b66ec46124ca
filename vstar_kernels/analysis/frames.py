"""Videos as users have them, as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FORMS = (
    "a (frames, channels, height, width) tensor, a (frames, height, width, channels) array, or a "
    "list of PIL images or of (height, width, channels) arrays"
)


def as_frames(frames: Any) -> Tensor:
    """A video as ``(frames, 3, height, width)``, float32, from 0 (black) to 1.

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
    arrays = [np.asarray(frame) for frame in frames]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"frames must be of one size, got {', '.join(map(str, shapes))}")
    video = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
    if video.ndim == 3:  # grey images
        video = video[..., None]
    return video.movedim(-1, 1) if video.ndim == 4 else video
