"""The scores of a study's videos, by models that the study names."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.frames import (
    DreamSimEmbedder,
    as_frames,
    frame_similarity,
    similarity_histogram,
)
from vstar_kernels.analysis.metrics import clip_vl, mt_score
from vstar_kernels.analysis.subjects import action_binding, numeracy
from vstar_kernels.cli.generate.results import FRAMES
from vstar_kernels.cli.options import CommandError
from vstar_kernels.cli.study.plan import Prompt, Video
from vstar_kernels.files import write_atomically
from vstar_kernels.reading import FormatError, decode, read_text, shorten

SCORES = "scores.json"  # beside a video
EMBEDDERS = ("pixels", "ssim", "dreamsim")


@dataclass(frozen=True)
class Scored:
    """What a score says of one video.

    Attributes:
        values: By the names of columns; none where it does not apply.
        curves: Several numbers each, by name, which plots show.
        matrices: Of pairs of frames, by name.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    matrices: Mapping[str, list[list[float]]] = field(default_factory=dict)


Scorer = Callable[[Tensor, Prompt], Scored]  # of frames (frames, 3, height, width), 0 to 1


def similarity_scorer(*, embedder: str = "pixels") -> Scorer:
    """Mean similarity of all pairs of frames (Fig. S.1), and by their interval (Fig. S.2)."""
    embed = _embedder(embedder)

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        if len(frames) < 2:
            return Scored()
        similarity = frame_similarity(frames, embed)
        means = similarity_histogram(similarity).means
        upper = similarity[torch.triu_indices(len(frames), len(frames), 1).unbind()]
        column = f"frame similarity ({embedder})"
        return Scored(
            {column: float(upper.mean())}, {column: means.tolist()}, {column: similarity.tolist()}
        )

    return score


def distance_scorer(*, embedder: str = "pixels") -> Scorer:
    """1 − similarity of neighbouring frames, and of the first and the last."""
    embed = _embedder(embedder)

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        if len(frames) < 2:
            return Scored()
        distance = 1 - frame_similarity(frames, embed)
        return Scored(
            {
                f"distance of neighbours ({embedder})": float(distance.diagonal(1).mean()),
                f"distance of first and last ({embedder})": float(distance[0, -1]),
            }
        )

    return score


def clip_scorer(*, model: str = "openai/clip-vit-large-patch14") -> Scorer:
    """Cosine of frames and prompt by CLIP (CLIP-VL; Tables 1 and 2)."""
    import transformers

    loaded: Any = transformers.CLIPModel.from_pretrained(model).eval()  # nosec B615
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    processor = transformers.CLIPProcessor.from_pretrained(model)  # nosec B615

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        return Scored({"CLIP-VL": clip_vl(frames, prompt.text, loaded, processor).score})

    return score


def mt_scorer(
    *, retriever: str, general: list[str], metamorphic: list[str], top: int | None = 5
) -> Scorer:
    """Probability of a time lapse by a video-retrieval model (MTScore; Tables 1 and 2)."""
    retrieve = named(retriever)

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        found = mt_score(frames, retrieve, general=general, metamorphic=metamorphic, top=top)
        return Scored({"MTScore": found.score})

    return score


def numeracy_scorer(*, detector: str, num_frames: int = 16) -> Scorer:
    """Share of nouns with the right number of subjects (T2V-CompBench), of prompts that say it."""
    detect = named(detector)

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        wanted = expected_of(prompt)
        if not wanted:
            return Scored()
        found = numeracy(frames, detect, wanted, num_frames=num_frames)
        return Scored({"numeracy": found.score, "numeracy by majority": found.majority})

    return score


def binding_scorer(*, judge: str) -> Scorer:
    """Grade of the actions by a model that looks at six frames (T2V-CompBench)."""
    grade = named(judge)

    def score(frames: Tensor, prompt: Prompt) -> Scored:
        return Scored({"action binding": action_binding(frames, grade).score})

    return score


SCORERS: dict[str, Callable[..., Scorer]] = {
    "frame_similarity": similarity_scorer,
    "temporal_distance": distance_scorer,
    "clip_vl": clip_scorer,
    "mt_score": mt_scorer,
    "numeracy": numeracy_scorer,
    "action_binding": binding_scorer,
}


