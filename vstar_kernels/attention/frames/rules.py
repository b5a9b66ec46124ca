"""What is done to attention between frames: :class:`FrameRule`, its terms and the tables they make.

A rule is a sum of terms, each a small frozen dataclass that knows one thing, and what weighs those
that a statistic weighs. For two layouts a rule is five tables over pairs of frames, ``(F_q, F_k)``
or ``(heads, F_q, F_k)``, which is all that a backend ever sees of it (:class:`Tables`).

Distances are between the frames' coordinates; "the first frames" are those with the smallest ones.
So a rule means the same wherever a frame's tokens lie in the sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.attention.frames.layout import (
    Layout,
    Numbers,
    check_count,
    check_number,
)
from vstar_kernels.reading import require_pydantic

STATS = ("frame_max", "row_max", "none")
METRICS = ("frame", "token")
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


class _Draft:
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
        return _numbers(self.key.coordinates) - _numbers(self.query.coordinates)[:, None]

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
            self.delta = values if self.delta is None else self.delta + values
        else:
            self.offset = values if self.offset is None else self.offset + values

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
            *(None if x is None else x.float().contiguous() for x in (delta, offset, factor)),
            *(None if x is None else x.int().contiguous() for x in (span, band)),
        )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


# ---- terms: each enters one thing into the tables ----


@dataclass(frozen=True)
class Gaussian:
    """strength · exp(−(t_g − t_f)²/2σ²), as VSTAR's Δ (arXiv 2403.13501, eq. 2)."""

    sigma: float
    strength: float
    by_stat: bool

    def __post_init__(self) -> None:
        check_number(self.sigma, "sigma", least=0)
        check_number(self.strength, "strength")

    def enter(self, draft: _Draft) -> None:
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
        if table.ndim not in (2, 3):
            raise ValueError(
                "table must have shape (F_q, F_k) or (heads, F_q, F_k), frames of queries by "
                f"frames of keys, got {tuple(table.shape)}"
            )
        if not table.is_floating_point():
            raise ValueError(f"table must be floating point, got {table.dtype}")
        check_number(self.strength, "strength")
        if not table.requires_grad:  # so that nobody changes what a cache was made of
            object.__setattr__(self, "table", table.detach().to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "_hash", self._make_hash())
        if self.table.requires_grad:  # its values change
            return
        values = self.table
        allowed = "finite" if self.by_stat else "finite, or -inf to mask"
        bad = ~values.isfinite() if self.by_stat else values.isnan() | (values == math.inf)
        if bool(bad.any()):
            raise ValueError(f"table must be {allowed}, got {values[bad][0].item()}")

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

    def enter(self, draft: _Draft) -> None:
        table = self.fitting(draft.shape).double()
        if self.strength == 0:
            table = table.masked_fill(table == -math.inf, 0.0)
        draft.weigh(self.strength * table, self.by_stat)

    def _make_hash(self) -> int:
        if self.table.requires_grad:
            return hash((id(self.table), self.strength, self.by_stat))
        return hash((tuple(self.table.flatten().tolist()), self.strength, self.by_stat))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Table) or hash(self) != hash(other):
            return False
        if self.table.requires_grad or other.table.requires_grad:
            return self.table is other.table
        same = (self.strength, self.by_stat) == (other.strength, other.by_stat)
        return same and torch.equal(self.table, other.table)

    def __hash__(self) -> int:
        found: int = self._hash  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Window:
    """Keeps the frames of keys within w of the query's, and the first ``sink`` frames."""

    w: float
    sink: int

    def __post_init__(self) -> None:
        check_number(self.w, "w", least=0)
        check_count(self.sink, "sink", 0)

    def enter(self, draft: _Draft) -> None:
        draft.keep((draft.distance().abs() <= self.w) | (draft.key_rank() < self.sink))


