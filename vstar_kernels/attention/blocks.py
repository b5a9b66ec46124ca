"""Sums of the mean map over blocks of frames, and their gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def block_sums(maps: Tensor, block: int) -> Tensor:
    """Maps ``(batch, N, N)`` summed over blocks of frames, the last of which may be smaller."""
    if block == 1:
        return maps
    missing = -maps.shape[-1] % block
    blocks = F.pad(maps, (0, missing, 0, missing))
    return blocks.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum(dim=(-3, -1))


def block_gradient(gradient: Tensor, block: int, frames: int) -> Tensor:
    """The gradient of the maps themselves, ``(batch, N, N)``, for one of their block sums."""
    if block == 1:
        return gradient
    whole = gradient.repeat_interleave(block, -1).repeat_interleave(block, -2)
    return whole[..., :frames, :frames]
