"""``python -m benchmarks compare A B``: is B slower than A, beyond what the machine's noise does?

Machines differ from one hour to the next, so a peer's time is first divided by what the others
took in the same round: their geometric mean, of those that both runs have. What is compared is the
median of that over the rounds; the rounds, resampled, tell how far to trust it (Efron's bootstrap).

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
    """B's time over A's, from ``low`` to ``high`` with the noise."""

    name: str
    value: float
    low: float
    high: float
    absolute: float
    verdict: str
    drawn: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Comparison:
    """Two runs, case by case and suite by suite."""

    peer: str
    cases: list[Ratio]
    suites: list[Ratio]
    lost: list[str]
    warnings: list[str]

    @property
    def slower(self) -> list[Ratio]:
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
            for name in (title[:-1].lower(), "ratio", "from", "to", "of seconds", ""):
                table.add_column(name, justify="left" if name in ("case", "suite", "") else "right")
            for row in rows:
                numbers = (row.value, row.low, row.high, row.absolute)
                table.add_row(row.name, *(f"{x:.3f}" for x in numbers), row.verdict)
            console.print(table)
        for line in (*self.warnings, *self.lost):
            console.print(line, markup=False)
        slower = ", ".join(x.name for x in self.slower)
        console.print(f"Slower: {slower}" if slower else "Not slower, within the noise.")


def compare(a: Run, b: Run, *, peer: str, tolerance: float, absolute: bool = False) -> Comparison:
    """Compare a peer's times in the cases that both runs have.

    Args:
        a: The run before.
        b: The run after.
        peer: Whose times.
        tolerance: Of a suite, 0.05 being 5%.
        absolute: Compare seconds, not shares of what the other peers take.

    Raises:
        ResultsError: The runs share no case in which the peer was measured.
    """
    before = {record.task.key: record for record in a.records}
    torch.manual_seed(0)
    cases, suites = [], defaultdict(list)
    for record in b.records:
        other = before.get(record.task.key)
        if other is None or other.median(peer) is None or record.median(peer) is None:
            continue
        ratio = _of_case(other, record, peer, CASE_TOLERANCE * tolerance, absolute)
        if other.disturbed or record.disturbed:
            ratio = replace(ratio, verdict=DISTURBED)
        else:
            suites[record.case.suite].append(ratio)
        cases.append(ratio)
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


def _of_case(a: Record, b: Record, peer: str, tolerance: float, absolute: bool) -> Ratio:
    shared = [] if absolute else _yardsticks(a, b, peer)
    series = [_relative(record, peer, shared) for record in (a, b)]
    drawn = [_resampled(x).quantile(0.5, dim=1) for x in series]
    value = (series[1].quantile(0.5) / series[0].quantile(0.5)).item()
    seconds = (b.median(peer) or math.nan) / (a.median(peer) or math.nan)
    return _ratio(b.task.key, value, drawn[1] / drawn[0], seconds, tolerance)


def _of_suite(name: str, cases: list[Ratio], tolerance: float) -> Ratio:
    """The geometric mean; cases are drawn with replacement, each with a draw of its rounds."""
    value = math.exp(sum(math.log(x.value) for x in cases) / len(cases))
    seconds = math.exp(sum(math.log(x.absolute) for x in cases) / len(cases))
    logs = torch.stack([x.drawn for x in cases]).log()
    chosen = torch.randint(len(cases), logs.shape)
    return _ratio(name, value, logs.gather(0, chosen).mean(dim=0).exp(), seconds, tolerance)


def _ratio(name: str, value: float, drawn: Tensor, seconds: float, tolerance: float) -> Ratio:
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    verdict = SLOWER if low > 1 + tolerance else FASTER if high < 1 / (1 + tolerance) else EQUAL
    return Ratio(name, value, low, high, seconds, verdict, drawn)


def _yardsticks(a: Record, b: Record, peer: str) -> list[str]:
    """The other peers that both runs have times of."""
    return [
        name
        for name in a.peers
        if name != peer and not by_name(name).own and a.median(name) and b.median(name)
    ]


def _relative(record: Record, peer: str, yardsticks: list[str]) -> Tensor:
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
