"""What attention over a video costs, and how far it sees (ETC, A.1, B.1 and Fig. 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import check_count


@dataclass(frozen=True)
class AttentionCost:
    """The operations and parameters of self-attention, a multiplication and an addition being two.

    Attributes:
        projections: Of query, key and value, 6BLC².
        products: QKᵀ and the weights times V, 4BL²C.
        parameters: Of the three projections, 3C².
    """

    projections: int
    products: int
    parameters: int

    @property
    def operations(self) -> int:
        """All of them: 2BLC(3C + 2L)."""
        return self.projections + self.products

    def __add__(self, other: AttentionCost) -> AttentionCost:
        if not isinstance(other, AttentionCost):
            return NotImplemented
        return AttentionCost(
            self.projections + other.projections,
            self.products + other.products,
            self.parameters + other.parameters,
        )


def attention_cost(tokens: int, channels: int, batch: int = 1) -> AttentionCost:
    """Returns what self-attention costs: L tokens of C channels in each of B sequences.

    Attention over a grid of T frames of n tokens is ``attention_cost(T * n, C)``, and spatial
    followed by temporal attention ``attention_cost(n, C, T) + attention_cost(T, C, n)``. Its A.1.2
    has 2BLC² for the weights times V, which is 2BL²C; its total and its number of parameters are
    corrected here.

    Args:
        tokens: L.
        channels: C, of all heads.
        batch: B.

    Raises:
        ValueError, TypeError: A number is less than 1, or not an integer.
    """
    for name, value in (("tokens", tokens), ("channels", channels), ("batch", batch)):
        check_count(value, name, 1)
    return AttentionCost(
        6 * batch * tokens * channels**2, 4 * batch * tokens**2 * channels, 3 * channels**2
    )


def receptive_field(function: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """Returns how much each frame that comes out depends on each that goes in (ETC, B.1).

    It is a Jacobian's: the largest gradient of a random sum of an output frame's elements. Zero
    means that no change of the input frame reaches the output frame at all.

    Args:
        function: Maps a video to a video; differentiable.
        video: ``(batch, frames, …)``, floating point.

    Returns:
        ``(frames out, frames in)``, not negative.

    Raises:
        ValueError: What comes out is no ``(batch, frames, …)`` tensor, or has no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        given = video.detach().clone().requires_grad_()
        out = function(given)
        if not isinstance(out, Tensor) or out.ndim < 2 or not out.requires_grad:
            raise ValueError(
                "function must return a differentiable (batch, frames, …) tensor, got "
                + (f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__)
            )
        weights = torch.randn(out.shape, generator=generator).to(out)
        rows = []
        for frame in range(out.shape[1]):
            total = (out[:, frame] * weights[:, frame]).sum()
            (gradient,) = torch.autograd.grad(total, given, retain_graph=True)
            rows.append(gradient.abs().transpose(0, 1).flatten(1).amax(1))
    return torch.stack(rows)
