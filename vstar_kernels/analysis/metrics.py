"""Scores of generated videos, by models that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.analysis.frames import as_frames

# A video (frames, 3, height, width), from 0 to 1, and sentences -> one logit for each sentence.
Retriever = Callable[[Tensor, Sequence[str]], Tensor]


LARGEST_LOGIT = 101.0  # 100 times a cosine, with the rounding of bfloat16


@dataclass(frozen=True, eq=False)
class CLIPVL:
    """How well frames match their texts.

    Attributes:
        per_frame: ``(frames,)``, float32: the cosine of each frame's and its text's embedding, from
            −1 to 1. CLIP's are seldom above 0.4, even of photographs with their captions.
        score: Their mean. Tables often show it times 100.
    """

    per_frame: Tensor
    score: float


@torch.no_grad()
def clip_vl(
    frames: Any, texts: str | Sequence[str], model: Any, processor: Any, *, batch_size: int = 16
) -> CLIPVL:
    """Measures the similarity of frames and text by CLIP (CLIP-VL; VSTAR, Tables 1 and 2).

    >>> model = transformers.CLIPModel.from_pretrained("openai/clip-vit-large-patch14")
    >>> processor = transformers.CLIPProcessor.from_pretrained("openai/clip-vit-large-patch14")
    >>> vk.analysis.clip_vl(frames, prompt, model, processor).score

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`.
        texts: One text for all frames, or one for each. Those longer than the model takes are cut.
        model: A ``transformers`` ``CLIPModel``, on any device.
        processor: Its ``CLIPProcessor``.
        batch_size: How many frames, or texts, it embeds at a time.

    Raises:
        ValueError: There are neither one nor as many texts as frames.
    """
    video = as_frames(frames)
    sentences = [texts] if isinstance(texts, str) else list(texts)
    if not isinstance(texts, str) and len(sentences) != len(video):
        raise ValueError(
            f"texts must be one text or one for each of the {len(video)} frames, got "
            f"{len(sentences)}"
        )
    images = [
        model.get_image_features(**_prepare(processor, model, images=list(batch), do_rescale=False))
        for batch in video.split(batch_size)
    ]
    unique = list(dict.fromkeys(sentences))
    described = [
        model.get_text_features(
            **_prepare(
                processor, model, text=unique[i : i + batch_size], padding=True, truncation=True
            )
        )
        for i in range(0, len(unique), batch_size)
    ]
    text_directions = _directions(described)[[unique.index(sentence) for sentence in sentences]]
    cosines = (_directions(images) * text_directions).sum(1).cpu()
    return CLIPVL(cosines, float(cosines.mean()))


def _prepare(processor: Any, model: Any, **options: Any) -> Any:
    prepared = processor(return_tensors="pt", **options).to(model.device)
    if "pixel_values" in prepared:
        prepared["pixel_values"] = prepared["pixel_values"].to(model.dtype)
    return prepared


def _directions(features: list[Any]) -> Tensor:
    # transformers 4 returns the projected embedding itself, transformers 5 an output that holds it.
    embeddings = [getattr(feature, "pooler_output", feature) for feature in features]
    return F.normalize(torch.cat(embeddings).float(), dim=1)


@dataclass(frozen=True, eq=False)
class MTScore:
    """How much a video is taken for a time lapse.

    Attributes:
        score: From 0 to 1; the higher, the more change there is over time.
        general: What the sentences of ordinary videos have in the same count.
        probabilities: ``(general + metamorphic sentences,)``, float32: of all sentences; they
            add up to 1.
    """

    score: float
    general: float
    probabilities: Tensor


def mt_score(
    frames: Any,
    retriever: Retriever,
    *,
    general: Sequence[str],
    metamorphic: Sequence[str],
    top: int | None = 5,
) -> MTScore:
    """Measures the metamorphic amplitude by a video-retrieval model (MTScore; VSTAR, Tables 1, 2).

    The model chooses between sentences that describe an ordinary video and sentences that describe
    a time lapse; the score is the probability of the latter among the ``top`` sentences. It was
    introduced by ChronoMagic-Bench (arXiv 2406.18522), with InternVideo2 and five sentences of each
    kind, which are in that project's repository. Other models and sentences give numbers that
    compare only with each other.

    Args:
        frames: As for :func:`vstar_kernels.analysis.as_frames`.
        retriever: Maps a video ``(frames, 3, height, width)``, from 0 to 1, and the sentences to
            one logit for each of them: 100 times the cosine of their embeddings, as the benchmark
            has it.
        general: Sentences that describe an ordinary video.
        metamorphic: Sentences that describe a time lapse.
        top: Of how many of the likeliest sentences the probabilities are added up, the benchmark's
            5; None is all.

    Raises:
        TypeError, ValueError: An argument is wrong, or what the retriever returned.
    """
    for name, sentences in (("general", general), ("metamorphic", metamorphic)):
        if isinstance(sentences, str) or not sentences:
            raise ValueError(f"{name} must be a list of at least one sentence, got {sentences!r}")
    sentences = [*general, *metamorphic]
    if top is not None and not 1 <= top <= len(sentences):
        raise ValueError(f"top must be 1 to {len(sentences)} (the sentences) or None, got {top}")
    logits = torch.as_tensor(retriever(as_frames(frames), sentences)).detach().float().cpu()
    if logits.shape != (len(sentences),) or not logits.isfinite().all():
        raise ValueError(
            f"retriever must return a finite logit for each of the {len(sentences)} sentences, got "
            f"{logits.tolist() if logits.ndim == 1 else tuple(logits.shape)}"
        )
    _check_scale(logits)
    probabilities = logits.softmax(0)
    counted = torch.zeros_like(probabilities)
    best = probabilities.topk(top or len(sentences)).indices
    counted[best] = probabilities[best]
    return MTScore(
        float(counted[len(general) :].sum()), float(counted[: len(general)].sum()), probabilities
    )


def _check_scale(logits: Tensor) -> None:
    """Raises ValueError unless logits can be 100 times cosines, and are not cosines themselves."""
    largest = float(logits.abs().max())
    if largest > LARGEST_LOGIT:
        raise ValueError(
            f"retriever must return 100 times cosines, from -100 to 100, got {logits.tolist()}"
        )
    if largest <= 1:
        raise ValueError(
            "retriever must return 100 times cosines; these look like the cosines themselves, of "
            f"which all sentences are nearly as probable: {logits.tolist()}"
        )


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Returns the Fréchet distance of two sets of features: FVD and FID, by the caller's features.

    ``|μ₁ − μ₂|² + tr(S₁ + S₂) − 2 tr((S₁^½ S₂ S₁^½)^½)`` of their means and covariances, in
    float64. With I3D's features of videos it is the FVD that ETC reports.

    Args:
        one, other: ``(samples, channels)``, at least two samples each; the covariances are those
            of samples, divided by n − 1.

    Raises:
        ValueError: There are fewer than two samples, the channels differ, or a feature is not
            finite.
        TypeError: One is not a tensor.
    """
    for name, features in (("one", one), ("other", other)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"{name} must be (samples, channels), of two samples at least, got "
                f"{tuple(features.shape)}"
            )
        if bad := int((~features.isfinite()).any(1).sum()):
            raise ValueError(f"{name} must be finite, got {bad} samples that are not")
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"one and other must have the same channels, got {one.shape[1]} and {other.shape[1]}"
        )
    (mean_1, cov_1), (mean_2, cov_2) = (_moments(x) for x in (one, other.to(one.device)))
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    middle = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * middle
    return float(distance.clamp(min=0))  # which keeps a NaN


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    exact = features.detach().double()
    mean = exact.mean(0)
    centred = exact - mean
    return mean, centred.mT @ centred / (len(features) - 1)
