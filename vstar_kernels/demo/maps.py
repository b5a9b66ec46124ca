"""What the demo says about an attention map."""

from __future__ import annotations

import torch
from torch import Tensor


def band_share(attention_map: Tensor, half_width: int = 1) -> float:
    """The share of the attention that goes to frames at most ``half_width`` away; of 1."""
    frame = torch.arange(len(attention_map))
    near = (frame[:, None] - frame).abs() <= half_width
    return float((attention_map * near).sum(dim=-1).mean())
