"""TAR as its users run it today: one PyTorch operation after the other, in the model's type.

It is written for the comparison, and shares nothing with the package's reference, which computes in
at least float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vstar_kernels.attention.bias import Bias

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class EagerTARAttnProcessor:
    """softmax(φ + strength · maxⱼ φ · Δ) V over ``(rows, frames, channels)``, all maps held."""

    def __init__(self, bias: Bias) -> None:
        self.bias = bias
        self._delta: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over the frames of each row, projections included."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        logits = query @ key.mT * attn.scale  # (rows, heads, frames, frames)
        row_max = logits.amax(dim=-1, keepdim=True)
        logits = logits + row_max * self._scaled_delta(logits)
        out = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)
        for layer in attn.to_out:
            out = layer(out)
        return out

    def _scaled_delta(self, logits: Tensor) -> Tensor:
        """strength · Δ, made once."""
        if self._delta is None:
            delta = self.bias.strength * self.bias.matrix(logits.shape[-1])
            self._delta = delta.to(logits)
        return self._delta