def check_scores(scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CommandError for scores and settings that there are not, before anything is made."""
    for name, settings in scores.items():
        if name not in SCORERS:
            raise CommandError(f"there is no score {name!r}; there are {', '.join(SCORERS)}")
        try:
            inspect.signature(SCORERS[name]).bind(**settings)
        except TypeError as error:
            raise CommandError(f"scores: {name}: {error}") from error
        for setting in ("retriever", "detector", "judge", "embedder"):
            where = settings.get(setting)
            if where is not None and not (setting == "embedder" and where in EMBEDDERS):
                try:
                    named(where)
                except ValueError as error:
                    raise CommandError(f"scores: {name}: {setting} {error}") from error


def load_scorer(name: str, settings: Mapping[str, Any]) -> Scorer:
    """Returns what computes a score, its model loaded.

    Raises:
        CommandError: It cannot be loaded.
    """
    try:
        return SCORERS[name](**settings)
    except Exception as error:  # whatever models raise that are not there
        reason = shorten(str(error)) or type(error).__name__
        raise CommandError(f"scores: {name}: {reason}") from error


def score_video(
    folder: Path, video: Video, scorers: Mapping[str, tuple[str, Scorer]], *, again: bool
) -> dict[str, Scored]:
    """Returns the scores of a video by their names; those that were computed before are read.

    Args:
        folder: The video's.
        video: What it is of.
        scorers: By name: what identifies the score and its settings, and what computes it.
        again: Whether to compute those again that were.

    Raises:
        Exception: Whatever a scorer raises.
    """
    known = _read(folder / SCORES)
    frames: Tensor | None = None
    found = {}
    for name, (identity, scorer) in scorers.items():
        if name == "numeracy":  # the same video, of which a study may expect other numbers
            identity += json.dumps(expected_of(video.prompt), ensure_ascii=False)
        if again or identity not in known:
            frames = _frames(folder) if frames is None else frames
            scored = scorer(frames, video.prompt)
            for column, value in scored.values.items():
                if not math.isfinite(value):
                    raise ValueError(f"{column} must be a finite number, is {value}")
            known[identity] = scored
            text = json.dumps({key: vars(x) for key, x in known.items()}, ensure_ascii=False)
            write_atomically(folder / SCORES, f"{text}\n")
        found[name] = known[identity]
    return found


def expected_of(prompt: Prompt) -> dict[str, int]:
    """Returns how many of each subject there should be: as the prompt says, or as it is planned."""
    if prompt.expected is not None:
        return dict(prompt.expected)
    nouns = [] if prompt.plan is None else [subject.noun for subject in prompt.plan.subjects]
    return {noun: nouns.count(noun) for noun in nouns}


def named(where: Any) -> Any:
    """Returns the callable that ``"module:name"`` names.

    Raises:
        ValueError: It names none.
    """
    module, colon, name = where.partition(":") if isinstance(where, str) else ("", "", "")
    if not (module and colon and name):
        raise ValueError(f"must be module:name of a callable, got {where!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"must be module:name of a callable, {where!r} is {found!r}")
    return found


def _embedder(name: str) -> Any:
    if name == "dreamsim":
        return DreamSimEmbedder()
    return name if name in EMBEDDERS else named(name)


def _frames(folder: Path) -> Tensor:
    import numpy as np

    with np.load(folder / FRAMES) as arrays:
        frames: Tensor = as_frames(arrays["frames"])
    return frames


def _read(path: Path) -> dict[str, Scored]:
    """Returns the scores that are there; none of a file that is not of ours."""
    try:
        found = decode(read_text(path))
        return {key: _scored(**x) for key, x in found.items()}
    except (OSError, FormatError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _scored(values: Any, curves: Any, matrices: Any) -> Scored:
    """Returns scores of JSON; raises if they are not numbers by name."""
    return Scored(
        {name: float(value) for name, value in values.items()},
        {name: list(map(float, curve)) for name, curve in curves.items()},
        {name: [list(map(float, row)) for row in rows] for name, rows in matrices.items()},
    )
