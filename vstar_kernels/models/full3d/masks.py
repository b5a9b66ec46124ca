"""Masks of a model's own, as the lengths of keys that frame_attention takes in their place."""

from __future__ import annotations

import torch
from torch import Tensor


def key_lengths(mask: Tensor, layer: str) -> Tensor:
    """Returns how many keys of each sequence a mask over keys leaves, ``(batch,)`` int32.

    Args:
        mask: Booleans, true where a key exists, or a bias, 0 there and at most −1,000 elsewhere;
            ``(batch, heads or 1, 1, keys)``.
        layer: The layer's name, for errors.

    Raises:
        ValueError: It is over pairs of tokens, or leaves others than the first keys, or its numbers
            are others.
    """
    if mask.ndim != 4 or mask.shape[2] != 1:
        raise ValueError(
            f"{layer} masks pairs of tokens, {tuple(mask.shape)}: frame_attention takes a length "
            "of keys in the place of a mask"
        )
    mask = mask[:, :, 0]
    exists = mask if mask.dtype == torch.bool else mask == 0
    lengths = exists.sum(-1, dtype=torch.int32)
    first = torch.arange(mask.shape[-1], device=mask.device) < lengths[..., None]
    fits = (exists == first).all() & (lengths == lengths[:, :1]).all()
    if mask.dtype != torch.bool:
        fits = fits & (exists | (mask <= -1000)).all()
    message = (
        f"{layer} masks keys in the middle of the sequence, or by halves: frame_attention takes a "
        "length of keys in the place of a mask, the last of which may be missing"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(message)
    return lengths[:, 0]
