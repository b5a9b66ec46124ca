"""A rule's tables over pairs of frames, and the draft of them that its terms are entered into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import Layout

FAR_BELOW = -1e3  # a bias beside which float32 keeps a logit to 6e-5
UNBOUNDED = 2**30  # in a band or a span: no bound on this side; int32 sums with it do not overflow


class Tables(NamedTuple):
    """A rule for two layouts; None where a table changes nothing. All stand on the CPU.

    ``delta``, ``offset`` and ``factor`` are float32, ``factor_span`` and ``band`` int32; see
    :class:`vstar_kernels.attention.frames.call.FrameCall`. They are shared, to be read only.
    """

    delta: Tensor | None = None
    offset: Tensor | None = None
    factor: Tensor | None = None
    factor_span: Tensor | None = None
    band: Tensor | None = None


class Draft:
    """The tables while the terms of a rule are entered, in float64."""

    def __init__(self, query: Layout, key: Layout) -> None:
        self.query, self.key = query, key
        self.delta: Tensor | None = None
        self.offset: Tensor | None = None
        self.factor: Tensor | None = None
        self.span: Tensor | None = None
        self.band: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(F_q, F_k)."""
        return self.query.frames, self.key.frames

    def distance(self) -> Tensor:
        """Returns t_g − t_f, ``(F_q, F_k)``."""
        return numbers(self.key.coordinates) - numbers(self.query.coordinates)[:, None]

    def key_rank(self) -> Tensor:
        """Returns the place of each key frame in the order of time, ``(F_k,)``."""
        rank = torch.empty(self.key.frames, dtype=torch.int64, device="cpu")
        rank[self.key.order()] = torch.arange(self.key.frames, device="cpu")
        return rank

    def frame_tokens(self, term: str) -> int:
        """Returns P, which a term needs to be the same of all frames."""
        sizes = sorted({*self.query.frame_tokens, *self.key.frame_tokens})
        if len(sizes) > 1:
            raise ValueError(
                f"{term} needs frames of one size, got frames of {_listed(sizes)} tokens"
            )
        return sizes[0] if sizes else 1

    def weigh(self, values: Tensor, by_stat: bool) -> None:
        """Adds ``values``, times the statistic or as they are."""
        if by_stat:
            self.delta = add_tables(self.delta, values)
        else:
            self.offset = add_tables(self.offset, values)

    def keep(self, visible: Tensor) -> None:
        """Masks the frames of keys that are not visible to a frame of queries."""
        nothing = torch.zeros(visible.shape, dtype=torch.float64, device="cpu")
        self.weigh(nothing.masked_fill(~visible, -math.inf), by_stat=False)

    def limit(self, low: Tensor, high: Tensor) -> None:
        """Keeps only keys with low ≤ p_j − p_i ≤ high, ``(F_q, F_k)`` integers each."""
        band = torch.stack([low, high]).clamp(-UNBOUNDED, UNBOUNDED)
        if self.band is not None:
            low, high = self.band
            band = torch.stack([band[0].maximum(low), band[1].minimum(high)])
        self.band = band

    def multiply(self, positive: Tensor, span: Tensor | None) -> None:
        """Multiplies positive logits; with a ``span``, only where lo ≤ p_j − p_i ≤ hi."""
        factor = torch.stack([positive, torch.ones_like(positive)])
        if self.factor is None:
            self.factor, self.span = factor, span
            return
        if (self.span is None) != (span is None) or (
            self.span is not None and span is not None and not torch.equal(self.span, span)
        ):
            raise ValueError(
                "factors of two terms hold for different tokens of a frame (metric='token' with "
                "another window, or beside metric='frame'): there is one span for a pair of frames"
            )
        self.factor = self.factor * factor

    def tables(self) -> Tables:
        """Returns the tables as backends take them."""
        offset = self.offset
        if offset is not None and not self.key.text_tokens:  # which has no bias
            offset = raised(offset)
        if offset is not None and not offset.any():
            offset = None
        delta = self.delta
        if delta is not None and not delta.any():
            delta = None
        factor, span, band = self.factor, self.span, self.band
        if factor is None or bool((factor == 1).all()):
            factor, span = None, None
        if band is not None:
            tokens = max((*self.query.frame_tokens, *self.key.frame_tokens), default=1)
            if bool((band[0] <= 1 - tokens).all() and (band[1] >= tokens - 1).all()):
                band = None
        return Tables(
            *(None if x is None else _single(x) for x in (delta, offset, factor)),
            *(None if x is None else x.int().contiguous() for x in (span, band)),
        )


def add_tables(one: Tensor | None, other: Tensor) -> Tensor:
    """Returns the sum of two tables, of which either may have a table for each head."""
    if one is None:
        return other
    if one.ndim == other.ndim == 3 and one.shape[0] != other.shape[0]:
        raise ValueError(
            "tables of FrameRule.bias that are added must have the same number of heads, "
            f"got {one.shape[0]} and {other.shape[0]}"
        )
    return one + other


def raised(offset: Tensor) -> Tensor:
    """Returns biases in which the largest of a row is 0, where all of it were far below.

    That changes no weight of the row, whichever of its keys there are. Beside a bias of −10⁹ for
    all of them, as of rows that are padding, float32 would lose their logits.
    """
    largest = offset.amax(-1, keepdim=True)
    far = (largest < FAR_BELOW) & (largest > -math.inf)
    return offset - largest.masked_fill(~far, 0.0)


def _single(table: Tensor) -> Tensor:
    """Returns a table in float32; −∞, which masks, is what it was, and nothing else gets there."""
    single = table.float().contiguous()
    if bool(((single.abs() == math.inf) & (table != -math.inf)).any() or single.isnan().any()):
        raise ValueError(
            "the terms of the rule make numbers beyond float32 between frames: their strengths, "
            "or the factors that are multiplied, are too large"
        )
    return single


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def numbers(values: Sequence[Any]) -> Tensor:
    """Returns numbers in float64 on the CPU, whatever the default device."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
