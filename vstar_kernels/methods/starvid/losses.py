"""StarVid's two losses (arXiv 2409.15259), as pure functions of cross-attention maps.

The paper's idea is that a noun's map is to lie in its subject's box, and a verb's map is to be like
its noun's in adjacent frames and unlike those of other words. Its formulas are not public, so these
are public building blocks': the spatial loss has the form of BoxDiff's (arXiv 2307.10816) and of
LVD's (arXiv 2309.17444), the syntax loss that of SynGen's (arXiv 2306.08877). Every choice is an
argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vstar_kernels.methods.arguments import check_choice

Form = Literal["topk", "mass"]
Normalize = Literal["max"]
Distance = Literal["kl", "cosine"]
FORMS: tuple[Form, ...] = get_args(Form)
NORMALIZES: tuple[Normalize, ...] = get_args(Normalize)
DISTANCES: tuple[Distance, ...] = get_args(Distance)
EPSILON = 1e-8  # of a map's mean, so that no cell is 0 in a logarithm


def spatial_loss(
    maps: Tensor,
    masks: Tensor,
    *,
    form: Form = "topk",
    share: float = 0.75,
    inside: float = 1.0,
    outside: float = 4.0,
    normalize: Normalize | None = None,
) -> Tensor:
    """Returns how far nouns' maps are from lying in their boxes.

    Of subject s in frame f, with the map A and the cells M of its box, ``"topk"`` is

        inside · (1 − mean of the top ⌈p·|M|⌉ of A∘M) + outside · mean of the top ⌈p·|1−M|⌉ of
        A∘(1−M)

    with p = ``share``; where the subject is absent (M is empty) it is the second term alone.
    ``"mass"`` is (1 − ΣA∘M / ΣA)², and 0 where the subject is absent.

    Args:
        maps: A, ``(…, frames, subjects, height, width)``, at least 0.
        masks: M, bool ``(frames, subjects, height, width)``.
        form: Which of the two.
        share: p, in (0, 1].
        inside, outside: The weights of the two terms, at least 0.
        normalize: ``"max"`` divides each map by its largest cell first, as a noun's attention
            competes with all other tokens'; the divisor has no gradient.

    Returns:
        The mean over frames and subjects, ``(…,)``.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    _check_maps(maps)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a torch.Tensor of bool, got {kind}")
    if masks.shape != maps.shape[-4:]:
        raise ValueError(
            "masks must have the maps' (frames, subjects, height, width), "
            f"{tuple(maps.shape[-4:])}, got {tuple(masks.shape)}"
        )
    check_choice("form", form, FORMS)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    for name, weight in (("inside", inside), ("outside", outside)):
        if not weight >= 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    cells, mask = maps.flatten(-2), masks.flatten(-2).to(maps.device)
    if normalize is not None:
        check_choice("normalize", normalize, NORMALIZES)
        largest = cells.detach().amax(-1, keepdim=True)
        cells = cells / largest.clamp(min=torch.finfo(cells.dtype).tiny)
    present = mask.any(-1)
    if form == "mass":
        outside_box = 1 - (cells * mask).sum(-1) / cells.sum(-1)
        return torch.where(present, outside_box.square(), 0).mean((-2, -1))
    in_box = torch.where(present, 1 - _top_mean(cells, mask, share), 0)
    return (inside * in_box + outside * _top_mean(cells, ~mask, share)).mean((-2, -1))


