"""Frame rules over any attention that returns its log-sum-exp: no kernel of ours, forward only.

What a rule adds to the logits is a constant c for a row and a frame of keys, so attention to that
frame with it is attention without it, weighted by exp(c). From the output oᵍ and the log-sum-exp lᵍ
of a row over the keys of frame g alone, which an engine (engines.py) computes::

    r   = the statistic; frame_max: the maximum over g of lᵍ − log Pᵍ, for Pᵍ keys
    Lᵍ  = lᵍ + r · delta[f, g] + offset[f, g]            L = log Σ exp(Lᵍ), text among them
    out = Σ exp(Lᵍ − L) oᵍ                               map[f, g] = the mean of exp(Lᵍ − L)

That is exact, and the work is the engine's: every pair of a query and a key once. Neighbouring
frames of keys with the same constants are one call, for they need no weights of their own; where
each frame's lᵍ is wanted, for frame_max and for the map, every frame is one. A statistic of single
logits (row_max) is in no lᵍ, nor is what acts on them one by one, factors and bands.

The partial outputs of a frame of queries, or of a part of it, are merged at once, so that memory
does not grow with the number of frames of queries.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor

from vstar_kernels.attention.call import Forward, clamped, empty_like
from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameWanted
from vstar_kernels.attention.frames.engines import ENGINES, Engine

# An offset below this changes no float32 weight, nor does an entry of delta below this share of its
# largest. Taken as 0 they give far frames the same constants; the streamed kernels of tar_attention
# cut a Gaussian there too.
NEGLIGIBLE = 2.0**-26
MOST_PARTIAL_BYTES = 256 << 20  # of the outputs that wait to be merged; longer runs are split,
FEWEST_ROWS = 256  # but not to fewer queries, which would keep no engine busy
NOTHING = float("-inf")  # the log-sum-exp of no key, and the offset of a masked frame


def unavailable() -> list[str]:
    """Returns why no engine can run here; nothing where one can."""
    return _of_all({engine.name: engine.unavailable() for engine in ENGINES})


def why_not(call: FrameCall) -> list[str]:
    """Returns why the merge cannot express this call, and why no engine takes its tensors."""
    reasons = []
    if call.options.stat == "row_max" and call.delta is not None:
        reasons.append("knows no single logits, the rule's statistic is 'row_max'")
    for what in ("factor", "band"):
        if getattr(call, what) is not None:
            reasons.append(f"weights whole frames of keys, the rule has a {what}")
    if torch.is_grad_enabled() and call.requires_grad:
        reasons.append("computes no gradients, and a tensor requires one")
    return reasons + _of_all({engine.name: engine.why_not(call) for engine in ENGINES})


def _of_all(reasons: dict[str, list[str]]) -> list[str]:
    """Returns every engine's reasons under its name; none where one engine has none."""
    if not all(reasons.values()):
        return []
    return [f"{name}: {reason}" for name, several in reasons.items() for reason in several]


def engine_for(call: FrameCall) -> Engine:
    """Returns the engine that computes this call: the first that can."""
    return next(engine for engine in ENGINES if not engine.why_not(call))


