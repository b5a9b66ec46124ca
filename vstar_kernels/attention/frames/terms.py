"""What the terms of a :class:`FrameRule` enter into its tables, each one thing.

A term is a small frozen dataclass with ``enter``, which takes the :class:`Draft` of the tables for
two layouts. Distances are between the frames' coordinates; "the first frames" are those with the
smallest ones. So a term means the same wherever a frame's tokens lie in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.bias import FLOAT32_MAX, check_strided
from vstar_kernels.attention.call import carry_tangents
from vstar_kernels.attention.frames.layout import check_count, check_number
from vstar_kernels.attention.frames.tables import UNBOUNDED, Draft, numbers

METRICS = ("frame", "token")


def _hold_number(term: Any, name: str, *, least: float | None = None) -> None:
    """Checks a term's number and makes it a float: torch takes no integer beyond int64."""
    check_number(getattr(term, name), name, least=least)
    object.__setattr__(term, name, float(getattr(term, name)))


@dataclass(frozen=True)
class Gaussian:
    """strength · exp(−(t_g − t_f)²/2σ²), as VSTAR's Δ (arXiv 2403.13501, eq. 2)."""

    sigma: float
    strength: float
    by_stat: bool

    def __post_init__(self) -> None:
        _hold_number(self, "sigma", least=0)
        _hold_number(self, "strength")

    def enter(self, draft: Draft) -> None:
        distance = draft.distance()
        if self.sigma > 0:  # divided before it is squared: σ² may leave the range of floats
            values = torch.exp(-0.5 * (distance / self.sigma) ** 2)
        else:
            values = (distance == 0).double()
        values[values < torch.finfo(torch.float32).tiny] = 0.0  # subnormals are slow
        draft.weigh(self.strength * values, self.by_stat)


@dataclass(frozen=True, eq=False)
class Table:
    """strength · table, given entry by entry; −inf in it masks."""

    table: Tensor
    strength: float
    by_stat: bool

    def __post_init__(self) -> None:
        table = self.table
        if not isinstance(table, Tensor):
            raise TypeError(f"table must be a torch.Tensor, got {type(table).__name__}")
        check_strided(table, "table")
        if table.ndim not in (2, 3):
            raise ValueError(
                "table must have shape (F_q, F_k) or (heads, F_q, F_k), frames of queries by "
                f"frames of keys, got {tuple(table.shape)}"
            )
        if not table.is_floating_point():
            raise ValueError(f"table must be floating point, got {table.dtype}")
        if table.is_meta:
            raise ValueError("table is on the meta device and holds no numbers")
        _hold_number(self, "strength")
        # Said once: what is frozen later goes on changing, and must stay out of caches.
        object.__setattr__(self, "_trained", _is_followed(table))
        if not self.trained:  # so that nobody changes what a cache was made of
            object.__setattr__(self, "table", table.detach().to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "_hash", self._make_hash())
        if self.trained:
            return
        given = table.detach().cpu()
        allowed = "finite in float32" + ("" if self.by_stat else ", or -inf to mask")
        bad = ~self.table.isfinite()
        if not self.by_stat:
            bad &= given != -math.inf
        if bool(bad.any()):
            raise ValueError(f"table must be {allowed}, got {given[bad][0].item()}")

    @property
    def trained(self) -> bool:
        """Whether a gradient followed the table when the term was made: its values may change."""
        found: bool = self._trained  # type: ignore[attr-defined]
        return found

    def fitting(self, shape: tuple[int, int]) -> Tensor:
        """Returns the table on the CPU, if it is for so many frames of queries and of keys."""
        rows, columns = self.table.shape[-2:]
        if (rows, columns) != shape:
            raise ValueError(
                f"the table of FrameRule.bias is for {rows} frames of queries and {columns} of "
                f"keys (shape {tuple(self.table.shape)}), the layouts have {shape[0]} and "
                f"{shape[1]}"
            )
        return self.table.cpu()

    def weighted(self, table: Tensor) -> Tensor:
        """Returns strength · table; −∞ masks whatever the strength, unless that is 0."""
        masked = table == -math.inf
        return (self.strength * table).masked_fill(masked, -math.inf if self.strength else 0.0)

    def enter(self, draft: Draft) -> None:
        draft.weigh(self.weighted(self.fitting(draft.shape).double()), self.by_stat)

    def _make_hash(self) -> int:
        if self.trained:
            return hash((id(self.table), self.strength, self.by_stat))
        return hash((tuple(self.table.flatten().tolist()), self.strength, self.by_stat))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Table) or hash(self) != hash(other):
            return False
        same = (self.strength, self.by_stat) == (other.strength, other.by_stat)
        if self.trained or other.trained:
            return same and self.table is other.table
        return same and torch.equal(self.table, other.table)

    def __hash__(self) -> int:
        found: int = self._hash  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True, eq=False)
