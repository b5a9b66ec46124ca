"""What is done to attention between frames: :class:`FrameRule`.

A rule is a sum of terms (``terms.py``), and what weighs those that a statistic weighs. For two
layouts a rule is five tables over pairs of frames, ``(F_q, F_k)`` or ``(heads, F_q, F_k)``, which
is all that a backend ever sees of it (``tables.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vstar_kernels.attention.bias import check_flag, check_strided
from vstar_kernels.attention.frames.layout import Layout, Numbers
from vstar_kernels.attention.frames.match import Beyond, matching_table
from vstar_kernels.attention.frames.tables import Draft, Tables, add_tables
from vstar_kernels.attention.frames.terms import (
    Attenuate,
    Band,
    Causal,
    Gaussian,
    Horizon,
    Identity,
    Keyframes,
    Radial,
    Reference,
    Relay,
    Table,
    Term,
    Window,
    pairs,
)
from vstar_kernels.documents import Document
from vstar_kernels.reading import require_pydantic

STATS = ("frame_max", "row_max", "none")


@dataclass(frozen=True, eq=False)  # tensors of a statistic have no truth value
class FrameRule(Document):
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
        if not isinstance(self.terms, tuple):
            raise TypeError(f"terms must be a tuple of terms, got {type(self.terms).__name__}")
        for term in self.terms:
            if not isinstance(term, get_args(Term)):
                raise TypeError(f"terms must be those of rules.Term, got {type(term).__name__}")
        if self.is_identity and len(self.terms) > 1:
            raise ValueError(
                "FrameRule.identity() leaves no attention that a rule could be added to"
            )
        if isinstance(self.stat, Tensor):
            check_strided(self.stat, "a stat tensor")
            if self.stat.dtype != torch.float32:
                raise ValueError(f"a stat tensor must be float32, got {self.stat.dtype}")
        elif not isinstance(self.stat, str):
            raise TypeError(f"stat must be a string or a tensor, got {type(self.stat).__name__}")
        elif self.stat not in STATS:
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
                Without a statistic −inf masks. It is copied, unless a gradient follows it, and
                counts in float32.
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
    def band(cls, width: int, beyond: float | None = None, sink: int = 0) -> FrameRule:
        """Returns a mask that keeps keys with |p_j − p_i| ≤ width, p the place within the frame.

        This is what the temporal heads of Sparse VideoGen keep (arXiv 2502.01776). With ``beyond``
        and a window it is one of tiers, as in FreeLOC (arXiv 2603.25209): near frames are seen
        whole, those farther away in a band.

        Args:
            width: How far apart the places may be.
            beyond: Frames with |t_g − t_f| ≤ beyond are seen whole; None: none are.
            sink: How many of the first frames are seen whole.
        """
        return cls((Band(width, beyond, sink),))

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
    def horizon(cls, frames: int, queries: int = 1) -> FrameRule:
        """Returns a mask that shows the first ``queries`` frames the first ``frames`` alone.

        UltraViCo (arXiv 2511.20123) hides so from the first frame what lies past the model's length
        in training, 21 for Wan; its rule is ``attenuate(0.9, 21, metric="token") + horizon(21)``.

        Args:
            frames: How many frames of keys are seen, at least 1.
            queries: How many frames of queries see no more than them; all others see all.
        """
        return cls((Horizon(frames, queries),))

    @classmethod
    def match(
        cls, native_map: Tensor, long_map: Tensor, *, clip: float = 4.0, beyond: Beyond = "clip"
    ) -> FrameRule:
        """Returns the bias that gives a long clip the frame profile of the model's trained length.

        The profile of a map is its mean attention at each distance d of two frames. The bias b[d]
        starts as log(target[d] / profile_long[d]), where the target's rows are the native profile
        over the long clip's frames, normalized, and is corrected until ``long_map``, its rows
        weighed by exp(b), has the target's profile. It holds for clips of as many frames, by their
        numbers. Tokens of one frame differ, and later layers see what earlier ones made, so it can
        be iterated, each map captured under the rule so far: ``rule += FrameRule.match(native_map,
        long_map)``.

        Args:
            native_map: The map at the trained length, of :func:`vstar_kernels.frame_attention` or
                :func:`vstar_kernels.capture_maps`: ``(F, F)``, ``(batch, F, F)`` or ``(batch,
                heads, F, F)``, which gives each head a bias of its own; with a column more where
                there is text, whose share of the attention is matched too.
            long_map: The map of the long clip, of as many dimensions.
            clip: The largest |b|, at least 0.
            beyond: What holds where frames are farther apart than any of the native map:
                ``"clip"``: −clip; ``"hold"``: the profile's last value; ``"mask"``: −inf.
        """
        return cls.bias(matching_table(native_map, long_map, clip=clip, beyond=beyond))

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

    @property
    def is_trained(self) -> bool:
        """Whether a gradient follows a bias of it, by autograd or a transform of torch.func."""
        return any(map(_is_trained, self.terms))

    def __add__(self, other: FrameRule) -> FrameRule:
        if not isinstance(other, FrameRule):
            return NotImplemented
        terms = self.terms + other.terms
        if _is_none(other.stat):
            return FrameRule(terms, stat=self.stat, clamp_negative=self.clamp_negative)
        same = self._has_stat_of(other) and self.clamp_negative == other.clamp_negative
        if not same and not _is_none(self.stat):
            raise ValueError(
                "two rules can be added where their statistic is the same, got "
                f"{self._shown_stat()} and {other._shown_stat()}"
            )
        return FrameRule(terms, stat=other.stat, clamp_negative=other.clamp_negative)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameRule):
            return NotImplemented
        same = self.terms == other.terms and self.clamp_negative == other.clamp_negative
        return same and self._has_stat_of(other)

    def __hash__(self) -> int:
        return hash((self.terms, self.stat, self.clamp_negative))

    def _has_stat_of(self, other: FrameRule) -> bool:
        """Returns whether the statistics are the same; tensors are where they are one tensor."""
        return self.stat is other.stat or (isinstance(self.stat, str) and self.stat == other.stat)

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
            values = term.weighted(term.fitting((layout.frames, key_layout.frames)).float())
            if term.by_stat:
                delta = add_tables(delta, values)
            else:
                offset = add_tables(offset, values)
        return Tables(delta, offset, fixed.factor, fixed.factor_span, fixed.band)


def _is_trained(term: Term) -> bool:
    return isinstance(term, Table) and term.trained


@functools.lru_cache(maxsize=64)
def _numbers_of(terms: tuple[Term, ...], query: Layout, key: Layout) -> tuple[Numbers | None, ...]:
    with _disable_current_modes():
        draft = Draft(query, key)
        for term in terms:
            term.enter(draft)
        return tuple(None if x is None else Numbers.of(x) for x in draft.tables())


def _is_none(stat: str | Tensor) -> bool:
    return isinstance(stat, str) and stat == "none"
