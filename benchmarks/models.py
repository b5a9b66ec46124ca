"""Video UNets with random weights in their real architectures."""

from __future__ import annotations

from typing import Any

TEXT_TOKENS = 77
REAL_WIDTH = 320  # channels at the finest level


def unet3d(width: int) -> Any:
    """ModelScope's UNet, which VideoCrafter2 and ZeroScope share, ``width`` channels at level 0."""
    from diffusers import UNet3DConditionModel

    head = 64 if width % 64 == 0 else 32
    return UNet3DConditionModel(block_out_channels=_channels(width), attention_head_dim=head)


def motion(width: int) -> Any:
    """AnimateDiff's UNet, ``width`` channels at level 0."""
    from diffusers import UNetMotionModel

    return UNetMotionModel(block_out_channels=_channels(width), cross_attention_dim=768)


def _channels(width: int) -> tuple[int, ...]:
    return (width, 2 * width, 4 * width, 4 * width)
