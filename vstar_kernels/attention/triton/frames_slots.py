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

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vstar_kernels.attention.triton.devices import Contents

TEXT = -1  # the frame of what belongs to none
INTERLEAVED = 1.25  # how many times the blocks may be that the same frames would fill in order
BLOCK = 64  # tokens of such a block

Run = tuple[int, int, int, int]  # start, end, frame, place of its first token within the frame
Range = tuple[int, int, int, int]  # start, end, place − key, the frame that it ends or −1


@dataclass(frozen=True)
class RuleTables:
    """The rule's tables as kernels read them, for one Δ of all heads or one of each."""

    frames: int
    key_frames: int
    per_head: bool
    delta: Tensor | None  # ([heads,] frames, key frames), like offset
    offset: Tensor | None  # in units of the product qᵀk, see frames_plan.rule_tables
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
    biased: Tensor  # ([heads,] tiles): the end of a tile's slots that have a bias, which are first
    slots: Tensor
    ranges: Tensor
    entries: Tensor
    entry_frame: Tensor
    most_slots: int  # of a tile
    frame_first: Tensor  # (frames + 1,): where each query frame's entries begin in frame_entries
    frame_entries: Tensor  # the entries by query frame

    def counts(self) -> tuple[Tensor, Tensor]:
        """Returns how many slots tiles have, and how many keys with a bias; ([heads,] tiles)."""
        of_ranges = _sums(self.ranges[:, 1] - self.ranges[:, 0])
        of_slots = _sums(of_ranges[self.slots[:, 2]] - of_ranges[self.slots[:, 1]])
        first, end = self.tiles.long().unbind(-1)
        return end - first, of_slots[self.biased] - of_slots[first]

    def biased_keys_of_a_slot(self) -> float:
        """Returns how many keys with a bias tiles see, for each of their slots."""
        slots, keys = (x.sum() for x in self.counts())
        return float(keys / slots.clamp(min=1))


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
    biased = torch.empty(rule.heads, len(sets), dtype=torch.int32, device="cpu")
    like: dict[Contents | None, int] = {}  # the first head of each rule
    for head in range(rule.heads):
        groups = _SlotFrames(rule, head, alone=alone)
        first = like.setdefault(Contents.of(groups.weights), head)
        if first < head:
            tiles[head], biased[head] = tiles[first], biased[first]
            continue
        for n, places in enumerate(sets):
            slots = [
                (frames[0], ranges, has_bias)
                for frames, has_bias in groups.of(tuple(places))
                if (ranges := key_ranges.of(tuple(frames), places, head))
            ]
            begin, end = made.add(tuple((frame, ranges) for frame, ranges, _ in slots))
            tiles[head, n] = _int32([begin, end])
            biased[head, n] = begin + sum(has_bias for *_, has_bias in slots)
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
        biased=biased,
        slots=_int32(made.slots).view(-1, 3),
        ranges=_int32(made.ranges).view(-1, 4),
        entries=_int32(list(itertools.pairwise(bounds))).view(-1, 2),
        entry_frame=_int32(entry_frame),
        most_slots=made.most,
        frame_first=_sums(counts).to(torch.int32),
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
            self.seen = offset != float("-inf")  # NaN is no mask
        self.weights = torch.cat(parts) if parts else self.seen[None][:0].double()
        biases = [
            x[head] if rule.per_head else x for x in (rule.delta, rule.offset) if x is not None
        ]
        self.biased = sum((x != 0 for x in biases), torch.zeros_like(self.seen))
        self.known: dict[tuple[int, ...], list[tuple[list[int], bool]]] = {}

    def of(self, frames: tuple[int, ...]) -> list[tuple[list[int], bool]]:
        """Returns the sets for rows of these frames, and of each whether it has a bias.

        Those that have one are first, and text has the last to itself.
        """
        if frames not in self.known:
            self.known[frames] = self._group(frames)
        return self.known[frames]

    def _group(self, frames: tuple[int, ...]) -> list[tuple[list[int], bool]]:
        video = [frame for frame in frames if frame != TEXT]
        columns = self.weights[:, video].flatten(0, 1).T.tolist()
        if self.alone:
            columns = [[frame] for frame in range(self.key_frames)]
        seen = self.seen[video].any(0).tolist() if TEXT not in frames else [True] * self.key_frames
        groups = defaultdict[tuple[float, ...], list[int]](list)
        for frame in range(self.key_frames):
            if seen[frame]:
                groups[tuple(columns[frame])].append(frame)
        biased = self.biased[video].any(0).tolist()
        found = [(group, biased[group[0]]) for group in groups.values()]
        return [*sorted(found, key=lambda x: not x[1]), ([TEXT], False)]


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
            if offset is None or offset[of_row, frame] != float("-inf")
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


def _sums(numbers: Tensor) -> Tensor:
    """Returns the sums of the first numbers, of none to all."""
    return torch.nn.functional.pad(numbers.long().cumsum(0), (1, 0))


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
