"""Tiny image UNets with random weights, of the kinds that ``apply_grid`` treats."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.models import noise

TEXT = 24
COMMON = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,  # heads, as Stable Diffusion 1.5 has it
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
KINDS: dict[str, dict[str, Any]] = {
    "SD 1.5": COMMON,
    "SD 2.1": COMMON | {"use_linear_projection": True, "upcast_attention": True},
    "SDXL": COMMON
    | {
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 4 * 6 + 8,
    },
}
LAYERS = {"SD 1.5": 7, "SD 2.1": 7, "SDXL": 8}
LEVELS = {"SD 1.5": {0, 1}, "SD 2.1": {0, 1}, "SDXL": {1}}


@functools.cache
def _made(kind: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**KINDS[kind]).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "attn1.to_q." in name or "attn1.to_k." in name:
            parameter *= 3  # large logits, so that TAR does much
    return model


def make(kind: str = "SD 1.5") -> nn.Module:
    """A model of its own, always with the same weights."""
    return copy.deepcopy(_made(kind))


def call(
    model: nn.Module,
    *,
    batch: int = 1,
    size: tuple[int, int] = (8, 8),
    timestep: Any = 10,
    sample: Tensor | None = None,
) -> Tensor:
    """What the model makes of latents that depend on the sizes only."""
    sample = noise(batch, 4, *size) if sample is None else sample
    text = noise(len(sample), 3, TEXT, seed=1)
    ids = {"text_embeds": noise(len(sample), 8, seed=2), "time_ids": torch.ones(len(sample), 6)}
    return model(sample, timestep, text, added_cond_kwargs=ids).sample