@dataclass(frozen=True)
class Causal:
    """Keeps the frames of keys whose block of frames is not after the query's."""

    block: int

    def __post_init__(self) -> None:
        check_count(self.block, "block", 1)

    def enter(self, draft: _Draft) -> None:
        of_query = _numbers(draft.query.coordinates).div(self.block).floor()
        of_key = _numbers(draft.key.coordinates).div(self.block).floor()
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
        check_number(self.w, "w", least=0)

    def enter(self, draft: _Draft) -> None:
        rank, count = draft.key_rank(), draft.key.frames
        grid = torch.arange(-(-count // self.interval), device="cpu") * self.interval + self.offset
        anchors = (rank < self.first) | torch.isin(rank, grid % max(count, 1))
        draft.keep((draft.distance().abs() <= self.w) | anchors)


@dataclass(frozen=True)
class Attenuate:
    """Multiplies positive logits of keys far from the query."""

    alpha: float
    window: float
    bands: tuple[tuple[float, float], ...]
    beta: float | None
    metric: str

    def __post_init__(self) -> None:
        check_number(self.alpha, "alpha", least=0)
        check_number(self.window, "window", least=0)
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
            check_number(self.beta, "beta", least=0)
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

    def enter(self, draft: _Draft) -> None:
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
            inside = (distance.abs() >= nearest) & (distance.abs() <= farthest)
            factor = factor.masked_fill(inside, self.beta or 0.0)
        draft.multiply(factor, span)


@dataclass(frozen=True)
class Reference:
    """Multiplies the attention that all other frames pay to one frame."""

    gamma: float
    frame: int

    def __post_init__(self) -> None:
        check_number(self.gamma, "gamma")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        check_count(self.frame, "frame", 0)

    def enter(self, draft: _Draft) -> None:
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
        check_number(self.decay, "decay", least=0)
        check_number(self.neighbour, "neighbour", least=0)
        check_count(self.block, "block", 1)
        check_count(self.sink, "sink", 0)

    def enter(self, draft: _Draft) -> None:
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
            check_number(self.w, "w", least=0)
        check_number(self.sigma, "sigma")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")

    def enter(self, draft: _Draft) -> None:
        if len(self.segments) != draft.key.frames:
            raise ValueError(
                f"FrameRule.relay has {len(self.segments)} segments, one for each frame of keys, "
                f"the keys have {draft.key.frames}"
            )
        first, last = _numbers(self.segments).T[:, draft.key_rank()]  # type: ignore[arg-type]
        half = (last - first) / 2 if self.w is None else self.w
        past = (_numbers(draft.query.coordinates)[:, None] - (first + last) / 2).abs() - half
        draft.weigh(-past.clamp(min=0).square() / (2 * self.sigma**2), by_stat=False)


@dataclass(frozen=True)
class Band:
    """Keeps only keys whose place in their frame is within ``width`` of the query's in its own."""

    width: int

    def __post_init__(self) -> None:
        check_count(self.width, "width", 0)

    def enter(self, draft: _Draft) -> None:
        width = torch.full(draft.shape, float(self.width), dtype=torch.float64, device="cpu")
        draft.limit(-width, width)


@dataclass(frozen=True)
class Identity:
    """Replaces the attention map by the identity: out = V."""

    def enter(self, draft: _Draft) -> None:
        raise AssertionError("frame_attention resolves the identity before there are tables")


Term = (
    Gaussian | Table | Window | Causal | Keyframes | Attenuate | Reference | Radial | Relay | Band
    | Identity
)  # fmt: skip


@dataclass(frozen=True)
class FrameRule:
    """What is done to the attention between frames; ``FrameRule()`` changes nothing.

    Rules are made by the functions below and joined by ``+``: biases add, masks are all obeyed,
    factors multiply. Tokens of text are never changed, neither as queries nor as keys.

    ``stat`` is the statistic of a row that a bias may be weighed by, over the video's visible keys:

    - ``"frame_max"``: the largest log-mean-exp of the logits of one frame of keys, which is
      VSTAR's row maximum where a logit is one between frames;
    - ``"row_max"``: the largest logit;
    - ``"none"``: 1, an ordinary bias;
    - a float32 tensor ``(batch, tokens, heads)`` in units of the scaled logits.

    ``clamp_negative`` uses max(stat, 0), so that a negative statistic does not invert the bias.
    """

    # No default that an instance without terms of its own, as torch.compile makes them, would show.
    terms: tuple[Term, ...] = field(default_factory=tuple)
    stat: str | Tensor = field(default="none", kw_only=True)
    clamp_negative: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for term in self.terms:
            if not isinstance(term, get_args(Term)):
                raise TypeError(f"terms must be those of rules.Term, got {type(term).__name__}")
        if self.is_identity and len(self.terms) > 1:
            raise ValueError(
                "FrameRule.identity() leaves no attention that a rule could be added to"
            )
        if isinstance(self.stat, Tensor):
            if self.stat.dtype != torch.float32:
                raise ValueError(f"a stat tensor must be float32, got {self.stat.dtype}")
        elif not isinstance(self.stat, str) or self.stat not in STATS:
            raise ValueError(
                f"stat must be one of {', '.join(map(repr, STATS))} or a tensor, got {self.stat!r}"
            )
        check_flag(self.clamp_negative, "clamp_negative")

    @classmethod
    def tar(
        cls,
        sigma: float,
        strength: float = 1.0,
        stat: str | Tensor = "frame_max",
        clamp_negative: bool = False,
    ) -> FrameRule:
        """Returns VSTAR's regularization (arXiv 2403.13501, eq. 2 and 3) between frames of tokens.

        Adds strength · stat · exp(−(t_g − t_f)²/2σ²).

        Args:
            sigma: σ ≥ 0, in the unit of the layout's coordinates; 0 biases a frame to itself alone.
            strength: Factor on it.
            stat, clamp_negative: See the class.
        """
        term = Gaussian(sigma, strength, by_stat=not _is_none(stat))
        return cls((term,), stat=stat, clamp_negative=clamp_negative)

    @classmethod
    def bias(
        cls,
        table: Tensor,
        strength: float = 1.0,
        stat: str | Tensor = "none",
        clamp_negative: bool = False,
    ) -> FrameRule:
        """Returns a bias of any values: adds strength · stat · table[f, g].

        With a statistic and the similarity of a reference video's frames as the table it is VSTAR's
        transfer of dynamics (arXiv 2403.13501, Fig. 8).

        Args:
            table: ``(F_q, F_k)`` or ``(heads, F_q, F_k)`` by the frames' numbers, floating point.
                Without a statistic −inf masks. It is copied, unless it requires a gradient.
            strength: Factor on it.
            stat, clamp_negative: See the class.
        """
        term = Table(table, strength, by_stat=not _is_none(stat))
        return cls((term,), stat=stat, clamp_negative=clamp_negative)

    @classmethod
    def window(cls, w: float, sink: int = 0) -> FrameRule:
        """Returns a mask that keeps frames with |t_g − t_f| ≤ w and the first ``sink`` frames.

        Frame-wise windows are those of LongLive and, with a sink, of StreamingLLM (arXiv
        2309.17453).
        """
        return cls((Window(w, sink),))

    @classmethod
    def band(cls, width: int) -> FrameRule:
        """Returns a mask that keeps keys with |p_j − p_i| ≤ width, p the place within the frame.

        This is what the temporal heads of Sparse VideoGen keep (arXiv 2502.01776).
        """
        return cls((Band(width),))

    @classmethod
    def causal(cls, block: int = 1) -> FrameRule:
        """Returns a mask that keeps a query's block of frames and those before it.

        A frame's block is ⌊t / block⌋. SkyReels-V2's autoregressive models and AnyFlow attend so.
        """
        return cls((Causal(block),))

    @classmethod
    def keyframes(cls, first: int, interval: int, offset: int = 0, w: float = 0) -> FrameRule:
        """Returns the mask of LVSA (arXiv 2605.31057): anchors for all frames, and a window.

        A frame sees the ``first`` frames, the frames (offset + i · interval) mod F_k for i below
        ⌈F_k / interval⌉, which rotate as ``offset`` goes up by one in each step, and those within
        w of it.
        """
        return cls((Keyframes(first, interval, offset, w),))

    @classmethod
    def attenuate(
        cls,
        alpha: float,
        window: float,
        bands: Sequence[tuple[float, float]] = (),
        beta: float | None = None,
        metric: str = "frame",
    ) -> FrameRule:
        """Returns UltraViCo's decay (arXiv 2511.20123): positive logits of far keys times alpha.

        Args:
            alpha: The factor, at least 0; 0.9 for Wan.
            window: W, the width in frames of what is near: the model's length in training, 21 for
                Wan. Keys are far from W/2 on.
            bands: Distances ``(nearest, farthest)`` in frames, both included, where the factor is
                ``beta`` instead.
            metric: ``"frame"``: far is |t_g − t_f| > W/2. ``"token"``: far is |j − i| > W · P / 2
                with j − i = (t_g − t_f) · P + p_j − p_i, as the published kernel counts it; all
                frames then have P tokens.
        """
        return cls((Attenuate(alpha, window, pairs(bands, "bands"), beta, metric),))

    @classmethod
    def reference(cls, gamma: float, frame: int = 0) -> FrameRule:
        """Returns a bias that multiplies the attention paid to one frame by gamma, as DyMoS does.

        All other frames add log gamma to their logits with it (arXiv 2605.19398); below 1 it frees
        motion from a conditioning image.

        Args:
            gamma: The factor, above 0.
            frame: Which frame of keys, counted in the order of time.
        """
        return cls((Reference(gamma, frame),))

    @classmethod
    def radial(
        cls, decay: float = 1.0, neighbour: float = 1.0, block: int = 128, sink: int = 1
    ) -> FrameRule:
        """Returns the mask of Radial Attention (arXiv 2506.19852), token by token.

        With P tokens a frame, n = |t_g − t_f| and bits(x) the number of x's binary digits, a pair
        of frames has the length 2^(bits(P) − bits(n)). It keeps |p_j − p_i| ≤ max(decay · length,
        block); and where its length is below ``block``, it is kept only if n is a multiple of
        ⌊block / length⌋. The published code then rounds to blocks of 128 × 128 tokens.

        Args:
            decay: Factor on the width from n = 2 on.
            neighbour: The share of P that is the width at n = 1: 1 for Hunyuan, 0.5 for Wan.
            block: The narrowest width.
            sink: How many of the first frames all see whole.
        """
        return cls((Radial(decay, neighbour, block, sink),))

    @classmethod
    def relay(
        cls, segments: Sequence[tuple[float, float]], w: float | None, sigma: float
    ) -> FrameRule:
        """Returns Prompt Relay's penalty (arXiv 2604.10030): a prompt for each segment of a video.

        For cross-attention, where each prompt's tokens are a "frame" of ``key_layout``: adds
        −max(|t_f − m| − w, 0)²/2σ², m the middle of the prompt's segment.

        Args:
            segments: The coordinates ``(first, last)`` of each prompt's segment, in the order of
                the prompts' coordinates in ``key_layout``.
            w: Half the width that costs nothing; None: half of each segment.
            sigma: σ > 0 of the decay beyond it. A penalty of ε at a distance of d past w is σ =
                d / √(−2 ln ε).
        """
        return cls((Relay(pairs(segments, "segments"), w, sigma),))

    @classmethod
    def identity(cls) -> FrameRule:
        """Returns the rule that replaces attention by the identity, out = V, for all tokens.

        It is what spatiotemporal skip guidance (STG) does, and VSTAR's Fig. 4. Nothing can be added
        to it.
        """
        return cls((Identity(),))

    @property
    def is_identity(self) -> bool:
        """Whether the rule is :meth:`identity`."""
        return any(isinstance(term, Identity) for term in self.terms)

    def __add__(self, other: FrameRule) -> FrameRule:
        if not isinstance(other, FrameRule):
            return NotImplemented
        terms = self.terms + other.terms
        if _is_none(other.stat):
            return FrameRule(terms, stat=self.stat, clamp_negative=self.clamp_negative)
        if not _is_none(self.stat):
            same = self.stat is other.stat or (
                isinstance(self.stat, str) and self.stat == other.stat
            )
            if not same or self.clamp_negative != other.clamp_negative:
                raise ValueError(
                    "two rules can be added where their statistic is the same, got "
                    f"{self._shown_stat()} and {other._shown_stat()}"
                )
        return FrameRule(terms, stat=other.stat, clamp_negative=other.clamp_negative)

    def _shown_stat(self) -> str:
        stat = "a tensor" if isinstance(self.stat, Tensor) else repr(self.stat)
        return stat + (" with clamp_negative" if self.clamp_negative else "")

    def to_json(self) -> str:
        """Returns the rule as JSON; −inf in a table is null.

        A bias that requires a gradient is written, and read again, as the numbers that it has now.

        Raises:
            ValueError: Its statistic is a tensor.
            ImportError: ``pydantic`` is not installed.
        """
        require_pydantic()
        from vstar_kernels.attention.frames import rule_json

        text = rule_json.write(self)
        self.from_json(text)  # what cannot be read is not to be written
        return text

    @classmethod
    def from_json(cls, text: str) -> FrameRule:
        """Returns the rule that :meth:`to_json` wrote.

        Raises:
            ValueError: It is not JSON, or not a rule; the message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        require_pydantic()
        from vstar_kernels.attention.frames import rule_json

        return rule_json.read(text)

    def tables(self, layout: Layout, key_layout: Layout | None = None) -> Tables:
        """Returns the rule's tables for frames of queries and of keys, on the CPU.

        Their numbers are kept from call to call, but those of a bias that requires a gradient.

        Raises:
            ValueError: The rule does not fit the layouts.
        """
        key_layout = layout if key_layout is None else key_layout
        return self.with_trained(self.fixed_tables(layout, key_layout), layout, key_layout)

    def fixed_tables(self, layout: Layout, key_layout: Layout) -> Tables:
        """Returns :meth:`tables` without the biases that require a gradient."""
        fixed = tuple(term for term in self.terms if not _is_trained(term))
        kept = _numbers_of(fixed, layout, key_layout)
        return Tables(*(None if x is None else x.tensor() for x in kept))

    def with_trained(self, fixed: Tables, layout: Layout, key_layout: Layout) -> Tables:
        """Returns :meth:`tables` for the fixed ones, by operators that autograd sees."""
        delta, offset = fixed.delta, fixed.offset
        for term in self.terms:
            if not isinstance(term, Table) or not _is_trained(term):
                continue
            values = term.strength * term.fitting((layout.frames, key_layout.frames)).float()
            if term.by_stat:
                delta = values if delta is None else delta + values
            else:
                offset = values if offset is None else offset + values
        return Tables(delta, offset, fixed.factor, fixed.factor_span, fixed.band)


def _is_trained(term: Term) -> bool:
    return isinstance(term, Table) and term.table.requires_grad


@functools.lru_cache(maxsize=64)
def _numbers_of(terms: tuple[Term, ...], query: Layout, key: Layout) -> tuple[Numbers | None, ...]:
    with _disable_current_modes():
        draft = _Draft(query, key)
        for term in terms:
            term.enter(draft)
        return tuple(None if x is None else Numbers.of(x) for x in draft.tables())


def _is_none(stat: str | Tensor) -> bool:
    return isinstance(stat, str) and stat == "none"


def pairs(values: Sequence[Any], name: str) -> tuple[tuple[float, float], ...]:
    """Returns pairs of numbers as terms hold them."""
    for pair in values:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} must be pairs of numbers, got {pair!r}")
    return tuple((first, second) for first, second in values)
