"""Temporal attention regularization in diffusers' models.

>>> from diffusers import UNet3DConditionModel
>>> from vstar_kernels.processors.diffusers import TARAttnProcessor, temporal_attentions
>>> for layer in temporal_attentions(unet):
...     if layer.level == 0:
...         layer.module.set_processor(TARAttnProcessor(vk.GaussianBias(sigma=1.0)))
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vstar_kernels.attention import tar_attention
from vstar_kernels.bias import Bias

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

# `transformer_in`, VSTAR's init block, has temporal attention too; the paper leaves it alone.
TEMPORAL_ATTENTION = re.compile(
    r"(?P<block>(?:down|up)_blocks\.(?P<index>\d+)|mid_block)\."
    r"temp_attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
)


class TARAttnProcessor:
    """An attention processor for the temporal self-attention of diffusers' ``Attention``.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape. Without a bias it computes what ``AttnProcessor2_0`` computes.

    Args:
        bias: The regularization; None is plain attention.
        backend: As for :func:`vstar_kernels.tar_attention`.
    """

    def __init__(self, bias: Bias | None, *, backend: str | None = None) -> None:
        self.bias = bias
        self.backend = backend

    # `Attention.forward` passes on only the keywords that it finds here by name.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention over the frames of each row, projections included.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention; the
                message lists everything that it asks for.
        """
        reasons = _why_not(attn, hidden_states, encoder_hidden_states, attention_mask)
        if reasons:
            raise ValueError(f"TARAttnProcessor does not support {'; '.join(reasons)}")

        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = tar_attention(query, key, value, self.bias, scale=attn.scale, backend=self.backend)
        out = out.flatten(-2)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        if attn.residual_connection:
            out = out + hidden_states
        # Dividing by 1 would be a pass over the memory, which costs as much as small attention.
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _why_not(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> list[str]:
    """What is asked for that TARAttnProcessor would have to ignore; empty if nothing is."""
    reasons = []
    if hidden_states.ndim != 3:
        reasons.append(
            "hidden_states other than (rows, frames, channels), "
            f"got shape {tuple(hidden_states.shape)}"
        )
    if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
        reasons.append(
            "cross-attention (encoder_hidden_states of shape "
            f"{tuple(encoder_hidden_states.shape)}): it is for self-attention over frames"
        )
    if attention_mask is not None:
        reasons.append(f"an attention_mask, got shape {tuple(attention_mask.shape)}")
    for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim"):
        if getattr(attn, name) is not None:
            reasons.append(f"an attention module with {name}")
    if attn.is_causal:
        reasons.append("causal attention (is_causal)")
    if attn.inner_kv_dim != attn.inner_dim:
        reasons.append(
            "fewer key and value heads than query heads "
            f"({attn.inner_kv_dim} channels for {attn.inner_dim})"
        )
    if attn.to_out is None:
        reasons.append("an attention module without an output projection (pre_only)")
    return reasons


@dataclass(frozen=True)
class TemporalAttention:
    """One temporal self-attention module: its name in the model, and the UNet level it is at.

    Level 0 is the finest, at the latents' resolution; each level halves it.
    """

    name: str
    level: int
    module: Attention


def temporal_attentions(model: nn.Module) -> list[TemporalAttention]:
    """The temporal self-attention modules of a ``UNet3DConditionModel``, in the model's order.

    Raises:
        ValueError: The model has none.
    """
    modules = {
        match: module
        for name, module in model.named_modules()
        if (match := TEMPORAL_ATTENTION.fullmatch(name))
    }
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no temporal self-attention that is known here: "
            "no module is named like down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1"
        )
    num_levels = len(list(model.get_submodule("down_blocks").children()))
    return [
        TemporalAttention(match[0], _level(match, num_levels), module)
        for match, module in modules.items()
    ]


def _level(match: re.Match[str], num_levels: int) -> int:
    block = match["block"]
    if block == "mid_block":
        return num_levels - 1
    index = int(match["index"])
    return index if block.startswith("down") else num_levels - 1 - index