class TrainedOfHeads(Table):
    """A :class:`Table` whose values may change, for some of ``count`` heads; the others have 0."""

    heads: tuple[int, ...]
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_trained", True)  # as it was when the rule was made
        object.__setattr__(self, "_hash", hash((self._make_hash(), self.heads, self.count)))

    def weighted(self, table: Tensor) -> Tensor:
        """Returns strength · table, ``(count, F_q, F_k)``, 0 for the heads that are not named."""
        chosen = torch.zeros(self.count, 1, 1, dtype=torch.bool, device="cpu")
        chosen[list(self.heads)] = True
        return super().weighted(table).masked_fill(~chosen, 0.0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainedOfHeads):
            return NotImplemented
        same = (self.heads, self.count) == (other.heads, other.count)
        return same and super().__eq__(other)

    def __hash__(self) -> int:
        return super().__hash__()


def _is_followed(table: Tensor) -> bool:
    """Returns whether autograd, forward mode or torch.func follows what is made of a table."""
    return (
        table.requires_grad
        or torch._C._functorch.is_functorch_wrapped_tensor(table)
        or carry_tangents([table])
    )


@dataclass(frozen=True)
class Window:
    """Keeps the frames of keys within w of the query's, and the first ``sink`` frames."""

    w: float
    sink: int

    def __post_init__(self) -> None:
        _hold_number(self, "w", least=0)
        check_count(self.sink, "sink", 0)

    def enter(self, draft: Draft) -> None:
        draft.keep((draft.distance().abs() <= self.w) | (draft.key_rank() < self.sink))


@dataclass(frozen=True)
class Causal:
    """Keeps the frames of keys whose block of frames is not after the query's."""

    block: int

    def __post_init__(self) -> None:
        check_count(self.block, "block", 1)

    def enter(self, draft: Draft) -> None:
        of_query = numbers(draft.query.coordinates).div(self.block).floor()
        of_key = numbers(draft.key.coordinates).div(self.block).floor()
        draft.keep(of_key <= of_query[:, None])