def syntax_loss(
    maps: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    present: Tensor | None = None,
    distance: Distance = "kl",
    window: int = 1,
    margin: float | None = None,
) -> Tensor:
    """Returns how far verbs' maps are from their own nouns', less how far from other words'.

    Of a noun n and its verb v, with U all other words and D the :func:`map_distance`, it is the
    mean over frames f, and over the frames f′ at most ``window`` from f, of

        D(A_v in f, A_n in f′) − mean over u in U of min(D(A_v in f, A_u in f′), margin)

    Args:
        maps: A, ``(…, frames, words, height, width)``, at least 0.
        pairs: The index of the noun and of the verb of each pair among the words.
        present: In which frames the subject of each pair is there, bool ``(pairs, frames)``: both f
            and f′ are of these. None is all.
        distance: ``"kl"``, which the paper finds better, or ``"cosine"``.
        window: In frames on either side; 1 is three frames.
        margin: Beyond which distance from other words there is nothing to gain; None is SynGen's,
            without a limit.

    Returns:
        The mean over pairs, ``(…,)``. Where there are no other words the second term is 0, with a
        warning.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    _check_maps(maps)
    check_choice("distance", distance, DISTANCES)
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"window must be a number of frames of at least 0, got {window!r}")
    if margin is not None and not margin > 0:
        raise ValueError(f"margin must be more than 0, got {margin}")
    frames, words = maps.shape[-4:-2]
    _check_pairs(pairs, words)
    if present is None:
        present = torch.ones(len(pairs), frames, dtype=torch.bool)
    elif present.shape != (len(pairs), frames):
        raise ValueError(
            f"present must be ({len(pairs)} pairs, {frames} frames), got {tuple(present.shape)}"
        )
    losses = [
        _pair_loss(maps, noun, verb, there, distance, window, margin)
        for (noun, verb), there in zip(pairs, present.to(maps.device), strict=True)
    ]
    return torch.stack(losses).mean(0)


def map_distance(one: Tensor, other: Tensor, distance: Distance = "kl") -> Tensor:
    """Returns the distance of maps.

    ``"kl"`` is (KL(â‖b̂) + KL(b̂‖â)) / 2 in nats, â being a as a distribution over cells, in which no
    cell is 0: (a + ε) / Σ(a + ε) with ε = 10⁻⁸ of a's mean. ``"cosine"`` is 1 − cos(a, b).

    Args:
        one, other: ``(…, height, width)``, at least 0.
        distance: Which of the two.

    Returns:
        ``(…,)``.
    """
    check_choice("distance", distance, DISTANCES)
    one, other = one.flatten(-2), other.flatten(-2)
    if distance == "cosine":
        return 1 - torch.cosine_similarity(one, other, dim=-1)
    one, other = _distribution(one), _distribution(other)
    return ((one - other) * (one.log() - other.log())).sum(-1) / 2


def mass_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns which share of each map lies in a mask, of 1.

    Args:
        maps: ``(…, height, width)``, at least 0.
        masks: Bool, of the maps' shape or one that broadcasts to it.

    Returns:
        ``(…,)``.
    """
    return (maps * masks).sum((-2, -1)) / maps.sum((-2, -1))


def _pair_loss(
    maps: Tensor,
    noun: int,
    verb: int,
    present: Tensor,
    distance: Distance,
    window: int,
    margin: float | None,
) -> Tensor:
    """Returns the syntax loss of one pair, 0 where its subject is in no frame."""
    frames, words = maps.shape[-4:-2]
    others = [word for word in range(words) if word not in (noun, verb)]
    weights = _window_weights(present, window)
    total = maps.new_zeros(maps.shape[:-4])
    for offset in range(-min(window, frames - 1), min(window, frames - 1) + 1):
        first, last = max(0, -offset), min(frames, frames - offset)  # of the frames f
        verbs = maps[..., first:last, verb, :, :]
        near = maps[..., first + offset : last + offset, :, :, :]
        term = map_distance(verbs, near[..., noun, :, :], distance)
        if others:
            away = map_distance(verbs[..., None, :, :], near[..., others, :, :], distance)
            term = term - (away if margin is None else away.clamp(max=margin)).mean(-1)
        total = total + (term * weights.diagonal(offset)).sum(-1)
    return total


def _window_weights(present: Tensor, window: int) -> Tensor:
    """Returns the weight of each pair of frames (f, f′) in the mean over both."""
    frame = torch.arange(len(present), device=present.device)
    near = (frame[:, None] - frame).abs() <= window
    counted = (near & present & present[:, None]).float()
    rows = counted.sum(-1, keepdim=True).clamp(min=1)
    return counted / rows / present.sum().clamp(min=1)


def _top_mean(cells: Tensor, mask: Tensor, share: float) -> Tensor:
    """Returns the mean of the largest of the masked cells, 0 where none is masked.

    ``(…, cells)`` of both, and ``(…,)``.
    """
    count = (mask.sum(-1) * share).ceil().long()
    ordered = (cells * mask).sort(-1, descending=True).values
    rank = torch.arange(cells.shape[-1], device=cells.device)
    chosen = rank < count[..., None]
    return (ordered * chosen).sum(-1) / count.clamp(min=1)


def _distribution(cells: Tensor) -> Tensor:
    raised = cells + EPSILON * cells.mean(-1, keepdim=True)
    return raised / raised.sum(-1, keepdim=True)


def _check_maps(maps: Tensor) -> None:
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps must be a torch.Tensor, got {type(maps).__name__}")
    if maps.ndim < 4 or not maps.is_floating_point() or not maps.numel():
        raise ValueError(
            "maps must be floating-point (…, frames, words, height, width), none of them 0, got "
            f"{maps.dtype} of shape {tuple(maps.shape)}"
        )


def _check_pairs(pairs: Sequence[tuple[int, int]], words: int) -> None:
    if not pairs:
        raise ValueError("pairs must hold at least one noun and its verb, got none")
    for noun, verb in pairs:
        for word in (noun, verb):
            if not 0 <= word < words:
                raise ValueError(f"pairs must be of words 0 to {words - 1}, got {word}")
        if noun == verb:
            raise ValueError(f"pairs must be of two different words, got {noun} twice")
    if words == 2:
        warnings.warn(
            "there are no words but one noun and its verb: the syntax loss draws the two together "
            "and has nothing to keep them away from",
            stacklevel=3,
        )
