"""How results are allocated."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like(tensor: Tensor) -> Tensor:
    """As ``torch.empty_like``, always with head_dim contiguous, as the kernels write it."""
    like = torch.empty_like(tensor)
    if like.stride(-1) == 1:
        return like
    # Of a tensor with expanded dimensions, whose order means nothing.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