def forward(call: FrameCall, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the map; saves nothing."""
    return forward_by(engine_for(call), call)


def backward(
    call: FrameCall,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: FrameWanted,
) -> FrameGradients:
    """Raises NotImplementedError: the engines' gradients take none of a log-sum-exp."""
    raise NotImplementedError(
        "frame_attention's backend 'composed' computes no gradients; 'reference' does"
    )


def forward_by(engine: Engine, call: FrameCall) -> Forward:
    """Computes a call by this engine."""
    out = empty_like(call.query)
    masses: Tensor | None = None
    if call.options.mean_map != "none":
        shape = (call.batch, call.heads, call.frames, call.key_frames + 1)
        masses = torch.zeros(shape, dtype=torch.float32, device=call.device)
    for batch, keys, lengths in _by_length(call):
        for block in plan(call, keys):
            of_frame = None if masses is None or block.frame < 0 else masses[batch, :, block.frame]
            for start, end in _pieces(call, block):
                rows = Rows(engine, call, block, batch, start, end, lengths)
                out[batch, start:end] = rows.attend(of_frame)
    return Forward(out, None if masses is None else _mean_map(call, masses))


def _by_length(call: FrameCall) -> Iterator[tuple[slice, int, Tensor | None]]:
    """Returns parts of the batch and how many keys they have, or, on a GPU, lengths up to that.

    The host knows a CPU's key_lengths, so that keys that do not exist are in no call there. What a
    GPU knows is handed to the engine: to read it back would wait for all that is queued.
    """
    if call.key_lengths is None or call.device.type != "cpu":
        yield slice(None), call.keys, call.key_lengths
        return
    lengths = call.key_lengths.clamp(0, call.keys).tolist()
    for length, elements in groupby(range(call.batch), key=lengths.__getitem__):
        alike = list(elements)
        yield slice(alike[0], alike[-1] + 1), length, None


def _pieces(call: FrameCall, block: Block) -> Iterator[tuple[int, int]]:
    """Returns equal pieces of a block's queries, whose partial outputs are not too large."""
    row_bytes = call.batch * call.heads * call.head_dim * call.dtype.itemsize * len(block.parts)
    tokens = block.end - block.start
    count = max(1, min(tokens // FEWEST_ROWS, -(-tokens * row_bytes // MOST_PARTIAL_BYTES)))
    bounds = [block.start + tokens * i // count for i in range(count + 1)]
    return pairwise(bounds)


def _mean_map(call: FrameCall, masses: Tensor) -> Tensor:
    """Returns the map of sums over the queries of each frame, (batch, heads, F_q, F_k + 1)."""
    tokens = masses.new_zeros(call.frames)
    for start, end, frame in _runs(call.query_runs):
        if frame >= 0:
            tokens[frame] += end - start
    means = masses / tokens[:, None]
    return means if call.options.mean_map == "heads" else means.mean(1)


# ---- the plan: which rows attend to which ranges of keys, with which constants ----

Constants = tuple[float, ...]  # one for all heads, or one for each
Runs = tuple[tuple[int, int, int], ...]  # start, end and frame
Table = tuple[tuple[int, ...], bytes]  # shape and float32 contents
NEUTRAL: Constants = (0.0,)


@dataclass(frozen=True)
class Part:
    """A range of keys that one call covers: of a frame, or of several with the same constants.

    ``column`` is where it goes in the map: the frame's number, or -1 for text, the last column.
    """

    start: int
    end: int
    column: int
    delta: Constants
    offset: Constants


@dataclass(frozen=True)
class Block:
    """A range of queries that attend to the same parts; ``frame`` is -1 for text."""

    start: int
    end: int
    frame: int
    parts: tuple[Part, ...]


def plan(call: FrameCall, keys: int) -> tuple[Block, ...]:
    """Returns what is computed for the batch elements of a call that have so many keys."""
    stat, wants_map = call.options.stat, call.options.mean_map != "none"
    runs = (_runs(call.query_runs), _runs(call.key_runs))
    return _plan(*runs, _table(call.delta), _table(call.offset), keys, stat, wants_map)


@functools.lru_cache(maxsize=256)
def _plan(
    query_runs: Runs,
    key_runs: Runs,
    delta: Table | None,
    offset: Table | None,
    keys: int,
    stat: str,
    wants_map: bool,
) -> tuple[Block, ...]:
    deltas, offsets = _constants(delta, relative=True), _constants(offset, relative=False)
    runs = [(start, min(end, keys), frame) for start, end, frame in key_runs if start < keys]
    blocks: list[Block] = []
    for start, end, f in query_runs:
        parts = [Part(a, b, g, deltas(f, g), offsets(f, g)) for a, b, g in runs]
        parts = [part for part in parts if set(part.offset) != {NOTHING}]
        weighs = stat == "frame_max" and any(part.delta != NEUTRAL for part in parts)
        by_frame = f >= 0 and (weighs or wants_map)
        joined = _joined(parts, by_frame)
        before = blocks[-1] if blocks else None
        if before and before.parts == joined and (before.frame == f or not wants_map):
            blocks[-1] = replace(before, end=end)
        else:
            blocks.append(Block(start, end, f, joined))
    return tuple(blocks)


def _joined(parts: list[Part], by_frame: bool) -> tuple[Part, ...]:
    """Returns the parts with neighbours joined that need not be told apart."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.end == part.start
            and (last.delta, last.offset) == (part.delta, part.offset)
            and (last.column == part.column or not by_frame)
        ):
            joined[-1] = replace(last, end=part.end)
        else:
            joined.append(part)
    return tuple(joined)


def _constants(table: Table | None, *, relative: bool) -> Callable[[int, int], Constants]:
    """Returns a function for a table's constants of two frames; those of text are neutral."""
    if table is None:
        return lambda f, g: NEUTRAL
    shape, contents = table
    values = torch.frombuffer(bytearray(contents), dtype=torch.float32).view(-1, *shape[-2:])
    sizes = values.abs()
    least = NEGLIGIBLE * sizes.max() if relative else NEGLIGIBLE
    cells = values.masked_fill(sizes < least, 0.0).movedim(0, -1).tolist()

    def constants(f: int, g: int) -> Constants:
        if f < 0 or g < 0:
            return NEUTRAL
        cell = cells[f][g]
        return tuple(cell[:1] if len(set(cell)) == 1 else cell)

    return constants


def _runs(runs: Tensor) -> Runs:
    return tuple((start, end, frame) for start, end, frame, _ in runs.tolist())


def _table(table: Tensor | None) -> Table | None:
    if table is None:
        return None
    return tuple(table.shape), ctypes.string_at(table.data_ptr(), table.nbytes)


# ---- some queries: their partial outputs, the statistic, the merge ----


@dataclass(frozen=True)
class Rows:
    """Some queries of a block: those from ``start`` to ``end``, of a part of the batch.

    ``lengths`` says how many keys each element of it has where only the device knows.
    """

    engine: Engine
    call: FrameCall
    block: Block
    batch: slice
    start: int
    end: int
    lengths: Tensor | None

    def attend(self, masses: Tensor | None) -> Tensor | float:
        """Returns the output, (batch, tokens, heads, head_dim); 0 where there is no key.

        Adds to ``masses``, (batch, heads, F_k + 1), if they are wanted, the sums over the queries
        of what each frame of keys weighs.
        """
        parts = self.block.parts
        if not parts:
            return 0.0
        outs, each = zip(*map(self._partial, parts), strict=True)
        if len(parts) == 1 and masses is None and NOTHING not in parts[0].offset:
            return outs[0]
        lses = torch.stack(each)
        seen = torch.where(lses == NOTHING, NOTHING, self._constants("offset"))
        # Less the row's largest, so that one of 10⁹ in all parts leaves lses what they are.
        largest = seen.amax(0)
        logits = lses + (seen - largest.masked_fill(largest == NOTHING, 0.0))
        if any(part.delta != NEUTRAL for part in parts):
            logits = logits + self._statistic(lses) * self._constants("delta")
        weights = logits.softmax(0).masked_fill(largest == NOTHING, 0.0)
        if masses is not None:
            for part, weight in zip(parts, weights.sum(2), strict=True):
                masses[..., part.column] += weight
        merged = weights[0].unsqueeze(-1) * outs[0]
        for out, weight in zip(outs[1:], weights[1:], strict=True):
            merged.addcmul_(out, weight.unsqueeze(-1))
        return merged

    def _partial(self, part: Part) -> tuple[Tensor, Tensor]:
        """Returns the attention to a part's keys, and its log-sum-exp, (batch, tokens, heads)."""
        call = self.call
        query = call.query[self.batch, self.start : self.end]
        key, value = (x[self.batch, part.start : part.end] for x in (call.key, call.value))
        lengths = None if self.lengths is None else self._lengths(part)
        out, lse = self.engine.attend(query, key, value, call.options.scale, lengths)
        return out, lse.mT

    def _lengths(self, part: Part) -> Tensor:
        """Returns how many of a part's keys each element of the batch has, int32 (batch,)."""
        assert self.lengths is not None
        return (self.lengths - part.start).clamp(0, part.end - part.start)

    def _statistic(self, lses: Tensor) -> Tensor | float:
        """Returns what delta is weighted by, (batch, tokens, heads), of each part's log-sum-exp."""
        options, stat = self.call.options, self.call.stat
        if options.stat == "none":
            return 1.0
        if stat is None:
            found = self._frame_max(lses)
        else:
            found = stat[self.batch, self.start : self.end].to(lses.dtype)
        return clamped(found) if options.clamp_negative else found

    def _frame_max(self, lses: Tensor) -> Tensor:
        """Returns the maximum over the visible frames of lᵍ − log Pᵍ, and 0 where there is none."""
        if any(NOTHING in part.offset for part in self.block.parts):  # masked for some heads
            lses = lses.masked_fill(self._constants("offset") == NOTHING, NOTHING)
        frames: dict[int, list[int]] = defaultdict(list)  # the places of their parts
        for place, part in enumerate(self.block.parts):
            if part.column >= 0:
                frames[part.column].append(place)
        sums = torch.stack([_total(lses, places) for places in frames.values()])
        largest = (sums - self._log_counts(frames.values())).amax(0)
        return largest.masked_fill(largest == NOTHING, 0.0)

    def _log_counts(self, frames: Iterable[list[int]]) -> Tensor:
        """Returns log P of frames that consist of such parts, (frames, batch or 1, 1, 1)."""
        parts = [[self.block.parts[place] for place in places] for places in frames]
        if self.lengths is None:
            counts = (sum(part.end - part.start for part in frame) for frame in parts)
            return _tensor(tuple((math.log(count),) for count in counts), self.call.device)
        visible = [torch.stack(list(map(self._lengths, frame))).sum(0) for frame in parts]
        return torch.stack(visible)[..., None, None].clamp(min=1).log()  # of none it is not asked

    def _constants(self, table: str) -> Tensor:
        """Returns each part's constants of a table, (parts, 1, 1, heads or 1)."""
        return _tensor(tuple(getattr(part, table) for part in self.block.parts), self.call.device)


def _total(lses: Tensor, places: list[int]) -> Tensor:
    """Returns the log-sum-exp of several parts."""
    first, *others = places
    return functools.reduce(torch.logaddexp, (lses[place] for place in others), lses[first])


@functools.lru_cache(maxsize=4096)
def _tensor(constants: tuple[Constants, ...], device: torch.device) -> Tensor:
    """Returns constants for log-sum-exps of (parts, batch, tokens, heads)."""
    width = max(map(len, constants))
    rows = [constant * (width // len(constant)) for constant in constants]
    return torch.tensor(rows, dtype=torch.float32, device=device)[:, None, None]
