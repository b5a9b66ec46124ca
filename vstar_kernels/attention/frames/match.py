"""The frame profile of a map, and the bias that gives one clip's profile to another.

A model that is asked for more frames than it was trained on spreads each row's attention over more
of them. What it paid to a frame at each distance when it was at its trained length is its profile;
a bias of the distance alone, which ``frame_attention`` adds for free, restores it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import check_number

Beyond = Literal["clip", "hold", "mask"]
ROUNDS = 100  # of what changes ever less: F × F numbers
_TINY = torch.finfo(torch.float64).tiny
SHAPES = "(F, F), (batch, F, F) or (batch, heads, F, F), with a column more for text"


def frame_profile(frame_map: Tensor) -> Tensor:
    """Returns a map's profile: the mean attention that a frame pays to one at each distance.

    Args:
        frame_map: ``(…, F, F)``, or ``(…, F, F + 1)`` with text in the last column, which has no
            distance.

    Returns:
        ``(…, F)`` in float64: at |df| = 0, 1, …, F − 1, the mean over the pairs of frames.

    Raises:
        TypeError, ValueError: It is not such a map.
    """
    between, _ = split_text(frame_map, "frame_map")
    frames = between.shape[-1]
    frame = torch.arange(frames, device=between.device)
    distance = (frame[:, None] - frame).abs().flatten()
    total = between.new_zeros(*between.shape[:-2], frames)
    total = total.index_add(-1, distance, between.flatten(-2))
    return total / torch.bincount(distance)


def split_text(frame_map: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns a map's columns of frames, ``(…, F, F)``, and of text, ``(…, F)``, in float64.

    Raises:
        TypeError, ValueError: It is not a map between frames.
    """
    if not isinstance(frame_map, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(frame_map).__name__}")
    shape = tuple(frame_map.shape)
    if len(shape) < 2 or not shape[-2] or shape[-1] - shape[-2] not in (0, 1):
        raise ValueError(
            f"{name} must be (…, F, F), or (…, F, F + 1) with text in the last column, got {shape}"
        )
    wide = frame_map.double()
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise ValueError(f"{name} must hold shares of attention: finite, and at least 0")
    between = wide[..., : shape[-2]]
    has_text = shape[-1] > shape[-2]
    return between, wide[..., -1] if has_text else between.new_zeros(shape[:-1])


def matching_table(native: Tensor, long: Tensor, *, clip: float, beyond: Beyond) -> Tensor:
    """Returns the table of :meth:`FrameRule.match`, ``(F, F)`` or ``(heads, F, F)``, float64.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or they do not fit each other.
    """
    check_number(clip, "clip", least=0)
    if beyond not in get_args(Beyond):
        allowed = ", ".join(map(repr, get_args(Beyond)))
        raise ValueError(f"beyond must be one of {allowed}, got {beyond!r}")
    wanted, wanted_text = _mean(native, "native_map")
    found, found_text = _mean(long, "long_map")
    if wanted.shape[:-2] != found.shape[:-2]:
        raise ValueError(
            "native_map and long_map must be of the same heads and dimensions, got "
            f"{tuple(native.shape)} and {tuple(long.shape)}"
        )
    trained, frames = wanted.shape[-1], found.shape[-1]
    frame = torch.arange(frames, device="cpu")
    distance = (frame[:, None] - frame).abs()

    profile = frame_profile(wanted)
    target = profile[..., distance.clamp(max=trained - 1)]
    if beyond != "hold":
        target = target.masked_fill(distance >= trained, 0.0)
    wanted_text = torch.where(found_text.mean(-1) > 0, wanted_text.mean(-1), 0.0)
    text = wanted_text[..., None, None]
    target = target * ((1 - text) / target.sum(-1, keepdim=True))

    bias = torch.zeros_like(frame_profile(target))
    hidden = (distance >= trained) & (beyond == "mask")
    for _ in range(ROUNDS):
        # The rows of the long map were softmax of its logits: this is what they are with the bias.
        weighed = (found * bias[..., distance].exp()).masked_fill(hidden, 0.0)
        # Text is never weighed: where all frames get their shares, it has its own.
        total = (weighed.sum(-1) + found_text)[..., None]
        correction = _quotient(frame_profile(target), frame_profile(weighed / total))
        bias = (bias + correction).clamp(-clip, clip)
    return bias[..., distance].masked_fill(hidden, -math.inf)


def _quotient(one: Tensor, other: Tensor) -> Tensor:
    """Returns log(one / other), and 0 where nobody sees what is to be weighed.

    A target of 0 is −∞, which is clipped; under a mask a profile is 0, and stays so.
    """
    return torch.where(other > 0, one.log() - other.clamp(min=_TINY).log(), 0.0)


def _mean(frame_map: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns the means over the batch: ``([heads,] F, F)`` of frames, ``([heads,] F)`` of text."""
    between, text = split_text(frame_map, name)
    if between.ndim > 4:
        raise ValueError(f"{name} must be {SHAPES}, got {tuple(frame_map.shape)}")
    if between.ndim > 2:
        between, text = between.mean(0), text.mean(0)
    if not bool((between.sum(-1) > 0).all()):
        raise ValueError(f"{name} must have a row for each frame, got one that attends to nothing")
    return between.cpu(), text.cpu()
