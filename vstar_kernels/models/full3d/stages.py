"""Texts of stages side by side: which tokens are whose, and which frames a stage is for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vstar_kernels.attention.frames.layout import Frames, Layout, Text


def stage_layout(tokens: Sequence[int], times: Sequence[float], shared: int = 0) -> Layout:
    """Returns the layout of the texts of stages, one after the other.

    Each is a "frame" of the keys of cross-attention, so that a rule says which frame of the video
    hears which.

    Args:
        tokens: The number of each stage's tokens.
        times: The coordinate of each stage.
        shared: The number of tokens before them that no rule changes.
    """
    stages = (Frames(1, n, first=time) for n, time in zip(tokens, times, strict=True))
    return Layout(Text(shared), *stages)


def stage_segments(
    stages: int, frames: int, anchors: Sequence[int] | None, every: int
) -> list[tuple[int, int]]:
    """Returns the first and the last latent frame of each stage: together, all of the video.

    A stage lasts from its anchor until the next one's, as those of ``mode="hold"`` of
    :func:`interpolate_embeddings`; frames before the first anchor are the first stage's.

    Args:
        stages: How many there are.
        frames: How many latent frames the video has.
        anchors: The frame of the video, not the latent one, at which each begins, increasing; None
            gives all stages equal parts.
        every: How many frames of the video a latent one is made of; the first is of one.

    Raises:
        ValueError: A stage has no latent frame of its own.
    """
    if stages > frames:
        raise ValueError(
            f"stages must be as many as the video has latent frames at most, {frames}, got {stages}"
        )
    if anchors is None:
        first = [stage * frames // stages for stage in range(stages)]
    else:
        # Latent frame n is of the frames up to n · every.
        first = [-(-anchor // every) for anchor in anchors]
        if first[-1] >= frames:
            raise ValueError(
                f"stages must begin before the video ends: stage {stages} begins at frame "
                f"{anchors[-1]}, the last frame is {(frames - 1) * every}, of {frames} latent "
                "frames"
            )
        for stage, (this, following) in enumerate(pairwise(first), 1):
            if this == following:
                raise ValueError(
                    f"stages must begin in different latent frames, each of {every} frames of the "
                    f"video: stages {stage} and {stage + 1} begin at frames {anchors[stage - 1]} "
                    f"and {anchors[stage]}"
                )
        first[0] = 0
    last = [following - 1 for following in first[1:]] + [frames - 1]
    return list(zip(first, last, strict=True))