@dataclass(frozen=True)
class Keyframes:
    """Keeps the first frames, every interval-th frame from an offset on, and those within w."""

    first: int
    interval: int
    offset: int
    w: float

    def __post_init__(self) -> None:
        check_count(self.first, "first", 0)
        check_count(self.interval, "interval", 1)
        check_count(self.offset, "offset", 0)
        _hold_number(self, "w", least=0)

    def enter(self, draft: Draft) -> None:
        rank, count = draft.key_rank(), draft.key.frames
        grid = torch.arange(-(-count // self.interval), device="cpu") * self.interval + self.offset
        anchors = (rank < self.first) | torch.isin(rank, grid % max(count, 1))
        draft.keep((draft.distance().abs() <= self.w) | anchors)


@dataclass(frozen=True)
class Horizon:
    """Keeps, for the first frames of queries, the first frames of keys alone."""

    frames: int
    queries: int

    def __post_init__(self) -> None:
        check_count(self.frames, "frames", 1)
        check_count(self.queries, "queries", 0)

    def enter(self, draft: Draft) -> None:
        # Of the whole clip: where there is a cache of keys, queries are a part of it.
        clip = sorted({*draft.query.coordinates, *draft.key.coordinates})
        last = [-math.inf, *clip][min(self.queries, len(clip))]
        early = numbers(draft.query.coordinates)[:, None] <= last
        draft.keep(~early | (draft.key_rank() < self.frames))


@dataclass(frozen=True)
class Attenuate:
    """Multiplies positive logits of keys far from the query."""

    alpha: float
    window: float
    bands: tuple[tuple[float, float], ...]
    beta: float | None
    metric: str

    def __post_init__(self) -> None:
        _hold_number(self, "alpha", least=0)
        _hold_number(self, "window", least=0)
        for band in self.bands:
            for edge in band:
                check_number(edge, "an edge of bands", least=0)
            if band[0] > band[1]:
                raise ValueError(f"bands must be (nearest, farthest) distances, got {band}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be 'frame' or 'token', got {self.metric!r}")
        if bool(self.bands) != (self.beta is not None):
            raise ValueError(
                "bands and beta, the factor in them, come together, "
                f"got bands={self.bands} and beta={self.beta}"
            )
        if self.beta is not None:
            _hold_number(self, "beta", least=0)
        if self.metric == "token" and self.bands:
            raise ValueError(
                f"bands need metric='frame', got {len(self.bands)} of them with metric='token': "
                "the tokens that a factor holds for are one span for each pair of frames"
            )
        if self.metric == "token" and self.window < 2:
            raise ValueError(
                "with metric='token' window must be at least 2 frames, so that a frame reaches "
                f"past it on one side only, got {self.window}"
            )

    def enter(self, draft: Draft) -> None:
        distance, span = draft.distance(), None
        far = distance.abs() > self.window / 2
        if self.metric == "token":
            tokens = draft.frame_tokens("metric='token'")
            # |j − i| > window · P / 2, with j − i = (t_g − t_f) · P + (p_j − p_i)
            reach, shift = self.window * tokens / 2, distance * tokens
            low = torch.where(distance > 0, (reach - shift).floor() + 1, -UNBOUNDED)
            high = torch.where(distance < 0, (-reach - shift).ceil() - 1, UNBOUNDED)
            high = torch.where(distance == 0, -UNBOUNDED, high)  # nothing of one's own frame
            far = (low <= tokens - 1) & (high >= 1 - tokens)
            span = torch.stack([low, high]).clamp(-UNBOUNDED, UNBOUNDED)
        factor = torch.ones(draft.shape, dtype=torch.float64, device="cpu")
        factor = factor.masked_fill(far, self.alpha)
        for nearest, farthest in self.bands:
            inside = (distance.abs() >= float(nearest)) & (distance.abs() <= float(farthest))
            factor = factor.masked_fill(inside, self.beta or 0.0)
        draft.multiply(factor, span)


@dataclass(frozen=True)
class Reference:
    """Multiplies the attention that all other frames pay to one frame."""

    gamma: float
    frame: int

    def __post_init__(self) -> None:
        _hold_number(self, "gamma")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        check_count(self.frame, "frame", 0)

    def enter(self, draft: Draft) -> None:
        if self.frame >= draft.key.frames:
            raise ValueError(
                f"FrameRule.reference needs frame {self.frame}, the keys have {draft.key.frames}"
            )
        paid = (draft.key_rank() == self.frame) & (draft.distance() != 0)
        draft.weigh(math.log(self.gamma) * paid.double(), by_stat=False)


@dataclass(frozen=True)
class Radial:
    """Keeps a band of places that halves whenever the distance of the frames doubles."""

    decay: float
    neighbour: float
    block: int
    sink: int

    def __post_init__(self) -> None:
        _hold_number(self, "decay", least=0)
        _hold_number(self, "neighbour", least=0)
        check_count(self.block, "block", 1)
        check_count(self.sink, "sink", 0)

    def enter(self, draft: Draft) -> None:
        tokens, distance = draft.frame_tokens("FrameRule.radial"), draft.distance().abs()
        if not torch.equal(distance, distance.round()):
            raise ValueError(
                "FrameRule.radial needs coordinates whose differences are whole numbers, got "
                f"{draft.query.coordinates[:4]}…"
            )
        sink = (draft.key_rank() < self.sink).expand(draft.shape)
        widths, kept = [], []
        for far in distance.long().flatten().tolist():
            length = 2.0 ** (tokens.bit_length() - far.bit_length())
            width = max(self.decay * length, self.block)
            if far <= 1:
                width = tokens * (self.neighbour if far else 1)
            widths.append(math.floor(width))
            kept.append(length >= self.block or far % int(self.block / length) == 0)
        width = torch.tensor(widths, dtype=torch.float64, device="cpu").view(draft.shape)
        width = width.masked_fill(sink, UNBOUNDED)
        draft.keep(torch.tensor(kept, dtype=torch.bool, device="cpu").view(draft.shape) | sink)
        draft.limit(-width, width)


@dataclass(frozen=True)
class Relay:
    """−relu(|t_f − middle_g| − w)²/2σ², of the segment that belongs to each frame of keys."""

    segments: tuple[tuple[float, float], ...]
    w: float | None
    sigma: float

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("segments must hold at least one (first, last) pair of coordinates")
        for segment in self.segments:
            for edge in segment:
                check_number(edge, "an edge of segments")
            if segment[0] > segment[1]:
                raise ValueError(f"segments must be (first, last) coordinates, got {segment}")
        if self.w is not None:
            _hold_number(self, "w", least=0)
        _hold_number(self, "sigma")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")

    def enter(self, draft: Draft) -> None:
        if len(self.segments) != draft.key.frames:
            raise ValueError(
                f"FrameRule.relay has {len(self.segments)} segments, one for each frame of keys, "
                f"the keys have {draft.key.frames}"
            )
        first, last = numbers(self.segments).T[:, draft.key_rank()]
        half = (last - first) / 2 if self.w is None else self.w
        past = (numbers(draft.query.coordinates)[:, None] - (first + last) / 2).abs() - half
        # Divided before it is squared: σ² may leave the range of floats.
        penalty = 0.5 * (past.clamp(min=0) / self.sigma).square()
        draft.weigh(-penalty.clamp(max=FLOAT32_MAX), by_stat=False)


@dataclass(frozen=True)
class Band:
    """Keeps only keys whose place in their frame is within ``width`` of the query's in its own.

    Frames up to ``beyond`` away, and the first ``sink`` frames, are not changed.
    """

    width: int
    beyond: float | None
    sink: int

    def __post_init__(self) -> None:
        check_count(self.width, "width", 0)
        if self.beyond is not None:
            _hold_number(self, "beyond", least=0)
        check_count(self.sink, "sink", 0)

    def enter(self, draft: Draft) -> None:
        whole = (draft.key_rank() < self.sink).expand(draft.shape)
        if self.beyond is not None:
            whole = whole | (draft.distance().abs() <= self.beyond)
        width = torch.full(draft.shape, float(self.width), dtype=torch.float64, device="cpu")
        width = width.masked_fill(whole, UNBOUNDED)
        draft.limit(-width, width)


@dataclass(frozen=True)
class Identity:
    """Replaces the attention map by the identity: out = V."""

    def enter(self, draft: Draft) -> None:
        raise ValueError(
            "FrameRule.identity() has no tables: frame_attention gives V in the place of attention"
        )


Term = (
    Gaussian | Table | Window | Causal | Keyframes | Horizon | Attenuate | Reference | Radial
    | Relay | Band | Identity
)  # fmt: skip


def pairs(values: Sequence[Any], name: str) -> tuple[tuple[float, float], ...]:
    """Returns pairs of numbers as terms hold them."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of pairs, got {type(values).__name__}")
    for pair in values:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} must be pairs of numbers, got {pair!r}")
    return tuple((first, second) for first, second in values)
