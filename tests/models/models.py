"""Small models with random weights of every kind that ``apply_tar`` treats, and their inputs."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import lavie_model
from tests.models.lvdm_model import UNetModel

TOKENS, TEXT = 3, 24


@dataclass(frozen=True)
class Kind:
    """A model: how to make it, and what to call it with."""

    make: Callable[..., nn.Module]
    inputs: Callable[[Tensor], dict[str, Any]]  # of a (batch, 4, frames, height, width) sample
    layers: int  # with temporal attention, the init block's among them
    levels: int = 2


def diffusers_model(name: str, **settings: Any) -> Callable[..., nn.Module]:
    def make(**changes: Any) -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**settings | changes)

    return make


UNET3D = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
}
MOTION = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 16,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
SPARSE = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 16,
    "conditioning_embedding_out_channels": (4, 4),
}
SVD = {
    "in_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4),
    "cross_attention_dim": TEXT,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}
LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": TEXT,
    "cross_attention_dim": 16,
    "attention_bias": True,
    "video_length": 6,
}


def text(sample: Tensor, rows: int | None = None) -> Tensor:
    return noise(rows or len(sample), TOKENS, TEXT, seed=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _text_inputs(sample: Tensor) -> dict[str, Any]:
    return {"sample": sample, "encoder_hidden_states": text(sample)}


def _motion_inputs(sample: Tensor) -> dict[str, Any]:
    rows = len(sample) * sample.shape[2]
    return {"sample": sample, "encoder_hidden_states": text(sample, rows)}


def _sparse_inputs(sample: Tensor) -> dict[str, Any]:
    condition = noise(len(sample), 4, *sample.shape[2:], seed=2)
    mask = torch.ones(len(sample), 1, *sample.shape[2:])
    return {**_motion_inputs(sample), "controlnet_cond": condition, "conditioning_mask": mask}


def _i2vgen_inputs(sample: Tensor) -> dict[str, Any]:
    return {
        **_text_inputs(sample),
        "fps": torch.full((len(sample),), 8),
        "image_latents": noise(*sample.shape, seed=2),
        "image_embeddings": noise(len(sample), TEXT, seed=3),
    }


def _svd_inputs(sample: Tensor) -> dict[str, Any]:
    return {
        "sample": sample.transpose(1, 2),
        "encoder_hidden_states": noise(len(sample), 1, TEXT, seed=1),
        "added_time_ids": torch.ones(len(sample), 3),
    }


def _latte_inputs(sample: Tensor) -> dict[str, Any]:
    return {"hidden_states": sample, "encoder_hidden_states": text(sample)}


def _lvdm_inputs(sample: Tensor) -> dict[str, Any]:
    return {"x": sample, "context": text(sample)}


KINDS = {
    "UNet3DConditionModel": Kind(
        diffusers_model("UNet3DConditionModel", **UNET3D), _text_inputs, 2 + 2 * 7
    ),
    "I2VGenXLUNet": Kind(
        diffusers_model("I2VGenXLUNet", **UNET3D),
        _i2vgen_inputs,
        2 + 2 * 7,
    ),
    "UNetMotionModel": Kind(diffusers_model("UNetMotionModel", **MOTION), _motion_inputs, 2 * 7),
    "SparseControlNetModel": Kind(
        diffusers_model("SparseControlNetModel", **SPARSE), _sparse_inputs, 2
    ),
    "UNetSpatioTemporalConditionModel": Kind(
        diffusers_model("UNetSpatioTemporalConditionModel", **SVD), _svd_inputs, 4
    ),
    "LatteTransformer3DModel": Kind(
        diffusers_model("LatteTransformer3DModel", **LATTE), _latte_inputs, 2, levels=1
    ),
    "lvdm": Kind(UNetModel, _lvdm_inputs, 2 + 2 * 7),
    "LaVie": Kind(lavie_model.UNet3DConditionModel, _text_inputs, 7),
}


class _Pickler(pickle.Pickler):
    """Leaves tensors out of what it writes, and notes them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, x: Any) -> int | None:
        if not isinstance(x, Tensor):
            return None
        self.tensors[id(x)] = x
        return id(x)


class _Unpickler(pickle.Unpickler):
    """Puts copies of the tensors where they were."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.copies = {key: copy.deepcopy(x) for key, x in tensors.items()}

    def persistent_load(self, key: int) -> Tensor:
        return self.copies[key]


@functools.cache
def _pickled(name: str) -> tuple[bytes, dict[int, Tensor]]:
    """What :func:`make` copies: ten times as fast as ``copy.deepcopy``, which is Python."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(_made(name))
    return file.getvalue(), pickler.tensors


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[name].make().eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        # Large logits, so that TAR does much; and no layers that start as zero.
        if ".to_q." in parameter_name or ".to_k." in parameter_name:
            parameter *= 3
        if not parameter.any():
            parameter += 0.1 * noise(*parameter.shape)
    return model


def make(name: str) -> nn.Module:
    """A model of its own, always with the same weights."""
    pickled, tensors = _pickled(name)
    return _Unpickler(io.BytesIO(pickled), tensors).load()


def make_one_block() -> nn.Module:
    """A Latte of one spatial and one temporal block, which torch.compile traces soonest."""
    model = make("LatteTransformer3DModel")
    del model.transformer_blocks[1:], model.temporal_transformer_blocks[1:]
    return model


def call(
    model: nn.Module, name: str, *, batch=1, frames=6, size=(8, 8), timestep=10, **more: Any
) -> Tensor:
    """What the model makes of a sample that depends on the sizes only, flattened."""
    inputs = KINDS[name].inputs(noise(batch, 4, frames, *size))
    timestep = torch.as_tensor(timestep).expand(batch)  # as Latte wants it
    out = model(**inputs, **{"timesteps" if name == "lvdm" else "timestep": timestep}, **more)
    return flat(out)


def flat(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out.flatten()
    if isinstance(out, SimpleNamespace):  # of a model without diffusers
        out = vars(out)
    values = out.values() if isinstance(out, dict) else out
    return torch.cat([flat(value) for value in values])
