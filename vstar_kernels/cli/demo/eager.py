"""TAR as its users run it today: one PyTorch operation after the other, in the model's type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vstar_kernels.attention.bias import Bias, DenseBias
from vstar_kernels.testing import eager

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class EagerTARAttnProcessor:
    """A diffusers attention processor with TAR's formula in eager PyTorch, all maps held.

    Args:
        bias: Δ and its weight. Δ is made once, at the first call.
    """

    def __init__(self, bias: Bias) -> None:
        self._bias = bias
        self._dense: DenseBias | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends over the frames of ``(rows, frames, channels)``, projections included."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self._dense is None:
            delta = self._bias.matrix(hidden_states.shape[1]).to(query)
            self._dense = DenseBias(
                delta,
                strength=self._bias.strength,
                stat=self._bias.stat,
                clamp_negative=self._bias.clamp_negative,
                detach_stat=self._bias.detach_stat,
            )
        out = eager(query, key, value, self._dense, scale=attn.scale).flatten(-2)
        for layer in attn.to_out:
            out = layer(out)
        return out
