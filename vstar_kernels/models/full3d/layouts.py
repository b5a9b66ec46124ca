"""Layouts as they are read from the arguments of a model's call.

A ``Family`` (``families.py``) names one of these functions. What it returns is held against the
tokens that the layers are called with; what does not fit raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vstar_kernels.attention.frames.layout import Frames, Layout, Text
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.full3d.seats import Reading
from vstar_kernels.models.hooks import Argument


class Call:
    """The arguments of one call of a model.

    Args:
        model: The model.
        args, kwargs: As its forward is called with them.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model: Any = model
        self._args, self._kwargs = args, kwargs

    def __getitem__(self, name: str) -> Any:
        """Returns an argument by its name, None where the call leaves it out."""
        return Argument(self.model, name).get(self._args, self._kwargs)

    @property
    def sample(self) -> Tensor:
        """The latents."""
        found: Tensor = self["hidden_states"]
        return found


def patched_video(call: Call) -> Reading:
    """Reads latents ``(batch, channels, frames, height, width)`` cut into patches: Wan's.

    The number of frames and of patches round down, as a convolution without padding has it.
    """
    return _patched(call, tuple(call.sample.shape[-3:]))


def patched_frames(call: Call) -> Reading:
    """Reads latents ``(batch, frames, channels, height, width)`` cut into patches: CogVideoX's."""
    _, frames, _, height, width = call.sample.shape
    return _patched(call, (frames, height, width))


def _patched(call: Call, size: tuple[int, ...]) -> Reading:
    config = call.model.config
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    frames, height, width = (n // p for n, p in zip(size, patch, strict=True))
    source = f"latents of shape {tuple(call.sample.shape)} in patches of {tuple(patch)}"
    return Reading(Layout(Frames(frames, height * width)), source)


def text_first(video: Callable[[Call], Reading], *names: str) -> Callable[[Call], Reading]:
    """Returns what reads a video with the tokens of the named arguments before it."""

    def read(call: Call) -> Reading:
        reading, text = video(call), _tokens(call, names)
        source = f"{reading.source} after {text} tokens of text"
        return replace(reading, layout=Layout(Text(text), *reading.layout.segments), source=source)

    return read


def text_last(video: Callable[[Call], Reading], *names: str) -> Callable[[Call], Reading]:
    """Returns what reads a video with the tokens of the named arguments after it."""

    def read(call: Call) -> Reading:
        reading, text = video(call), _tokens(call, names)
        source = f"{reading.source} before {text} tokens of text"
        return replace(reading, layout=Layout(*reading.layout.segments, Text(text)), source=source)

    return read


def _tokens(call: Call, names: tuple[str, ...]) -> int:
    """Returns how many tokens the named arguments are, ``(batch, tokens, channels)`` or None."""
    found = (call[name] for name in names)
    return sum(x.shape[1] for x in found if x is not None)


def causal_video(call: Call) -> Reading:
    """Reads what SkyReels-V2 reads: where its frames come in blocks, it hides later blocks."""
    reading = patched_video(call)
    config = call.model.config
    block = config.num_frame_per_block
    if block <= 1:
        return reading
    without = type(config)({**config, "num_frame_per_block": 1})
    return replace(reading, rule=FrameRule.causal(block), masked=True, config=without)
