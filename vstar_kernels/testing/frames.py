"""``frame_attention``: the formula over all pairs of tokens, and its bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.attention.frames.layout import Frames, Layout
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.testing.bounds import CELL, ROW_SUM, assert_output, largest_error
from vstar_kernels.testing.temporal import clamped


def eager_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
) -> Any:
    """Computes :func:`vstar_kernels.frame_attention` densely, every step in the inputs' type.

    The rule's tables are spelled out for every pair of tokens, from the layout's segments. In
    float64 it is the oracle.

    Returns:
        The output, or with ``return_map`` the output and the map.
    """
    parts = _frame_parts(
        query, key, layout, rule, key_layout=key_layout, key_lengths=key_lengths, scale=scale
    )
    out = _frames_out(parts.weights, value)
    if not return_map:
        return out
    return out, _frames_map(parts.weights, layout, key_layout, map_heads)


def _frames_out(weights: Tensor, value: Tensor) -> Tensor:
    """Returns the output of A′."""
    return torch.einsum("bhij,bjhd->bihd", weights, _repeat_heads(value, weights.shape[1]))


def _frames_map(
    weights: Tensor, layout: Layout, key_layout: Layout | None, map_heads: bool
) -> Tensor:
    """Returns the map of A′."""
    keys = layout if key_layout is None else key_layout
    rows = F.one_hot(_tokens(layout)[0], layout.frames + 1)[:, :-1].to(weights)
    columns = F.one_hot(_tokens(keys)[0], keys.frames + 1).to(weights)
    each = (rows / rows.sum(0)).T @ weights @ columns  # (batch, heads, F_q, F_k + 1)
    return each if map_heads else each.mean(1)


class _FrameParts(NamedTuple):
    """What the formula makes, ``(batch, heads, tokens, keys)`` each."""

    weights: Tensor
    terms: Tensor  # of every logit: the sum of the absolute values of what it is a sum of


def _tokens(layout: Layout) -> tuple[Tensor, Tensor]:
    """Returns the frame's number, F of text, and the place in the frame of each token."""
    numbers: dict[float, int] = {}
    sizes: dict[int, int] = {}
    tokens: list[tuple[int, int]] = []
    for segment in layout.segments:
        if not isinstance(segment, Frames):
            tokens += [(-1, 0)] * segment.tokens
            continue
        for i in range(segment.count):
            number = numbers.setdefault(segment.first + i * segment.step, len(numbers))
            for _ in range(segment.tokens):
                tokens.append((number, sizes.get(number, 0)))
                sizes[number] = sizes.get(number, 0) + 1
    frame, place = torch.tensor(tokens, device="cpu").T
    return torch.where(frame < 0, len(numbers), frame), place


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Returns keys or values with a head for each of the queries'."""
    return torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], dim=2)


