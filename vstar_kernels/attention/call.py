"""The facts of one call: all that a backend needs to say whether it can run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vstar_kernels.attention.bias import Bias


@dataclass(slots=True)
class Problem:
    """Shapes, types and wishes of one :func:`vstar_kernels.tar_attention` call, already checked.

    ``tensors`` names every tensor of the call. ``bias`` is None where nothing is added to the
    logits (strength 0). The map, where it is returned, is summed over blocks of ``map_block`` ×
    ``map_block`` frames.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    tensors: dict[str, Tensor]
    bias: Bias | None
    scale: float
    return_map: bool
    map_block: int = 1

    @property
    def frames(self) -> int:
        """N, how many frames attend to each other."""
        return self.shape[-3]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.shape[-1]

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Of the mean map: the batch, and the frames in blocks of ``map_block``."""
        blocks = -(-self.frames // self.map_block)
        return self.shape[0], blocks, blocks

    def needs_grad(self) -> list[str]:
        """The names of the tensors whose gradient is wanted."""
        if not torch.is_grad_enabled():
            return []
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]

    def describe(self) -> str:
        """One line for each tensor, for messages."""
        lines = [
            f"{name}: {tuple(t.shape)}, strides {t.stride()}, {t.dtype}, {t.device}"
            for name, t in self.tensors.items()
        ]
        bias = type(self.bias).__name__ if self.bias is not None else "none (strength 0)"
        return "\n".join([*lines, f"bias: {bias}, return_map: {self.return_map}"])
