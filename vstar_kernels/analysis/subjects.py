"""Scores of videos with several subjects, by models that the caller brings (StarVid)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.frames import as_frames

# A video (frames, 3, height, width), from 0 to 1, and nouns -> how many of each are in each frame.
Detector = Callable[[Tensor, Sequence[str]], Any]
# A picture (3, height, width), from 0 to 1 -> 0 to 5.
Judge = Callable[[Tensor], Any]

JUDGED_ROWS, JUDGED_COLUMNS = 3, 2
BEST_GRADE = 5.0


@dataclass(frozen=True, eq=False)
class Numeracy:
    """Whether there are as many of each subject as there should be.

    Attributes:
        score: The mean over frames of the share of nouns whose count is right (T2V-CompBench,
            arXiv 2407.14505).
        majority: The share of nouns whose most frequent count is right (LLM-grounded Video
            Diffusion, arXiv 2309.17444); of two that are as frequent, the smaller one.
        counts: ``(frames, nouns)``, int64: what the detector found in the frames that it saw.
    """

    score: float
    majority: float
    counts: Tensor


def numeracy(
    frames: Any, detector: Detector, expected: Mapping[str, int], *, num_frames: int = 16
) -> Numeracy:
    """Counts the subjects in a video's frames, by an object detector.

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`.
        detector: Maps a video ``(frames, 3, height, width)``, from 0 to 1, and the nouns to counts
            ``(frames, nouns)``.
        expected: How many there should be, by noun.
        num_frames: How many frames it sees, evenly from the first to the last; all, if there are
            not more.

    Raises:
        TypeError, ValueError: An argument is wrong, or what the detector returned.
    """
    if not isinstance(expected, Mapping):
        kind = type(expected).__name__
        raise TypeError(f"expected must map nouns to numbers, got {kind}")
    if not expected or not all(isinstance(noun, str) for noun in expected):
        raise ValueError(f"expected must have a noun at least, got {dict(expected)!r}")
    for noun, number in expected.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"expected[{noun!r}] must be a number of subjects, got {number!r}")
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an integer of at least 1, got {num_frames!r}")
    video = as_frames(frames)
    seen = video[_evenly(len(video), min(num_frames, len(video)))]
    counts = torch.as_tensor(detector(seen, list(expected))).detach().cpu()
    if counts.shape != (len(seen), len(expected)) or not (counts == counts.long()).all():
        raise ValueError(
            f"detector must return whole numbers ({len(seen)} frames, {len(expected)} nouns), got "
            f"{counts.tolist() if counts.numel() < 20 else tuple(counts.shape)}"
        )
    counts = counts.long()
    wanted = torch.tensor(list(expected.values()))
    right = (counts == wanted).double()
    return Numeracy(
        float(right.mean()), float((counts.mode(0).values == wanted).double().mean()), counts
    )


@dataclass(frozen=True, eq=False)
class ActionBinding:
    """Whether each subject does what it should.

    Attributes:
        score: From 0 to 1: the judge's grade by 5.
        picture: ``(3, 3 · height, 2 · width)``: what the judge saw.
    """

    score: float
    picture: Tensor


def action_binding(frames: Any, judge: Judge) -> ActionBinding:
    """Grades the actions in a video, by a model that looks at pictures (T2V-CompBench, 2407.14505).

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`.
        judge: Maps one picture to a grade from 0 to 5. The picture has six frames, evenly from the
            video's first to its last, in three rows of two, from left to right and from above; a
            video with fewer shows some twice.

    Raises:
        TypeError, ValueError: The frames are wrong, or what the judge returned.
    """
    video = as_frames(frames)
    seen = video[_evenly(len(video), JUDGED_ROWS * JUDGED_COLUMNS)]
    rows = seen.unflatten(0, (JUDGED_ROWS, JUDGED_COLUMNS))
    picture = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    grade = judge(picture)
    try:
        value = float(grade)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= BEST_GRADE:
        raise ValueError(f"judge must return a number from 0 to {BEST_GRADE:g}, got {grade!r}")
    return ActionBinding(value / BEST_GRADE, picture)


def _evenly(length: int, number: int) -> Tensor:
    """Returns so many places from the first to the last, rounded."""
    return torch.linspace(0, length - 1, number, dtype=torch.float64).round().long()
