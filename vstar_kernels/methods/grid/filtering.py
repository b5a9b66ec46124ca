"""Which clips are worth training on: those whose frames match their text (ETC, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vstar_kernels.analysis.metrics import clip_vl

# ε of eq. 5. The paper prints "ln(1/0.07)^e"; CLIP's own logit scale is exp(ln(1/0.07)).
LOGIT_SCALE = math.exp(math.log(1 / 0.07))
Reduce = Literal["mean", "min"]


def clip_scores(
    clips: Iterable[Any], model: Any, processor: Any, *, reduce: Reduce = "mean"
) -> Tensor:
    """Returns how well each clip's frames match its text: ε · cos by CLIP (ETC, eq. 5).

    Args:
        clips: :class:`Clip` and what else begins with frames and a text; the frames as for
            :func:`vstar_kernels.analysis.as_frames`.
        model, processor: As for :func:`vstar_kernels.analysis.clip_vl`.
        reduce: ``"mean"`` over frames, or ``"min"``, the worst frame.

    Returns:
        ``(clips,)``, float32.

    Raises:
        ValueError: ``reduce`` is neither.
    """
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be 'mean' or 'min', got {reduce!r}")
    scores = []
    for frames, text, *_ in clips:
        cosines = clip_vl(frames, text, model, processor).per_frame
        scores.append(cosines.mean() if reduce == "mean" else cosines.min())
    return LOGIT_SCALE * torch.stack(scores) if scores else torch.empty(0)


def filter_by_score(
    scores: Tensor, *, keep: float | None = None, threshold: float | None = None
) -> Tensor:
    """Returns which clips are kept: ``(clips,)`` booleans.

    Args:
        scores: ``(clips,)``, higher is better.
        keep: The share that is kept, 0 to 1, of n clips round(share · n); of equal scores the
            first are.
        threshold: Keep those of at least this score, instead.

    Raises:
        ValueError: There are no scores, both or neither of the two are given, or ``keep`` is no
            share.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 1 or not len(scores):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must be (clips,), of one clip at least, got {shape}")
    if (keep is None) == (threshold is None):
        given = "neither" if keep is None else "both"
        raise ValueError(f"give one of keep and threshold, got {given}")
    if threshold is not None:
        return scores >= threshold
    assert keep is not None
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be a share from 0 to 1, got {keep}")
    best = scores.argsort(descending=True, stable=True)[: math.floor(keep * len(scores) + 0.5)]
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[best] = True
    return kept
