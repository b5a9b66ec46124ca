"""What each tile of rows sees: slots of key frames of equal weights, and their ranges of keys.

All of it is made on the host, from the layout's runs and the rule's tables, once for each content
of those. A tile is ``rows`` consecutive tokens. Its *slots* are sets of key frames that have equal
weights in every row of it, so that a window of 2w + 1 frames around a tile within one frame is
w + 1 slots, and all frames beyond it one. Frames that no row of the tile sees have no slot.
A slot's *ranges* are its keys: neighbouring frames are one range, unless sums by frame are wanted,
or places within the frame matter.

Where frames are interleaved in short runs, as those of a grid of images are, tiles and ranges go
through the tokens in another order: frame by frame. Then each frame is one range again.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.triton import configs, plan
from vstar_kernels.attention.triton.plan import Device, Head, Strides

if TYPE_CHECKING:
    from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameOptions

TEXT = -1  # the frame of what belongs to none
SMALLEST_SCALE = 1e-30  # negligible, and still possible to divide by
INTERLEAVED = 1.25  # how many times the blocks may be that the same frames would fill in order
BLOCK = 64  # tokens of such a block
# Of a weight of the statistic, as the statistic's share of it: below what its type resolves.
NEGLIGIBLE = {torch.float32: 2.0**-26, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}

Run = tuple[int, int, int, int]  # start, end, frame, place of its first token within the frame
Range = tuple[int, int, int, int]  # start, end, place − key, the frame that it ends or −1


class Rule(NamedTuple):
    """The constants of a call: which of the tables there are, and how keys are found."""

    STAT: str
    CLAMP: bool
    DELTA: bool
    OFFSET: bool
    FACTOR: bool
    SPAN: bool
    BAND: bool
    LENGTHS: bool
    ORDERED: bool  # rows and keys are found through row_order and key_order


class Contents(NamedTuple):
    """A tensor by its contents, so that it is the key of what is made of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor | None) -> Contents | None:
        """Returns the contents of a contiguous CPU tensor."""
        if tensor is None:
            return None
        data = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return cls(tuple(tensor.shape), tensor.dtype, data)

    def tensor(self) -> Tensor:
        """Returns the tensor again."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


class Tables(NamedTuple):
    """The layout and the rule of a call by their contents, as ``FrameCall`` names them."""

    query_runs: Contents
    key_runs: Contents
    delta: Contents | None = None
    offset: Contents | None = None
    factor: Contents | None = None
    factor_span: Contents | None = None
    band: Contents | None = None


class FramesKey(NamedTuple):
    """All that the plan of a call depends on, by which it is found again."""

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    batch: int
    tokens: int
    keys: int
    heads: int
    key_heads: int
    head_dim: int
    frames: int
    key_frames: int
    options: FrameOptions
    tables: Tables
    lengths: bool
    query: Strides  # of (batch, tokens, heads), in elements, like all that follow
    key: Strides
    value: Strides
    out: Strides
    stat: Strides = ()
    save: bool = False  # for the backward pass
    # Backward only:
    grad_out: Strides = ()
    grad_query: Strides = ()
    grad_key: Strides = ()
    grad_value: Strides = ()
    grad_map: bool = False

    @property
    def kind(self) -> str:
        """How products are computed, one of ``configs.KINDS``."""
        return plan.product_kind(self.dtype, ieee=self.ieee)

    @property
    def has_map(self) -> bool:
        """Whether the map is wanted."""
        return self.options.mean_map != "none"

    def statistic(self, rule: RuleTables) -> str:
        """Returns the statistic that is needed."""
        return self.options.stat if rule.delta is not None else "none"

    @property
    def ordered(self) -> bool:
        """Whether kernels go through the tokens frame by frame."""
        return any(interleaved(x.tensor().tolist()) for x in self.tables[:2])

    def table(self, kernel: str, rule: RuleTables) -> str:
        """Returns the table of configurations for "forward", "grad_query" or "grad_key".

        Biases and masks by frames leave a kernel more registers than factors, bands and orders of
        tokens do; with those, statistics of the logits and maps take the most.
        """
        plain = rule.factor is None and rule.band is None and not self.ordered
        if kernel != "forward":
            return kernel if plain and not self.grad_map else f"{kernel}_full"
        if plain:
            return kernel
        known = self.statistic(rule) in ("none", "tensor")
        return "forward_masked" if known and not self.has_map else "forward_full"

    def rule_tables(self) -> RuleTables:
        """Returns the rule's tables."""
        sizes = {"frames": self.frames, "key_frames": self.key_frames}
        return rule_tables(self.tables, **sizes, dtype=self.dtype)

    def head(self) -> Head:
        """Returns the constants of the heads, and of how tensors of them are read."""
        import triton.language as tl

        main, rest = configs.split(self.head_dim)
        return Head(
            HEAD_DIM=self.head_dim,
            MAIN=main,
            REST=rest,
            UNIT=self._unit(),
            OFFSET=tl.int64 if self._largest_offset() > plan.INT32_MAX else tl.int32,
            EVEN=False,
            NEGATIVE=self.options.scale < 0,
            PRECISION="tf32" if self.kind == "tf32" else "ieee",
        )

    def in_units(self, strides: Strides) -> Strides:
        """Returns strides in units, as kernels take them."""
        return tuple(stride // self._unit() for stride in strides)

    def _unit(self) -> int:
        """Returns the largest number of a vector's elements that divides every stride."""
        longest = plan.VECTOR_BYTES // self.dtype.itemsize
        of_rows = (*self.query, *self.out, *self.grad_out, *self.grad_query)
        return math.gcd(longest, *of_rows, *self.key, *self.value, *self.grad_key, *self.grad_value)

    def _largest_offset(self) -> int:
        """Returns the offset of the last head of the tensor that reaches furthest, and beyond."""
        of_rows = (self.query, self.out, self.stat, self.grad_out, self.grad_query)
        of_keys = (self.key, self.value, self.grad_key, self.grad_value)
        reaches = [
            sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
            for sizes, tensors in (
                ((self.batch, self.tokens, self.heads), of_rows),
                ((self.batch, self.keys, self.key_heads), of_keys),
            )
            for strides in tensors
        ]
        return max(reaches) + self.head_dim


def frames_key(call: FrameCall, out: Tensor, *, save: bool = False) -> FramesKey:
    """Returns the key of a forward pass."""
    return FramesKey(
        device=plan.device_of(call.device),
        dtype=call.dtype,
        ieee=plan.ieee_products(),
        batch=call.batch,
        tokens=call.tokens,
        keys=call.keys,
        heads=call.heads,
        key_heads=call.key_heads,
        head_dim=call.head_dim,
        frames=call.frames,
        key_frames=call.key_frames,
        options=call.options,
        tables=Tables._make(Contents.of(getattr(call, name)) for name in Tables._fields),
        lengths=call.key_lengths is not None,
        query=_strides(call.query),
        key=_strides(call.key),
        value=_strides(call.value),
        out=_strides(out),
        stat=() if call.stat is None else _strides(call.stat),
        save=save,
    )


def backward_key(
    call: FrameCall,
    out: Tensor,
    grad_out: Tensor,
    grad_map: Tensor | None,
    gradients: FrameGradients,
) -> FramesKey:
    """Returns the key of a backward pass, which fills these ``gradients``."""
    return frames_key(call, out)._replace(
        grad_out=_strides(grad_out),
        grad_query=_strides(gradients.query),
        grad_key=_strides(gradients.key),
        grad_value=_strides(gradients.value),
        grad_map=grad_map is not None,
    )


def saved(stat: str) -> tuple[str, ...]:
    """Returns the names of what the forward pass saves of each row."""
    return {
        "row_max": ("lse", "row_stat"),
        "frame_max": ("lse", "row_stat", "stat_frame", "stat_lse"),
    }.get(stat, ("lse",))


def frame_weights(key: FramesKey) -> Tensor:
    """Returns the weight in the map of a row of each query frame, ``(frames,)``."""
    tokens = torch.zeros(key.frames, dtype=torch.float32, device="cpu")
    for start, end, frame, _ in key.tables.query_runs.tensor().tolist():
        if frame != TEXT:
            tokens[frame] += end - start
    return 1 / (tokens * (1 if key.options.mean_map == "heads" else key.heads))


def constants(key: FramesKey, rule: RuleTables, made: TileTables) -> Rule:
    """Returns the constants of a call's kernels."""
    return Rule(
        STAT=key.statistic(rule),
        CLAMP=key.options.clamp_negative,
        DELTA=rule.delta is not None,
        OFFSET=rule.offset is not None,
        FACTOR=rule.factor is not None,
        SPAN=rule.span is not None,
        BAND=rule.band is not None,
        LENGTHS=key.lengths,
        ORDERED=made.row_order is not None,
    )


def named_tables(rule: RuleTables, made: TileTables) -> dict[str, Tensor]:
    """Returns the tables that kernels read, by their names there."""
    places = rule.band is not None or rule.span is not None
    found = {
        "delta": rule.delta,
        "offset": rule.offset,
        "factor": rule.factor,
        "span": rule.span,
        "band": rule.band,
        "row_frame": made.row_frame,
        "row_place": made.row_place if places else None,
        "row_order": made.row_order,
        "key_order": made.key_order,
        "tiles": made.tiles,
        "slots": made.slots,
        "ranges": made.ranges,
    }
    return {name: x for name, x in found.items() if x is not None}


def _strides(tensor: Tensor) -> Strides:
    """Returns strides of (batch, tokens, heads); 0 for sizes of 1, where any would do."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in pairs)


@dataclass(frozen=True)
class RuleTables:
    """The rule's tables as kernels read them, for one Δ of all heads or one of each."""

    frames: int
    key_frames: int
    per_head: bool
    delta: Tensor | None  # ([heads,] frames, key frames), like offset
    offset: Tensor | None  # in units of log 2
    factor: Tensor | None  # (2, [heads,] frames, key frames)
    span: Tensor | None  # (2, frames, key frames), like band
    band: Tensor | None

    @property
    def heads(self) -> int:
        """How many different rules there are."""
        tables = (self.delta, self.offset, self.factor)
        return next((x.shape[-3] for x in tables if x is not None and self.per_head), 1)

    def transposed(self) -> RuleTables:
        """Returns the tables of keys that attend to queries."""
        delta, offset, factor = (
            None if x is None else x.mT.contiguous() for x in (self.delta, self.offset, self.factor)
        )
        span, band = (
            None if x is None else -x.mT.flip(0).contiguous() for x in (self.span, self.band)
        )
        return replace(
            self,
            frames=self.key_frames,
            key_frames=self.frames,
            delta=delta,
            offset=offset,
            factor=factor,
            span=span,
            band=band,
        )


@dataclass(frozen=True)
class TileTables:
    """The tables of slots and ranges, as :class:`frames_forward.Tensors` says, and their sizes."""

    row_frame: Tensor
    row_place: Tensor
    row_order: Tensor | None
    key_order: Tensor | None
    tiles: Tensor
    slots: Tensor
    ranges: Tensor
    entries: Tensor
    entry_frame: Tensor
    most_slots: int  # of a tile
    frame_first: Tensor  # (frames + 1,): where each query frame's entries begin in frame_entries
    frame_entries: Tensor  # the entries by query frame


def rule_tables(tables: Tables, *, frames: int, key_frames: int, dtype: torch.dtype) -> RuleTables:
    """Returns the tables of a rule; what is neutral everywhere is left out."""
    delta, offset, factor, span, band = (x and x.tensor() for x in tables[2:])
    if delta is not None:
        delta = torch.where(delta.abs() < NEGLIGIBLE[dtype], 0.0, delta)
        delta = delta if delta.any() else None
    if offset is not None:
        offset = offset / math.log(2.0) if offset.any() else None
    if factor is not None and (factor == 1).all():
        factor = None
    span = None if factor is None else span
    sizes = {x.shape[-3] for x in (delta, offset) if x is not None and x.ndim == 3}
    sizes |= {factor.shape[1]} if factor is not None and factor.ndim == 4 else set()
    if sizes:  # then all are by head
        (heads,) = sizes
        shape = (heads, frames, key_frames)
        delta = delta if delta is None else delta.expand(shape).contiguous()
        offset = offset if offset is None else offset.expand(shape).contiguous()
        if factor is not None:
            factor = factor.unsqueeze(1) if factor.ndim == 3 else factor
            factor = factor.expand(2, *shape).contiguous()
    return RuleTables(frames, key_frames, bool(sizes), delta, offset, factor, span, band)


def tile_tables(
    query_runs: Sequence[Run],
    key_runs: Sequence[Run],
    rule: RuleTables,
    *,
    rows: int,
    ordered: bool,
    by_frame: bool = False,
    alone: bool = False,
) -> TileTables:
    """Returns the slots and ranges of every tile of ``rows`` rows.

    ``by_frame`` keeps each key frame's ranges together and says where they end; with ``alone``
    every key frame has a slot of its own.
    """
    row_order, row_runs = in_order(query_runs) if ordered else (None, list(query_runs))
    key_order, runs = in_order(key_runs) if ordered else (None, list(key_runs))
    row_frame = _of_rows([(end - start, frame, 0) for start, end, frame, _ in row_runs])
    row_place = _of_rows([(end - start, place, 1) for start, end, _, place in row_runs])
    key_ranges = _KeyRanges(runs, rule, by_frame=by_frame)

    made = _Lists()
    sets = [_rows_of_frames(row_runs, start, rows) for start in _starts(row_runs, rows)]
    tiles = torch.empty(rule.heads, len(sets), 2, dtype=torch.int32, device="cpu")
    like: dict[Contents | None, int] = {}  # the first head of each rule
    for head in range(rule.heads):
        groups = _SlotFrames(rule, head, alone=alone)
        first = like.setdefault(Contents.of(groups.weights), head)
        if first < head:
            tiles[head] = tiles[first]
            continue
        for n, places in enumerate(sets):
            slots = [
                (frames[0], ranges)
                for frames in groups.of(tuple(places))
                if (ranges := key_ranges.of(tuple(frames), places, head))
            ]
            tiles[head, n] = _int32(made.add(tuple(slots)))
    entries = [[frame for frame in places if frame != TEXT] for places in sets]
    bounds = [0, *itertools.accumulate(map(len, entries))]
    entry_frame = [frame for of_tile in entries for frame in of_tile]
    by_query_frame = sorted(range(len(entry_frame)), key=lambda n: entry_frame[n])
    counts = torch.bincount(_int32(entry_frame), minlength=rule.frames)
    return TileTables(
        row_frame=row_frame,
        row_place=row_place,
        row_order=row_order,
        key_order=key_order,
        tiles=tiles,
        slots=_int32(made.slots).view(-1, 3),
        ranges=_int32(made.ranges).view(-1, 4),
        entries=_int32(list(itertools.pairwise(bounds))).view(-1, 2),
        entry_frame=_int32(entry_frame),
        most_slots=made.most,
        frame_first=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        frame_entries=_int32(by_query_frame),
    )


def interleaved(runs: Iterable[Run]) -> bool:
    """Tells whether the frames fill far fewer blocks of tokens in order than in their runs."""
    blocks, tokens = 0, defaultdict[int, int](int)
    for start, end, frame, _ in runs:
        blocks += -(-(end - start) // BLOCK)
        tokens[frame] += end - start
    return blocks > INTERLEAVED * sum(-(-count // BLOCK) for count in tokens.values())


def in_order(runs: Iterable[Run]) -> tuple[Tensor, list[Run]]:
    """Returns the tokens frame by frame, text first, and the runs that these are in that order."""
    found: list[Run] = []
    order = []
    for start, end, frame, place in sorted(runs, key=lambda run: (run[2], run[0])):
        order.append(torch.arange(start, end, dtype=torch.int32, device="cpu"))
        begin = found[-1][1] if found else 0
        if found and found[-1][2] == frame:
            found[-1] = (found[-1][0], begin + end - start, frame, found[-1][3])
        else:
            found.append((begin, begin + end - start, frame, place))
    return torch.cat(order) if order else _int32([]), found


class _SlotFrames:
    """The sets of key frames that have equal weights in all rows of some query frames."""

    def __init__(self, rule: RuleTables, head: int, *, alone: bool) -> None:
        self.alone = alone
        self.key_frames = rule.key_frames
        tables = [
            x[..., head, :, :].reshape(-1, rule.frames, rule.key_frames) if rule.per_head else x
            for x in (rule.delta, rule.offset, rule.factor)
            if x is not None
        ]
        tables += [x for x in (rule.span, rule.band) if x is not None]
        parts = [x.reshape(-1, rule.frames, rule.key_frames).double() for x in tables]
        self.seen = torch.ones(rule.frames, rule.key_frames, dtype=torch.bool, device="cpu")
        if rule.offset is not None:
            offset = rule.offset[head] if rule.per_head else rule.offset
            self.seen = offset > float("-inf")
        self.weights = torch.cat(parts) if parts else self.seen[None][:0].double()
        self.known: dict[tuple[int, ...], list[list[int]]] = {}

    def of(self, frames: tuple[int, ...]) -> list[list[int]]:
        """Returns the sets for rows of these frames; text, if any key is, has one of its own."""
        if frames not in self.known:
            self.known[frames] = self._group(frames)
        return self.known[frames]

    def _group(self, frames: tuple[int, ...]) -> list[list[int]]:
        video = [frame for frame in frames if frame != TEXT]
        columns = self.weights[:, video].flatten(0, 1).T.tolist()
        if self.alone:
            columns = [[frame] for frame in range(self.key_frames)]
        seen = self.seen[video].any(0).tolist() if TEXT not in frames else [True] * self.key_frames
        groups = defaultdict[tuple[float, ...], list[int]](list)
        for frame in range(self.key_frames):
            if seen[frame]:
                groups[tuple(columns[frame])].append(frame)
        return [[TEXT], *groups.values()]


class _KeyRanges:
    """The ranges of keys of sets of key frames."""

    def __init__(self, runs: Sequence[Run], rule: RuleTables, *, by_frame: bool) -> None:
        self.runs = defaultdict[int, list[Run]](list)
        for run in runs:
            self.runs[run[2]].append(run)
        self.rule, self.by_frame = rule, by_frame
        self.apart = by_frame or rule.band is not None or rule.span is not None
        self.band = None if rule.band is None else rule.band.tolist()
        self.known: dict[object, tuple[Range, ...]] = {}

    def of(
        self, frames: tuple[int, ...], places: dict[int, tuple[int, int]], head: int
    ) -> tuple[Range, ...]:
        """Returns the ranges of frames that rows at these places of their frames may see."""
        key = (frames, tuple(places.items()), head) if self.band else frames
        if key not in self.known:
            self.known[key] = self._ranges(frames, places, head)
        return self.known[key]

    def _ranges(
        self, frames: tuple[int, ...], places: dict[int, tuple[int, int]], head: int
    ) -> tuple[Range, ...]:
        found: list[Range] = []
        for frame in frames:
            low, high = self._reach(frame, places, head)
            ends = self.rule.key_frames if frame == TEXT else frame
            kept = [
                (max(start, start + low - place), min(end, start + high + 1 - place), place - start)
                for start, end, _, place in self.runs[frame]
            ]
            kept = [x for x in kept if x[0] < x[1]]
            for n, x in enumerate(kept):
                found.append((*x, ends if self.by_frame and n == len(kept) - 1 else -1))
        return tuple(found) if self.apart else tuple(_merged(found))

    def _reach(self, frame: int, places: dict[int, tuple[int, int]], head: int) -> tuple[int, int]:
        """Returns the first and the last place of a key frame that any of the rows sees."""
        everything = (0, 2**31)
        if self.band is None or frame == TEXT or TEXT in places:
            return everything
        offset = self.rule.offset
        offset = offset[head] if offset is not None and self.rule.per_head else offset
        seen = [
            (first + self.band[0][of_row][frame], last + self.band[1][of_row][frame])
            for of_row, (first, last) in places.items()
            if offset is None or offset[of_row, frame] > float("-inf")
        ]
        if not seen:
            return 0, -1
        return max(0, min(low for low, _ in seen)), max(high for _, high in seen)


class _Lists:
    """Slots and ranges, each list of them once."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int, int]] = []
        self.ranges: list[Range] = []
        self.most = 0
        self.known: dict[object, tuple[int, int]] = {}

    def add(self, slots: tuple[tuple[int, tuple[Range, ...]], ...]) -> tuple[int, int]:
        """Returns the first and the end of these slots."""
        if slots not in self.known:
            first = len(self.slots)
            for frame, ranges in slots:
                if ranges not in self.known:
                    self.known[ranges] = (len(self.ranges), len(self.ranges) + len(ranges))
                    self.ranges += ranges
                self.slots.append((frame, *self.known[ranges]))
            self.known[slots] = (first, len(self.slots))
            self.most = max(self.most, len(slots))
        return self.known[slots]


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Returns ranges in the order of the keys, neighbours as one."""
    found: list[Range] = []
    for start, end, _, _ in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end, 0, -1)
        else:
            found.append((start, end, 0, -1))
    return found


def _starts(runs: Sequence[Run], rows: int) -> range:
    return range(0, runs[-1][1] if runs else 0, rows)


def _rows_of_frames(runs: Sequence[Run], start: int, rows: int) -> dict[int, tuple[int, int]]:
    """Returns the frames of a tile's rows, and the first and last place of each that they have."""
    found: dict[int, tuple[int, int]] = {}
    for begin, end, frame, place in runs:
        first, stop = max(begin, start), min(end, start + rows)
        if first < stop:
            low, high = place + first - begin, place + stop - 1 - begin
            known = found.get(frame, (low, high))
            found[frame] = (min(low, known[0]), max(high, known[1]))
    return dict(sorted(found.items()))


def _of_rows(runs: Iterable[tuple[int, int, int]]) -> Tensor:
    """Returns numbers of runs of (tokens, first number, step) one after the other."""
    parts = [first + step * torch.arange(tokens, device="cpu") for tokens, first, step in runs]
    return torch.cat(parts).to(torch.int32) if parts else _int32([])


def _int32(numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cpu")
