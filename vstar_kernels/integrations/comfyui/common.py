"""What the nodes share: their category, their own types of sockets, and models with wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def wrapped(model: Any, key: str, wrapper: Any, begin: Any = None) -> Any:
    """Returns a clone of a model with one wrapper of its diffusion model of this key.

    With ``begin``, there is one wrapper of this key of each run of a sampler, too.
    """
    model = model.clone()
    kinds = [(WrappersMP.DIFFUSION_MODEL, wrapper)]
    kinds += [] if begin is None else [(WrappersMP.OUTER_SAMPLE, begin)]
    for kind, added in kinds:
        model.remove_wrappers_with_key(kind, key)
        model.add_wrapper_with_key(kind, key, added)
    return model


def share_input(name: str, default: float, tooltip: str) -> Any:
    """Returns an input that is a share of the sampler's steps."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def steps_until(start: float, end: float, otherwise: str) -> float | None:
    """Returns the share of the sampler's steps after which there are none; None for all.

    Args:
        start, end: The shares at which they begin and end.
        otherwise: What it would come to if they did not, for the error.

    Raises:
        ValueError: There would be no step.
    """
    if not start < end:
        raise ValueError(f"start, {start:g}, must be before end, {end:g}: as it is, {otherwise}")
    return None if end >= 1 else end


def strength_input(tooltip: str) -> Any:
    """Returns the input that is a factor on the regularization."""
    return io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, tooltip=tooltip)


def backend_input(backends: Iterable[str]) -> Any:
    """Returns the input that chooses what computes attention."""
    return io.Combo.Input(
        "backend",
        options=[AUTO, *backends],
        default=AUTO,
        tooltip="What computes the attention; auto is the fastest that can.",
        advanced=True,
    )


def backend_of(choice: str) -> str | None:
    """Returns what was chosen as the library takes it."""
    return None if choice == AUTO else choice


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
