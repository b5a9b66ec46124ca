"""What the report says, from a run's records: sums, ratios, and where the kernels are not first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.peers import EAGER, PEERS, SDPA, VSTAR_KERNELS, by_name
from benchmarks.results import Record, Run

DEFAULT = "default"  # the allocator's setting
OURS, THEIRS, PLAIN = VSTAR_KERNELS.name, EAGER.name, SDPA.name
OTHER_TAR = tuple(peer.name for peer in PEERS if peer.tar and not peer.own)


@dataclass(frozen=True)
class Step:
    """A model's temporal self-attention in one denoising step, all levels, at full size."""

    model: str
    frames: int
    dtype: str
    seconds: dict[str, float]  # by peer, of those that were measured at every level
    calls: int
    scale: float  # full rows over the rows that were measured, of the level most scaled down


def kernels(run: Run) -> list[Record]:
    """The records in which kernels are compared: warm allocator, or a GPU; without the failed."""
    return [x for x in run.records if x.task.allocator != DEFAULT and x.median(OURS)]


def of_suite(records: Iterable[Record], suite: str) -> list[Record]:
    """Those of one suite."""
    return [record for record in records if record.case.suite == suite]


def ratio(record: Record, peer: str) -> float | None:
    """How many times as long as the kernels a peer takes."""
    ours, theirs = record.median(OURS), record.median(peer)
    return theirs / ours if ours and theirs else None


def fastest_other(record: Record) -> str | None:
    """The fastest of the others that compute TAR."""
    found = [name for name in OTHER_TAR if record.median(name)]
    return min(found, key=lambda name: record.median(name) or math.inf, default=None)


def not_first(records: Iterable[Record]) -> list[tuple[Record, str, float]]:
    """Where another that computes TAR is faster: the record, who, its time over the kernels'."""
    found = []
    for record in records:
        name = fastest_other(record)
        if name is not None and (times := ratio(record, name)) is not None and times < 1:
            found.append((record, name, times))
    return found


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    logs = [math.log(x) for x in values if x]
    return math.exp(sum(logs) / len(logs)) if logs else None


def steps(run: Run) -> list[Step]:
    """The models' denoising steps whose levels were all measured, in the ``short`` suite."""
    planned: Counter[tuple[str, int, str]] = Counter()
    for task in run.plan.tasks:
        if task.case.suite == "short" and task.allocator != DEFAULT:
            planned.update((use.model, task.case.frames, task.case.dtype) for use in task.case.uses)
    groups: dict[tuple[str, int, str], list[tuple[Record, float, int]]] = {}
    for record in of_suite(kernels(run), "short"):
        for use in record.case.uses:
            key = (use.model, record.case.frames, record.case.dtype)
            groups.setdefault(key, []).append((record, use.rows / record.case.batch, use.calls))
    return [
        Step(
            *key,
            seconds={
                peer: sum(
                    (record.median(peer) or 0) * scale * calls for record, scale, calls in parts
                )
                for peer in parts[0][0].peers
                if all(record.median(peer) for record, _, _ in parts)
            },
            calls=sum(calls for _, _, calls in parts),
            scale=max(scale for _, scale, _ in parts),
        )
        for key, parts in groups.items()
        if len(parts) == planned[key]
    ]


def title(peer: str) -> str:
    """What a peer is called in reports."""
    return by_name(peer).title
