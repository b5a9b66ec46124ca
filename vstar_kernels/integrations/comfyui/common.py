"""What the nodes share: their category, their own types of sockets, and models with wrappers."""

from __future__ import annotations

import re
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from vstar_kernels.analysis import DreamSimEmbedder

CATEGORY = "video/VSTAR"
AUTO = "auto"
DREAMSIM = "dreamsim"

Config = io.Custom("VSTAR_CONFIG")
Bias = io.Custom("VSTAR_BIAS")
Maps = io.Custom("VSTAR_MAPS")


def wrapped(model: Any, key: str, wrapper: Any) -> Any:
    """Returns a clone of a model with one wrapper of its diffusion model of this key."""
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    return model


def embedder_input() -> Any:
    """Returns the input that chooses what compares frames."""
    return io.Combo.Input(
        "embedder",
        options=["pixels", "ssim", DREAMSIM],
        default="pixels",
        tooltip=(
            "What compares two frames: their pixels, structural similarity, or DreamSim as in the "
            "paper (pip install dreamsim; it downloads its weights once)."
        ),
    )


def embedder_of(name: str) -> Any:
    """Returns what compares frames, as :func:`vstar_kernels.analysis.frame_similarity` takes it."""
    return DreamSimEmbedder() if name == DREAMSIM else name


def as_video(images: Tensor) -> Tensor:
    """Returns images ``(frames, height, width, channels)`` of ComfyUI as this package has them."""
    return images[..., :3].movedim(-1, 1).float().clamp(0, 1)


def read_indices(name: str, text: str) -> list[int] | None:
    """Returns the numbers in a text such as "0, 13" or "0-9"; None of an empty one.

    Args:
        name: The input's name, for errors.
        text: The text.

    Raises:
        ValueError: They are none.
    """
    found: list[int] = []
    for word in re.sub(r"\s*-\s*", "-", text).replace(",", " ").split():
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", word)
        if match is None:
            raise ValueError(
                f"{name} must be numbers from 0, such as '0, 13' or '0-9', got {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{name} must name ranges from below, got {word!r} in {text!r}")
        found += range(first, last + 1)
    return found or None
