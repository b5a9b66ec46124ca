"""The oracle in float64, put into layers by hand: what ``apply_tar`` is compared with.

It shares nothing with the package but :func:`vstar_kernels.testing.eager`; Δ is its own too.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import Tensor, nn

import vstar_kernels as vk
from vstar_kernels import testing


def gaussian(sigma: float, frames: int) -> Tensor:
    return torch.tensor(
        [
            [math.exp(-((j - i) ** 2) / (2 * sigma**2)) for j in range(frames)]
            for i in range(frames)
        ],
        dtype=torch.float64,
    )


def attention(attn: Any, x: Tensor, delta: Tensor, strength: float) -> Tensor:
    """Attention over the frames of ``(rows, frames, channels)``, projections included."""
    query, key, value = (
        project(x).double().unflatten(-1, (attn.heads, -1))
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    if hasattr(attn, "time_rel_pos_bias"):
        weights = lavie_weights(attn, query, key, strength * delta)
        out = (weights @ value.transpose(1, 2)).transpose(1, 2)
    else:
        out = testing.eager(query, key, value, vk.DenseBias(delta, strength=strength))
    out = out.flatten(-2).to(x.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out


def lavie_weights(attn: Any, query: Tensor, key: Tensor, delta: Tensor | float) -> Tensor:
    """A′ with LaVie's positions in the logits, of ``(rows, frames, heads, head_dim)`` tensors."""
    rotate = attn.rotary_emb.rotate_queries_or_keys
    query, key = (rotate(x.transpose(1, 2)).double() for x in (query, key))
    logits = attn.scale * query @ key.mT
    logits += attn.time_rel_pos_bias(query.shape[-2], device=query.device)
    return (logits + logits.max(dim=-1, keepdim=True).values * delta).softmax(-1)


class EagerProcessor:
    def __init__(self, sigma: float, strength: float) -> None:
        self.sigma, self.strength = sigma, strength

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        delta = gaussian(self.sigma, hidden_states.shape[1])
        return attention(attn, hidden_states, delta, self.strength)


def put_in(model: nn.Module, names: list[str], sigma: float, strength: float = 1.0) -> None:
    """Into the modules of these names."""
    processor = EagerProcessor(sigma, strength)
    for name in names:
        module = model.get_submodule(name)
        if hasattr(module, "set_processor"):
            module.set_processor(processor)
        else:
            module.forward = types.MethodType(
                lambda self, x, *args, **options: processor(self, x), module
            )
