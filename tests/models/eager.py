"""TAR in float64 and plain PyTorch, put into layers by hand: what ``apply_tar`` is compared with.

It shares nothing with the package.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import Tensor, nn


def gaussian(sigma: float, frames: int) -> Tensor:
    return torch.tensor(
        [
            [math.exp(-((j - i) ** 2) / (2 * sigma**2)) for j in range(frames)]
            for i in range(frames)
        ],
        dtype=torch.float64,
    )


def attention(attn: Any, x: Tensor, delta: Tensor | None, strength: float) -> Tensor:
    """``(rows, frames, channels)``, projections included."""
    q, k, v = (
        torch.stack(project(x).double().chunk(attn.heads, dim=-1), dim=1)
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    logits = torch.einsum("rhic,rhjc->rhij", q, k) / math.sqrt(q.shape[-1])
    if delta is not None:
        logits = logits + strength * logits.max(-1, keepdim=True).values * delta
    out = torch.cat(list((torch.softmax(logits, -1) @ v).unbind(1)), dim=-1).to(x.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out


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
                lambda self, x, context=None, mask=None, time_index=None: processor(self, x), module
            )
