"""Cross-attention to the texts of stages: the processor, and what it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import Layout, Text
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.models.full3d.processors import FrameProcessor
from vstar_kernels.models.full3d.seats import FrameChange


class Group(NamedTuple):
    """Sequences of a batch whose texts have the same tokens.

    Attributes:
        rows: Which they are; None: all.
        keys: Which tokens of the context exist; None: all.
        layout: The stage of each of them.
    """

    rows: Tensor | None
    keys: Tensor | None
    layout: Layout


@dataclass(frozen=True, eq=False)
class PromptChange(FrameChange):
    """What is done to cross-attention in one forward pass.

    Attributes:
        tokens: How many tokens of text, the last ones, the context has.
        groups: The sequences.
    """

    tokens: int
    groups: tuple[Group, ...]


class PromptProcessor(FrameProcessor):
    """Cross-attention to the texts of stages, by the layer's own projections and norms."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
        temb: Any = None,
    ) -> Tensor:
        """Returns what the layer adds to the video's tokens ``(batch, tokens, channels)``."""
        seat = self.seat
        change = None if seat is None else seat.change()
        if seat is None or change is None:
            more = {"rotary_emb": rotary_emb, "image_rotary_emb": image_rotary_emb, "temb": temb}
            more = {name: value for name, value in more.items() if value is not None}
            stock: Tensor = self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, **more
            )
            return stock
        assert isinstance(change, PromptChange)
        context = encoder_hidden_states
        if not isinstance(context, Tensor) or context.shape[1] < change.tokens:
            raise ValueError(
                f"{seat.layer.name} was called with another context than the stages' texts"
            )
        if getattr(attn, "norm_cross", None):
            context = attn.norm_encoder_hidden_states(context)
        image, text = context.tensor_split([context.shape[1] - change.tokens], dim=1)
        query = _normed(attn.norm_q, attn.to_q(hidden_states), attn.heads)
        key, value = _keys(attn, text)
        out = torch.cat([_attend(query, key, value, change, group) for group in change.groups])
        rows = [group.rows for group in change.groups if group.rows is not None]
        if rows:  # of several groups: back to the batch's order
            out = out[torch.cat(rows).argsort().to(out.device)]
        if image.shape[1]:  # Wan's, whose keys have projections of their own
            key, value = _image_keys(attn, image)
            images = Layout(Text(image.shape[1]))
            out = out + frame_attention(query, key, value, change.reading.layout, key_layout=images)
        out = out.flatten(2, 3).to(hidden_states.dtype)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, change: PromptChange, group: Group
) -> Tensor:
    """Returns the attention of one group, ``(rows, tokens, heads, head_dim)``."""
    rows, keys = (None if x is None else x.to(query.device) for x in group[:2])
    if rows is not None:
        query, key, value = query[rows], key[rows], value[rows]
    if keys is not None:
        key, value = key[:, keys], value[:, keys]
    return frame_attention(
        query, key, value, change.reading.layout, change.rule, key_layout=group.layout
    )


def _keys(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a text's keys and values, ``(batch, tokens, heads, head_dim)``."""
    if getattr(attn, "fused_projections", False):
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(text), attn.to_v(text)
    return _normed(attn.norm_k, key, attn.heads), value.unflatten(-1, (attn.heads, -1))


def _image_keys(attn: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an image's keys and values, as :func:`_keys` does."""
    if not hasattr(attn, "add_k_proj"):
        raise ValueError(
            f"this {type(attn).__name__} has one projection for image and text: frame prompts "
            "cannot tell the text from encoder_hidden_states_image, which must be left out"
        )
    if attn.fused_projections:
        key, value = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(image), attn.add_v_proj(image)
    return _normed(attn.norm_added_k, key, attn.heads), value.unflatten(-1, (attn.heads, -1))


def _normed(norm: Any, projected: Tensor, heads: int) -> Tensor:
    """Returns ``(batch, tokens, heads, head_dim)``, normed over all heads or over each."""
    if norm is None:
        return projected.unflatten(-1, (heads, -1))
    size = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim
    if math.prod(size) == projected.shape[-1]:
        normed: Tensor = norm(projected).unflatten(-1, (heads, -1))
    else:
        normed = norm(projected.unflatten(-1, (heads, -1)))
    return normed
