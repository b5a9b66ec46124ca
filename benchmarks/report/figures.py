"""What the report says, from a run's records: sums, ratios, and where the kernels are not first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import gmean

from benchmarks.peers import PEERS, VSTAR_KERNELS
from benchmarks.results import Record, Run

DEFAULT = "default"  # the allocator's setting
OTHERS_WITH_TAR = tuple(name for name, peer in PEERS.items() if peer.tar and not peer.ours)


@dataclass(frozen=True)
class Step:
    """A model's temporal self-attention in one denoising step, all levels, at full size."""

    model: str
    frames: int
    dtype: str
    seconds: dict[str, float]  # by peer, of those that were measured at every level
    calls: int
    scale: float  # the full batch over the measured one, of the level most scaled down

    def times_as_long(self, peer: str) -> float | None:
        """Returns a peer's time over the kernels'."""
        return self.seconds[peer] / self.seconds[VSTAR_KERNELS] if peer in self.seconds else None

    def fastest_other(self) -> str | None:
        """Returns the fastest of the others that compute TAR."""
        found = [name for name in OTHERS_WITH_TAR if name in self.seconds]
        return min(found, key=lambda name: self.seconds[name], default=None)


def kernel_records(run: Run, suite: str | None = None) -> list[Record]:
    """Returns the records that compare kernels: warm allocator, or a GPU; without the failed."""
    return [
        record
        for record in run.records
        if record.allocator != DEFAULT and record.median(VSTAR_KERNELS)
        if suite in (None, record.case.suite)
    ]


def times_as_long(record: Record, peer: str | None) -> float | None:
    """Returns a peer's time over the kernels'."""
    ours, theirs = record.median(VSTAR_KERNELS), record.median(peer) if peer else None
    return theirs / ours if ours and theirs else None


def fastest_other(record: Record) -> str | None:
    """Returns the fastest of the others that compute TAR."""
    found = [name for name in OTHERS_WITH_TAR if record.median(name)]
    return min(found, key=lambda name: record.median(name) or math.inf, default=None)


def not_first(records: Iterable[Record]) -> list[tuple[Record, str, float]]:
    """Returns where another that computes TAR is faster: who, and its time over the kernels'."""
    found = []
    for record in records:
        name = fastest_other(record)
        if name is not None and (times := times_as_long(record, name)) and times < 1:
            found.append((record, name, times))
    return found


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Returns the geometric mean of those that there are."""
    present = [x for x in values if x]
    return float(gmean(present)) if present else None


def steps(run: Run) -> list[Step]:
    """Returns the models' denoising steps whose levels the ``short`` suite has all measured."""
    planned = Counter(
        (use.model, task.case.frames, task.case.dtype)
        for task in run.plan.tasks
        if task.case.suite == "short" and task.allocator != DEFAULT
        for use in task.case.uses
    )
    levels = defaultdict(list)
    for record in kernel_records(run, "short"):
        for use in record.case.uses:
            step = use.model, record.case.frames, record.case.dtype
            levels[step].append((record, use.full_batch / record.case.batch, use.calls))
    return [
        Step(
            *step,
            seconds={
                peer: sum(record.median(peer) * scale * calls for record, scale, calls in found)
                for peer in found[0][0].peers
                if all(record.median(peer) for record, _, _ in found)
            },
            calls=sum(calls for _, _, calls in found),
            scale=max(scale for _, scale, _ in found),
        )
        for step, found in levels.items()
        if len(found) == planned[step]
    ]