def _frame_parts(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    rule: FrameRule | None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> _FrameParts:
    """Returns A′ and the size of what its logits are made of."""
    rule = FrameRule() if rule is None else rule
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = layout if key_layout is None else key_layout
    tables = rule.tables(layout, keys)
    (f, place), (g, key_place) = _tokens(layout), _tokens(keys)
    distance = key_place - place[:, None]

    def spelled(table: Tensor, neutral: float) -> Tensor:
        """Returns the entry for each pair of tokens; ``neutral`` where one of them is text."""
        return F.pad(table, (0, 1, 0, 1), value=neutral)[..., f[:, None], g]

    def within(bounds: Tensor) -> Tensor:
        return (spelled(bounds[0], -(2**30)) <= distance) & (distance <= spelled(bounds[1], 2**30))

    every_key = _repeat_heads(key, query.shape[2])
    logits = torch.einsum("bihd,bjhd->bhij", query, every_key) * scale
    terms = torch.einsum("bihd,bjhd->bhij", query.abs(), every_key.abs()) * abs(scale)
    if tables.factor is not None:
        of_positive, of_others = (spelled(x, 1.0).to(logits) for x in tables.factor)
        factor = torch.where(logits > 0, of_positive, of_others)
        if tables.factor_span is not None:
            factor = torch.where(within(tables.factor_span), factor, torch.ones_like(factor))
        logits, terms = logits * factor, terms * factor.abs()

    visible = torch.ones_like(logits, dtype=torch.bool)
    if key_lengths is not None:
        visible &= (torch.arange(len(g)) < key_lengths[:, None])[:, None, None]
    if tables.band is not None:
        visible &= within(tables.band)
    offset = logits.new_zeros(())
    if tables.offset is not None:
        offset = spelled(tables.offset, 0.0).to(logits)
        visible &= offset > -math.inf
        offset = offset.masked_fill(offset == -math.inf, 0.0)

    if tables.delta is not None:
        delta = spelled(tables.delta, 0.0).to(logits)
        stat = _frame_statistic(logits, visible, [g == frame for frame in range(keys.frames)], rule)
        stat_terms = stat.abs()
        if rule.stat in ("row_max", "frame_max"):
            stat_terms = terms.amax(-1, keepdim=True)
        if rule.clamp_negative:
            stat = clamped(stat)
        logits, terms = logits + stat * delta, terms + stat_terms * delta.abs()
    logits, terms = logits + offset, terms + offset.abs()

    some = visible.any(-1, keepdim=True)
    weights = logits.masked_fill(~visible & some, -math.inf).softmax(-1)
    return _FrameParts(torch.where(visible, weights, torch.zeros_like(weights)), terms)


def _frame_statistic(
    logits: Tensor, visible: Tensor, of_frame: list[Tensor], rule: FrameRule
) -> Tensor:
    """Returns r of each row, ``(batch, heads, tokens, 1)``; 0 without a visible key of the video.

    ``of_frame`` has a mask of the keys for each frame.
    """
    if isinstance(rule.stat, Tensor):
        return rule.stat.mT.unsqueeze(-1).to(logits)
    found = [torch.full_like(logits[..., :1], -math.inf)]
    for keys in of_frame:
        count = visible[..., keys].sum(-1, keepdim=True)
        x = logits[..., keys].masked_fill(~visible[..., keys] & (count > 0), -math.inf)
        if rule.stat == "frame_max":
            x = x.logsumexp(-1, keepdim=True) - count.clamp(min=1).to(logits).log()
        found.append(x.masked_fill(count == 0, -math.inf))
    largest = torch.cat(found, -1).max(-1, keepdim=True).values
    return torch.where(largest > -math.inf, largest, torch.zeros_like(largest))


def assert_frames(
    found: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    **options: Any,
) -> None:
    """Asserts that :func:`vstar_kernels.frame_attention`'s result is about as exact as PyTorch's.

    ``found`` is what it returned for the arguments: the output, or the output and the map. In
    float32 the output may err twice as much as the eager formula, and by a few roundings of each
    logit's terms; in 16 bits twice as much as the eager formula does in that type. Two roundings
    of the largest value come on top. The map, which is float32, is compared with that of the very
    inputs in float64; what its logits' terms do to a weight is allowed.
    """
    result: tuple[Tensor, ...] = found if options.pop("return_map", False) else (found,)
    map_heads = options.pop("map_heads", False)
    weights, terms = _frame_parts(query.double(), key.double(), layout, rule, **options)
    expected = _frames_out(weights, value.double())
    plain = eager_frames(query, key, value, layout, rule, **options)
    every_value = _repeat_heads(value.double(), query.shape[2])
    assert_output(result[0], plain, expected, every_value, weights * terms)
    if len(result) == 2:
        mean_map = result[1]
        expected_map = _frames_map(weights, layout, options.get("key_layout"), map_heads)
        assert (mean_map.shape, mean_map.dtype) == (expected_map.shape, torch.float32)
        error = largest_error(mean_map.sum(-1), expected_map.sum(-1))
        assert error <= ROW_SUM, f"a row of the map is off by {error:.3g}"
        largest = terms.max().item() if terms.numel() else 0.0
        error, allowed = largest_error(mean_map, expected_map), CELL * max(1.0, largest)
        assert error <= allowed, f"the map is off by {error:.3g}, allowed {allowed:.3g}"
