"""``python -m benchmarks compare A B``: is B slower than A, beyond what the machine's noise does?

Machines differ from one hour to the next, so a peer's time is also divided by what the others took
in the same round: their geometric mean, of those that both runs have. Compared are the medians over
the rounds; resampled rounds tell how far to trust them (Efron's bootstrap). Only what is slower
both ways is slower: by the clock alone it may be the machine, by the others alone it may be them.

A suite is slower where the geometric mean of its cases' ratios is above 1 by more than the
tolerance, also at the low end of what resampled cases and rounds give. A case by itself must be
slower by more: with many cases some are slow by chance, and where a process finds its memory moves
a case by several percent. Cases that were measured beside other work say nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.environment import differences
from benchmarks.peers import by_name
from benchmarks.results import Record, ResultsError, Run

CASE_TOLERANCE = 2.5  # times the tolerance of a suite
CONFIDENCE = 0.99
RESAMPLES = 2000
SLOWER, FASTER, EQUAL, DISTURBED = "slower", "faster", "", "disturbed"


@dataclass(frozen=True)
class Ratio:
    """B's time over A's, with ``drawn`` ones for the noise."""

    value: float
    drawn: Tensor = field(repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """Where it lies with the noise."""
        tail = (1 - CONFIDENCE) / 2
        ends = torch.tensor([tail, 1 - tail], dtype=self.drawn.dtype)
        low, high = self.drawn.quantile(ends).tolist()
        return low, high


@dataclass(frozen=True)
class Line:
    """A case or a suite: the ratio relative to the other peers, and that of the seconds."""

    name: str
    relative: Ratio
    seconds: Ratio
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two runs, case by case and suite by suite."""

    peer: str
    cases: list[Line]
    suites: list[Line]
    lost: list[str]
    warnings: list[str]

    @property
    def slower(self) -> list[Line]:
        """What got slower."""
        return [x for x in (*self.suites, *self.cases) if x.verdict == SLOWER]

    @property
    def passed(self) -> bool:
        """Nothing got slower, and nothing that A measured is missing in B."""
        return not self.slower and not self.lost

    def print(self, console: Console) -> None:
        """Tables of the suites and of the cases, and the verdict."""
        for title, rows in (("Cases", self.cases), ("Suites", self.suites)):
            table = Table(title=f"{title}: {self.peer}, B over A", title_justify="left")
            table.add_column(title[:-1].lower())
            table.add_column("relative to the others", justify="right")
            table.add_column("seconds", justify="right")
            table.add_column("")
            for row in rows:
                table.add_row(row.name, _text(row.relative), _text(row.seconds), row.verdict)
            console.print(table)
        for line in (*self.warnings, *self.lost):
            console.print(line, markup=False)
        slower = ", ".join(x.name for x in self.slower)
        console.print(f"Slower: {slower}" if slower else "Not slower, within the noise.")


def compare(a: Run, b: Run, *, peer: str, tolerance: float) -> Comparison:
    """Compare a peer's times in the cases that both runs have.

    Args:
        a: The run before.
        b: The run after.
        peer: Whose times.
        tolerance: Of a suite, 0.05 being 5%.

    Raises:
        ResultsError: The runs share no case in which the peer was measured on a quiet machine.
    """
    before = {record.task.key: record for record in a.records}
    torch.manual_seed(0)
    cases, suites = [], defaultdict(list)
    for record in b.records:
        other = before.get(record.task.key)
        if other is None or other.median(peer) is None or record.median(peer) is None:
            continue
        line = _of_case(other, record, peer, CASE_TOLERANCE * tolerance)
        if other.disturbed or record.disturbed:
            line = replace(line, verdict=DISTURBED)
        else:
            suites[record.case.suite].append(line)
        cases.append(line)
    if not cases:
        raise ResultsError(f"the runs share no case in which {peer} was measured")
    if not suites:
        raise ResultsError("every case that the runs share was measured beside other work")
    lost = [
        f"Lost: {record.task.key}: {_why(record, peer)}"
        for record in b.records
        if record.task.key in before
        and before[record.task.key].median(peer)
        and not record.median(peer)
    ]
    return Comparison(
        peer,
        cases,
        [_of_suite(name, rows, tolerance) for name, rows in suites.items()],
        lost,
        [f"A and B differ in {x}" for x in differences(a.environment, b.environment)],
    )


def _of_case(a: Record, b: Record, peer: str, tolerance: float) -> Line:
    relative, seconds = (
        _ratio(*(_series(record, peer, others) for record in (a, b)))
        for others in (_yardsticks(a, b, peer), [])
    )
    return Line(b.task.key, relative, seconds, _verdict(relative, seconds, tolerance))


def _of_suite(name: str, cases: list[Line], tolerance: float) -> Line:
    relative = _mean([line.relative for line in cases])
    seconds = _mean([line.seconds for line in cases])
    return Line(name, relative, seconds, _verdict(relative, seconds, tolerance))


def _ratio(a: Tensor, b: Tensor) -> Ratio:
    """Of the medians; both are drawn again with replacement."""
    drawn = _resampled(b).quantile(0.5, dim=1) / _resampled(a).quantile(0.5, dim=1)
    return Ratio((b.quantile(0.5) / a.quantile(0.5)).item(), drawn)


def _mean(ratios: list[Ratio]) -> Ratio:
    """The geometric mean; cases are drawn with replacement, each with a draw of its rounds."""
    logs = torch.stack([x.drawn for x in ratios]).log()
    chosen = torch.randint(len(ratios), logs.shape)
    value = math.exp(sum(math.log(x.value) for x in ratios) / len(ratios))
    return Ratio(value, logs.gather(0, chosen).mean(dim=0).exp())


def _verdict(relative: Ratio, seconds: Ratio, tolerance: float) -> str:
    if min(relative.interval[0], seconds.interval[0]) > 1 + tolerance:
        return SLOWER
    if max(relative.interval[1], seconds.interval[1]) < 1 / (1 + tolerance):
        return FASTER
    return EQUAL


def _text(ratio: Ratio) -> str:
    low, high = ratio.interval
    return f"{ratio.value:.3f} ({low:.3f} to {high:.3f})"


def _yardsticks(a: Record, b: Record, peer: str) -> list[str]:
    """The other peers that both runs have times of."""
    return [
        name
        for name in a.peers
        if name != peer and not by_name(name).own and a.median(name) and b.median(name)
    ]


def _series(record: Record, peer: str, yardsticks: list[str]) -> Tensor:
    """Seconds by round, over the geometric mean of the yardsticks' in the same round."""
    seconds = torch.tensor(record.peers[peer].seconds, dtype=torch.float64)
    if not yardsticks:
        return seconds
    others = torch.tensor([record.peers[x].seconds for x in yardsticks], dtype=torch.float64)
    return seconds / others.log().mean(dim=0).exp()


def _resampled(series: Tensor) -> Tensor:
    """Rows of as many values, drawn with replacement."""
    return series[torch.randint(len(series), (RESAMPLES, len(series)))]


def _why(record: Record, peer: str) -> str:
    return record.failure or record.peers[peer].reason
