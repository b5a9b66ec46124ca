"""Tiny random models in ComfyUI's own classes: of images, of videos, and their parts.

ComfyUI finds out what a checkpoint is by its widths (a UNet's first has 320 channels), so tiny
models cannot be files. They are made of the class that it would have found, with a small
configuration.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as supported
import torch
from torch import Tensor

CHANNELS = 32  # of a UNet's first level; real ones have 320. Group norms need multiples of 32.
WIDTH = 64  # of texts
CPU = torch.device("cpu")
UNET = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "out_channels": 4,
    "model_channels": CHANNELS,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": WIDTH,
}
SD15 = UNET | {"in_channels": 4, "adm_in_channels": None, "use_temporal_attention": False}
SVD = UNET | {
    "in_channels": 8,
    "adm_in_channels": 768,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "use_spatial_context": True,
    "extra_ff_mix_layer": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
    "max_ddpm_temb_period": 10000,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "num_heads": 2,
    "ffn_dim": 128,
    "num_layers": 2,
    "text_dim": WIDTH,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "depth": 1,
    "depth_single_blocks": 1,
    "context_in_dim": WIDTH,
    "vec_in_dim": WIDTH,
    "mlp_ratio": 2.0,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
LTX = {
    "image_model": "ltxv",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": WIDTH,
    "caption_channels": WIDTH,
    "num_layers": 2,
}
MODELS = {
    "sd15": (supported.SD15, SD15),
    "svd": (supported.SVD_img2vid, SVD),
    "wan": (supported.WAN21_T2V, WAN),
    "hunyuan": (supported.HunyuanVideo, HUNYUAN),
    "ltx": (supported.LTXV, LTX),
}


def fill(module: torch.nn.Module, seed: int) -> None:
    """Draws a module's weights, of a size that keeps its signals near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            else:
                weight.copy_(0.1 * noise + name.endswith("weight"))


def diffusion_model(kind: str) -> comfy.model_patcher.ModelPatcher:
    """Returns a MODEL of a kind of :data:`MODELS`."""
    cls, options = MODELS[kind]
    config = cls(options)
    if kind == "svd":
        config.unet_config["num_head_channels"] = 16
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=CPU)
    fill(model.diffusion_model, seed=1)
    return comfy.model_patcher.CoreModelPatcher(model, load_device=CPU, offload_device=CPU)


def text_encoder(masks: bool = False) -> comfy.sd.CLIP:
    """Returns a CLIP with CLIP's own tokenizer and two layers, and masks if LTX is to have them."""
    small = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    target = SimpleNamespace(
        clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer, params={}
    )
    options = {"clip_l_model_config": small, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, model_options=options)
    fill(clip.cond_stage_model, seed=2)
    clip.cond_stage_model.clip_l.return_attention_masks = masks
    return clip


class ImageEncoder:
    """A CLIP_VISION: an image's mean colours in place of what a network sees in it."""

    def encode_image(self, image: Tensor, crop: bool | str = True) -> SimpleNamespace:
        """Returns an embedding of each image, ``(images, WIDTH)``."""
        means = torch.nn.functional.adaptive_avg_pool2d(image[..., :3].movedim(-1, 1), (5, 5))
        embedding = means.flatten(1)[:, :WIDTH] - 0.5
        return SimpleNamespace(image_embeds=embedding, last_hidden_state=embedding.unsqueeze(1))


class Autoencoder:
    """A VAE whose latents are a picture's brightness at an eighth of its size."""

    def __init__(self, channels: int = 4, video: bool = False) -> None:
        self.latent_channels, self.video = channels, video

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns the latents of images ``(images, height, width, 3)``."""
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8) * 2 - 1
        return small.mean(1, keepdim=True).expand(-1, self.latent_channels, -1, -1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images ``(images, height, width, 3)``; Wan's frames but the first four times."""
        if self.video:
            frames = latents[:, :3].movedim(2, 1).flatten(0, 1)
            first, later = frames[:1], frames[1:].repeat_interleave(4, 0)
            latents = torch.cat([first, later])
        colours = torch.sigmoid(latents[:, :3] / latents.std())
        larger = torch.nn.functional.interpolate(colours, scale_factor=8, mode="bilinear")
        return larger.movedim(1, -1)

    def spacial_compression_encode(self) -> int:
        return 8

    def spacial_compression_decode(self) -> int:
        return 8


def motion_model(frames: int = 32) -> dict[str, Tensor]:
    """Returns the weights of an AnimateDiff v3 motion model, at a tenth of its widths."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    def norm(width: int) -> dict[str, Tensor]:
        return {"weight": torch.ones(width), "bias": torch.zeros(width)}

    def linear(out: int, width: int) -> dict[str, Tensor]:
        return {"weight": draw(out, width), "bias": torch.zeros(out)}

    state: dict[str, Tensor] = {}
    levels = [CHANNELS * factor for factor in UNET["channel_mult"]]
    sides = (("down_blocks", levels, 2), ("up_blocks", levels[::-1], 3))
    for side, widths, modules in sides:
        for block, width in enumerate(widths):
            for module in range(modules):
                root = f"{side}.{block}.motion_modules.{module}.temporal_transformer"
                layer = f"{root}.transformer_blocks.0"
                parts = {
                    f"{root}.norm": norm(width),
                    f"{root}.proj_in": linear(width, width),
                    f"{root}.proj_out": linear(width, width),
                    f"{layer}.ff_norm": norm(width),
                    f"{layer}.ff.net.0.proj": linear(8 * width, width),
                    f"{layer}.ff.net.2": linear(width, 4 * width),
                }
                for number in (0, 1):
                    attention = f"{layer}.attention_blocks.{number}"
                    parts[f"{layer}.norms.{number}"] = norm(width)
                    parts[f"{attention}.to_out.0"] = linear(width, width)
                    parts[f"{attention}.pos_encoder"] = {"pe": draw(1, frames, width)}
                    for name in ("to_q", "to_k", "to_v"):
                        parts[f"{attention}.{name}"] = {"weight": draw(width, width)}
                for name, weights in parts.items():
                    state |= {f"{name}.{key}": weight for key, weight in weights.items()}
    return state
