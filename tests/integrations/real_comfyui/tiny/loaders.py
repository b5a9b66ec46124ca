"""ComfyUI's loader nodes, which take a file of no bytes for a tiny model of its name's kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import nodes

from . import models

KINDS = {"v1-5": "sd15", "svd": "svd", "wan": "wan", "hunyuan": "hunyuan", "ltx": "ltx"}


def kind(name: str) -> str:
    """Returns which of the tiny models a file's name means."""
    for mark, result in KINDS.items():
        if mark in name.lower():
            return result
    raise ValueError(f"no tiny model is called {name!r}: names have one of {', '.join(KINDS)}")


def checkpoint(self: Any, ckpt_name: str) -> tuple[Any, Any, Any]:
    """Stands for CheckpointLoaderSimple's: model, text encoder, autoencoder."""
    return models.diffusion_model(kind(ckpt_name)), models.text_encoder(), models.Autoencoder()


def image_checkpoint(self: Any, ckpt_name: str) -> tuple[Any, Any, Any]:
    """Stands for ImageOnlyCheckpointLoader's: model, image encoder, autoencoder."""
    return models.diffusion_model("svd"), models.ImageEncoder(), models.Autoencoder()


def unet(self: Any, unet_name: str, weight_dtype: str = "default") -> tuple[Any]:
    """Stands for UNETLoader's: the diffusion model alone."""
    return (models.diffusion_model(kind(unet_name)),)


def clip(self: Any, clip_name: str, type: str = "wan", device: str = "default") -> tuple[Any]:
    """Stands for CLIPLoader's: the text encoder."""
    return (models.text_encoder(masks=clip_name.startswith("t5xxl")),)


def vae(self: Any, vae_name: str, **options: Any) -> tuple[Any]:
    """Stands for VAELoader's: the autoencoder, Wan's for a name with ``wan`` in it."""
    video = "wan" in vae_name.lower()
    return (models.Autoencoder(16 if video else 4, video),)


def is_tiny(folder: str, name: str) -> bool:
    """Whether the file stands for a tiny model."""
    path = folder_paths.get_full_path(folder, name)
    return path is not None and Path(path).stat().st_size == 0


def replace(node: str, folder: str, tiny: Callable[..., Any]) -> None:
    """Has a loader node return a tiny model for a file that stands for one."""
    cls = nodes.NODE_CLASS_MAPPINGS[node]
    original = getattr(cls, cls.FUNCTION)

    @wraps(original)
    def load(self: Any, *args: Any, **options: Any) -> Any:
        name = (*args, *options.values())[0]
        return (tiny if is_tiny(folder, name) else original)(self, *args, **options)

    setattr(cls, cls.FUNCTION, load)


def narrow_motion_models() -> None:
    """Has AnimateDiff-Evolved build a motion model as narrow as the tiny UNet.

    It builds every one at 320, 640 and 1280 channels, whatever the file's weights.
    """
    name = next(name for name in sys.modules if name.endswith(".animatediff.motion_module_ad"))
    module = sys.modules[name]
    original = module.MotionModule
    if getattr(original, "narrow", False):
        return

    def narrow(channels: int, **options: Any) -> Any:
        return original(channels * models.CHANNELS // 320, **options)

    narrow.narrow = True
    module.MotionModule = narrow


def replace_loaders() -> None:
    """Has all the loaders of the example workflows return tiny models for files of no bytes."""
    replace("CheckpointLoaderSimple", "checkpoints", checkpoint)
    replace("ImageOnlyCheckpointLoader", "checkpoints", image_checkpoint)
    replace("UNETLoader", "diffusion_models", unet)
    replace("CLIPLoader", "text_encoders", clip)
    replace("VAELoader", "vae", vae)

    original = comfy.utils.load_torch_file

    @wraps(original)
    def load_torch_file(ckpt: str, *args: Any, **options: Any) -> Any:
        if Path(ckpt).stat().st_size:
            return original(ckpt, *args, **options)
        narrow_motion_models()
        return models.motion_model()

    comfy.utils.load_torch_file = load_torch_file
