"""From the embeddings of a few stages to one for each frame."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from vstar_kernels.methods.vstar.synopsis import check_anchors

Interpolation = Literal["linear", "slerp", "hold"]
Rounding = Literal["down", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("down", "nearest")
SHAPES = "(stages, tokens, channels) or (batch, stages, tokens, channels)"
# How close the cosine of an angle is to ±1 where slerp's weights, quotients of sines, have lost
# half of float32's digits: between nearly equal vectors the chord is the arc to within that, and
# opposite ones have no arc of their own.
PARALLEL = 1e-6


def interpolate_embeddings(
    stage_embeddings: Tensor,
    num_frames: int,
    anchors: Sequence[int] | None = None,
    mode: Interpolation = "linear",
    rounding: Rounding = "down",
    every: int = 1,
) -> Tensor:
    """Returns one embedding for each frame, between those of the stages (VSTAR, §3.4).

    A stage's anchor frame has exactly its embedding. Frames before the first anchor have the first
    stage's, frames after the last one the last stage's.

    Without ``anchors``, they are spaced evenly from the first frame to the last and rounded down to
    frames, as the official code truncates them: 3 stages over 16 frames are at 0, 7 and 15. Where
    there are more stages than frames, they cannot all have a frame: anchors stay between frames,
    each frame is interpolated between its two neighbours, and only the first and the last stage are
    met exactly (of a single frame, only the first).

    Args:
        stage_embeddings: ``(stages, tokens, channels)`` or ``(batch, stages, tokens, channels)``,
            of any floating-point type; 77 tokens from a CLIP text encoder.
        num_frames: N, at least 1.
        anchors: A frame for each stage, increasing, below ``num_frames``.
        mode: ``"linear"``, as in the paper; ``"slerp"``, along the arc between two tokens'
            embeddings, and linear where they are parallel, opposite or 0; or ``"hold"``, each stage
            from its anchor until the next one's.
        rounding: How evenly spaced anchors become frames: ``"down"``, as in the official code, or
            ``"nearest"``, halves up, where 3 stages over 16 frames are at 0, 8 and 15. The
            official code's floating-point numbers sometimes end just below a whole frame and then
            give the frame before; here anchors are exact.
        every: Return frames 0, ``every``, 2 · ``every``, … alone: the latent frames of a model that
            makes one of so many, of Wan 4.

    Returns:
        ``(num_frames, tokens, channels)`` or ``(batch, num_frames, tokens, channels)``, of the same
        type and device, differentiable. 16-bit types are interpolated in float32.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or out of its range.
    """
    _check(stage_embeddings, num_frames, mode, every)
    check_rounding(rounding)
    num_stages = stage_embeddings.shape[-3]
    if anchors is not None:
        check_anchors(anchors, num_stages)
        if anchors[-1] >= num_frames:
            raise ValueError(f"anchors must be below num_frames, {num_frames}, got {list(anchors)}")
    if anchors is None:
        places = _even(num_stages, num_frames, rounding)
    else:
        places = list(map(Fraction, anchors))
    lower, upper, weight = _neighbours(places, range(0, num_frames, every))
    if mode == "hold":
        return stage_embeddings[..., lower, :, :]
    wide = torch.promote_types(stage_embeddings.dtype, torch.float32)
    stages = stage_embeddings.to(wide)
    weights = torch.tensor(weight, dtype=wide, device=stages.device)[:, None, None]
    frames = BLENDS[mode](stages[..., lower, :, :], stages[..., upper, :, :], weights)
    return frames.to(stage_embeddings.dtype)


def _even(num_stages: int, num_frames: int, rounding: Rounding) -> list[Fraction]:
    """Spaces anchors evenly from the first frame to the last, on frames where there are enough."""
    if num_stages == 1:
        return [Fraction(0)]
    spacing = Fraction(num_frames - 1, num_stages - 1)
    places = [stage * spacing for stage in range(num_stages)]
    if num_stages > num_frames:
        return places
    half = Fraction(1, 2) if rounding == "nearest" else 0
    return [Fraction(math.floor(place + half)) for place in places]


def _neighbours(
    places: Sequence[Fraction], frames: Sequence[int]
) -> tuple[list[int], list[int], list[float]]:
    """Returns the stages before (or at) and after each frame, and the weight of the later one."""
    lower, upper, weight = [], [], []
    for frame in frames:
        after = bisect_right(places, frame)
        # Of stages in the same place (a single frame) the first.
        before = places.index(places[after - 1]) if after else 0
        after = min(after, len(places) - 1)
        span = places[after] - places[before]
        inside = places[before] < frame < places[after]
        lower.append(before)
        upper.append(after if inside else before)
        weight.append(float((frame - places[before]) / span) if inside else 0.0)
    return lower, upper, weight


def _slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Interpolates spherically between vectors along the last dimension (Shoemake 1985)."""
    norms = start.norm(dim=-1, keepdim=True) * end.norm(dim=-1, keepdim=True)
    nonzero = norms > 0
    # Both branches of a `where` have gradients: what divides by zero must not be in either.
    cosine = (start * end).sum(-1, keepdim=True) / torch.where(nonzero, norms, 1)
    has_arc = nonzero & (cosine.abs() < 1 - PARALLEL)
    angle = torch.where(has_arc, cosine, 0).acos()
    start_weight = torch.sin((1 - weight) * angle) / angle.sin()
    end_weight = torch.sin(weight * angle) / angle.sin()
    arc = start_weight * start + end_weight * end
    return torch.where(has_arc, arc, torch.lerp(start, end, weight))


BLENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": torch.lerp,
    "slerp": _slerp,
}
MODES = (*BLENDS, "hold")


def check_rounding(rounding: Any) -> None:
    """Raises unless it is the name of a way to round anchors to frames.

    Raises:
        ValueError: It is not.
    """
    if rounding not in ROUNDINGS:
        allowed = " or ".join(map(repr, ROUNDINGS))
        raise ValueError(f"rounding must be {allowed}, got {rounding!r}")


def _check(stage_embeddings: Tensor, num_frames: int, mode: str, every: int) -> None:
    if not isinstance(stage_embeddings, Tensor):
        raise TypeError(
            f"stage_embeddings must be a torch.Tensor, got {type(stage_embeddings).__name__}"
        )
    shape = tuple(stage_embeddings.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"stage_embeddings must be {SHAPES}, none of them 0, got {shape}")
    if not stage_embeddings.is_floating_point():
        raise ValueError(
            f"stage_embeddings must be of a floating-point type, got {stage_embeddings.dtype}"
        )
    if isinstance(num_frames, bool) or not isinstance(num_frames, int):
        raise TypeError(f"num_frames must be an integer, got {type(num_frames).__name__}")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
