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

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import bootstrap, gmean

from benchmarks.machine import differences
from benchmarks.peers import PEERS
from benchmarks.report.tables import Table
from benchmarks.results import Record, ResultsError, Run

CASE_TOLERANCE = 2.5  # times the tolerance of a suite
CONFIDENCE = 0.99
RESAMPLES = 2000
SLOWER = "slower"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """B's time over A's, and ``resampled`` ones for the noise."""

    value: float
    resampled: Array = field(repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """Returns where the ratio lies with the noise."""
        low, high = np.quantile(self.resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Line:
    """A case or a suite: the ratio relative to the other peers, and that of the seconds."""

    name: str
    relative: Ratio
    seconds: Ratio
    tolerance: float
    disturbed: bool = False

    @property
    def verdict(self) -> str:
        """Returns what both ratios agree on, noise included."""
        lows, highs = zip(self.relative.interval, self.seconds.interval, strict=True)
        if self.disturbed:
            return "disturbed"
        if min(lows) > 1 + self.tolerance:
            return SLOWER
        return "faster" if max(highs) < 1 / (1 + self.tolerance) else ""


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
        """Returns what got slower."""
        return [x for x in (*self.suites, *self.cases) if x.verdict == SLOWER]

    @property
    def passed(self) -> bool:
        """Returns whether nothing got slower, and all that A measured is in B."""
        return not self.slower and not self.lost

    def print(self, console: Console) -> None:
        """Prints tables of the suites and of the cases, and the verdict."""
        for what, lines in (("case", self.cases), ("suite", self.suites)):
            rows = [(x.name, str(x.relative), str(x.seconds), x.verdict) for x in lines]
            head = (what, "relative to the others", "seconds", "")
            title = f"{what.title()}s: {self.peer}, B over A"
            console.print(Table(title, head, rows).for_terminal())
        for line in (*self.warnings, *self.lost):
            console.print(line, markup=False)
        slower = ", ".join(x.name for x in self.slower)
        console.print(f"Slower: {slower}" if slower else "Not slower, within the noise.")


def compare(a: Run, b: Run, *, peer: str, tolerance: float) -> Comparison:
    """Compares a peer's times in the cases that both runs have, ``b`` the run after ``a``.

    Raises:
        ResultsError: The runs share no case in which the peer was measured on a quiet machine.
    """
    before = {record.key: record for record in a.records if record.median(peer) is not None}
    random = np.random.default_rng(0)
    cases, suites, lost = [], defaultdict(list), []
    for record in b.records:
        other = before.get(record.key)
        if other is None:
            continue
        if record.median(peer) is None:
            lost.append(f"Lost: {record.key}: {record.failure or record.peers[peer].reason}")
            continue
        both = [x for x in record.peers if x != peer and not PEERS[x].ours]
        both = [x for x in both if other.median(x) and record.median(x)]
        ratios = (
            _ratio(_by_round(other, peer, others), _by_round(record, peer, others), random)
            for others in (both, [])
        )
        disturbed = other.disturbed or record.disturbed
        cases.append(Line(record.key, *ratios, CASE_TOLERANCE * tolerance, disturbed))
        if not disturbed:
            suites[record.case.suite].append(cases[-1])
    if not cases:
        raise ResultsError(f"the runs share no case in which {peer} was measured")
    if not suites:
        raise ResultsError("every case that the runs share was measured beside other work")
    means = []
    for name, lines in suites.items():
        relative = _mean([line.relative for line in lines], random)
        seconds = _mean([line.seconds for line in lines], random)
        means.append(Line(name, relative, seconds, tolerance))
    warnings = [f"A and B differ in {x}" for x in differences(a.environment, b.environment)]
    return Comparison(peer, cases, means, lost, warnings)


def _ratio(a: Array, b: Array, random: np.random.Generator) -> Ratio:
    """Returns the medians' ratio; the rounds of both are resampled."""
    found = bootstrap(
        (a, b), _ratio_of_medians, n_resamples=RESAMPLES, method="percentile", rng=random
    )
    return Ratio(float(_ratio_of_medians(a, b)), found.bootstrap_distribution)


def _ratio_of_medians(a: Array, b: Array, axis: int = -1) -> Array:
    return np.median(b, axis=axis) / np.median(a, axis=axis)


def _mean(ratios: list[Ratio], random: np.random.Generator) -> Ratio:
    """Returns the geometric mean; cases are resampled, each with a resample of its rounds."""
    rounds = np.stack([x.resampled for x in ratios])
    chosen = random.integers(len(ratios), size=rounds.shape)
    resampled = gmean(np.take_along_axis(rounds, chosen, axis=0), axis=0)
    return Ratio(float(gmean([x.value for x in ratios])), resampled)


def _by_round(record: Record, peer: str, others: list[str]) -> Array:
    """Returns seconds by round, over the geometric mean of the others' in the same round."""
    seconds = np.array(record.peers[peer].seconds)
    if not others:
        return seconds
    return seconds / gmean([record.peers[name].seconds for name in others], axis=0)
