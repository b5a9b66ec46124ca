"""The report's tables as plain text cells, for the terminal and in Markdown."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Console

from benchmarks import results
from benchmarks.peers import EAGER, PEERS, SDPA, VSTAR_KERNELS
from benchmarks.report import figures
from benchmarks.results import Record, Run
from benchmarks.suites import SUITES

OVERVIEW, BEHIND, FAILURES = "Overview", "Where vstar_kernels is not first", "What failed"
MODELS = "Temporal self-attention of one denoising step"
DISTURBED = "Measured beside other work: not to be relied on"
# Shown even where they are empty.
ALWAYS = (OVERVIEW, BEHIND)
# The others are too wide for it.
IN_THE_TERMINAL = (OVERVIEW, BEHIND, DISTURBED, FAILURES, MODELS)
RATIO_NOTE = "The columns of peers say how many times as long as vstar_kernels they take."
NOT_MEASURED = (results.UNAVAILABLE, results.REFUSED, results.FAILED, results.WRONG)
FILE_COLUMNS = 160  # where the output is no terminal


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``words`` columns hold words, the others figures."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    words: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        columns: Mapping[str, Callable[[Any], str]],
        items: Iterable[Any],
        note: str = "",
        words: int = 1,
    ) -> Table:
        """Returns a table with a row for each item; ``columns`` say what a cell shows of it."""
        rows = [tuple(cell(item) for cell in columns.values()) for item in items]
        return cls(title, tuple(columns), rows, note, words)

    def for_terminal(self) -> rich.table.Table:
        """Returns the table for rich's console."""
        found = rich.table.Table(title=self.title, title_justify="left", caption=self.note or None)
        for index, name in enumerate(self.head):
            found.add_column(name, justify="left" if index < self.words else "right")
        for row in self.rows:
            found.add_row(*row)
        return found

    def markdown(self, heading: str = "## ") -> str:
        """Returns the table under its title, if it has one; its note alone where it has no rows."""
        rule = tuple("---" if index < self.words else "--:" for index in range(len(self.head)))
        lines = [f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows)]
        parts = [
            self.title and f"{heading}{self.title}",
            "\n".join(lines) if self.rows else "",
            self.note,
        ]
        return "\n\n".join(filter(None, parts)) + "\n"


def console() -> Console:
    """Returns a console of the terminal's width, or wide enough for a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def title(peer: str) -> str:
    """Returns what a peer is called in reports."""
    return PEERS[peer].title


def digits(value: float | None) -> str:
    """Returns a figure with at least three digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """Returns a time without its unit."""
    return digits(None if seconds is None else seconds * 1e3)


def percent(value: float | None) -> str:
    """Returns a part of 1 in percent."""
    return "–" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    """Returns a ratio."""
    return "–" if value is None else f"{value:.2f}×"


def size(record: Record) -> str:
    """Returns a case's shape, and what else tells it apart."""
    case, text = record.case, " × ".join(map(str, record.case.shape))
    if case.latents:
        return f"{text}, latents {case.latents[0]} × {case.latents[1]}"
    plural = "s" if case.threads and case.threads > 1 else ""
    return f"{text}, {case.threads} thread{plural}" if case.threads else text


def overview(run: Run) -> Table:
    """Returns a line for each suite and type."""
    rows = []
    for name, suite in SUITES.items():
        records = figures.kernel_records(run, name)
        for dtype in dict.fromkeys(x.case.dtype for x in records):
            found = [x for x in records if x.case.dtype == dtype]
            compared = [x for x in found if figures.fastest_other(x)]
            floors = [y for x in found if (y := x.floor_over_time(VSTAR_KERNELS))]
            ratios = (
                [figures.times_as_long(x, EAGER) for x in found],
                [figures.times_as_long(x, figures.fastest_other(x)) for x in found],
                [figures.times_as_long(x, SDPA) for x in found],
            )
            rows.append(
                (
                    suite.title,
                    dtype,
                    str(len(found)),
                    f"{min(floors):.0%} to {max(floors):.0%}" if floors else "–",
                    *(times(figures.geometric_mean(x)) for x in ratios),
                    f"{len(compared) - len(figures.not_first(found))} of {len(compared)}",
                )
            )
    head = (
        *("suite", "type", "cases", "share of the floor", title(EAGER)),
        *("fastest other with TAR", title(SDPA), "first with TAR"),
    )
    note = (
        f"{RATIO_NOTE} Geometric means over the cases. The floor is the larger of the bytes over "
        "the bandwidth of a copy and the operations over the rate of PyTorch's matrix product, "
        "both measured in the same rounds, the best taken; above 100% the kernels outrun one of "
        "those."
    )
    return Table(OVERVIEW, head, rows, note, words=2)


def models(run: Run) -> Table:
    """Returns the temporal self-attention of one denoising step of each model."""
    columns = {
        "model": lambda x: x.model,
        "type": lambda x: x.dtype,
        "N": lambda x: str(x.frames),
        "calls": lambda x: str(x.calls),
        "vstar_kernels ms": lambda x: milliseconds(x.seconds[VSTAR_KERNELS]),
        title(EAGER): lambda x: times(x.times_as_long(EAGER)),
        "fastest other with TAR": lambda x: (
            f"{times(x.times_as_long(other))} {title(other)}"
            if (other := x.fastest_other())
            else "–"
        ),
        title(SDPA): lambda x: times(x.times_as_long(SDPA)),
        "rows": lambda x: f"÷{x.scale:.3g}" if x.scale > 1 else "all",
    }
    note = (
        f"{RATIO_NOTE} Both samples of classifier-free guidance. Where rows are divided, that many "
        "times fewer were measured at most, and the time multiplied: rows are independent."
    )
    steps = sorted(figures.steps(run), key=lambda x: (x.dtype, x.model, x.frames))
    return Table.of(MODELS, columns, steps, note, words=2)


def cases(run: Run, suite: str) -> Table:
    """Returns a line for each case of a suite."""
    records = figures.kernel_records(run, suite)
    columns = {
        "batch × N × heads × D": size,
        "type": lambda x: x.case.dtype,
        "vstar_kernels ms": lambda x: milliseconds(x.median(VSTAR_KERNELS)),
        "±": lambda x: f"{x.peers[VSTAR_KERNELS].spread or 0:.1%}",
    }
    if any(record.floor for record in records):
        columns["share of the floor"] = lambda x: percent(x.floor_over_time(VSTAR_KERNELS))
        columns["bound by"] = _bound
    for peer in dict.fromkeys(x for record in records for x in record.peers):
        if peer != VSTAR_KERNELS and any(record.median(peer) for record in records):
            columns[title(peer)] = functools.partial(_peer, name=peer)
    columns["MiB"] = functools.partial(_mebibytes, name=VSTAR_KERNELS)
    columns["eager MiB"] = functools.partial(_mebibytes, name=EAGER)
    note = f"{RATIO_NOTE} MiB: the peak beyond inputs and results. {SUITES[suite].note}".strip()
    return Table.of(SUITES[suite].title, columns, records, note, words=2)


def _bound(record: Record) -> str:
    return max(record.floors, key=lambda name: record.floors[name], default="–")


def _peer(record: Record, name: str) -> str:
    """Returns how many times as long as the kernels a peer takes, or why it has no time."""
    if (value := figures.times_as_long(record, name)) is not None:
        return f"{times(value)} {record.peers[name].note}".strip()
    return record.peers[name].status if name in record.peers else "–"


def _mebibytes(record: Record, name: str) -> str:
    peak = record.peers[name].peak_bytes if name in record.peers else None
    return digits(None if peak is None else peak / 2**20)


def allocators(run: Run) -> Table:
    """Returns what fresh memory costs users who leave the allocator as it is."""
    default = {x.case.key: x for x in run.records if x.allocator == figures.DEFAULT}
    peers = (VSTAR_KERNELS, EAGER, SDPA)
    rows = []
    for record in figures.kernel_records(run, "short"):
        other = default.get(record.case.key)
        if other is None or not other.median(VSTAR_KERNELS):
            continue
        cells = [size(record), record.case.dtype]
        for peer in peers:
            warm, fresh = record.median(peer), other.median(peer)
            cells += [milliseconds(fresh), times(fresh / warm if fresh and warm else None)]
        rows.append(tuple(cells))
    columns = (column for peer in peers for column in (f"{title(peer)} ms", "over warm"))
    note = (
        "With glibc's defaults a large output is mapped afresh at every call, and its pages are "
        "cleared. All other tables: an allocator that keeps its memory."
    )
    head = ("batch × N × heads × D", "type", *columns)
    return Table("The default allocator", head, rows, note, words=2)


def peers(run: Run) -> Table:
    """Returns who was compared, and why some were not."""
    rows = []
    for name in run.plan.peers:
        outcomes = [x.peers[name] for x in run.records if name in x.peers]
        counts = {
            status: sum(x.status == status for x in outcomes)
            for status in (results.MEASURED, *NOT_MEASURED)
        }
        text = ", ".join(f"{status} {count}" for status, count in counts.items() if count)
        computes = "TAR" if PEERS[name].tar else "no TAR"
        reasons = dict.fromkeys(x.reason for x in outcomes if x.status == results.UNAVAILABLE)
        rows.append((title(name), name, computes, text, "; ".join(reasons)))
    head = ("peer", "name", "computes", "cases", "why it cannot run here")
    return Table("Peers", head, rows, words=5)


def failures(run: Run) -> Table:
    """Returns cases without figures, and peers that failed, were refused or wrong in a case."""
    rows = []
    for record in run.records:
        if record.failure:
            rows.append((record.key, "all", results.FAILED, record.failure))
        for name, outcome in record.peers.items():
            if outcome.status in NOT_MEASURED and outcome.status != results.UNAVAILABLE:
                rows.append((record.key, title(name), outcome.status, outcome.reason))
    return Table(FAILURES, ("case", "peer", "", "reason"), rows, words=4)


def disturbed(run: Run) -> Table:
    """Returns where other processes had too much of the processor."""
    rows = [(x.key, percent(x.disturbance)) for x in run.records if x.disturbed]
    return Table(DISTURBED, ("case", "share of the processor"), rows)


def behind(run: Run) -> Table:
    """Returns where another that computes TAR is faster."""
    records = figures.kernel_records(run)
    rows = [(record.key, title(name), times(x)) for record, name, x in figures.not_first(records)]
    first = "vstar_kernels is the fastest that computes TAR in every case."
    note = "" if rows else first if records else "Nothing of it was measured."
    return Table(BEHIND, ("case", "first", "its time over ours"), rows, note, words=2)


def all_tables(run: Run) -> list[Table]:
    """Returns the report's tables in order, without the empty ones."""
    found = [
        overview(run),
        behind(run),
        disturbed(run),
        failures(run),
        models(run),
        *(cases(run, name) for name in SUITES),
        allocators(run),
        peers(run),
    ]
    return [table for table in found if table.rows or table.title in ALWAYS]


def listing(run_plan: results.Plan) -> list[Table]:
    """Returns what a run would measure, and why a peer cannot run here."""
    tasks, dtypes = run_plan.tasks, {x.case.dtype: x.case.torch_dtype for x in run_plan.tasks}
    suites = [
        (name, str(sum(x.case.suite == name for x in tasks)), suite.cases.__doc__)
        for name, suite in SUITES.items()
    ]
    cases = [
        (
            task.key,
            "\n".join(f"{use.model} {use.level}" for use in task.case.uses),
            "\n".join(f"{task.case.batch} of {use.full_batch}" for use in task.case.uses),
        )
        for task in tasks
    ]
    peers = []
    for name in run_plan.peers:
        reasons = [PEERS[name].unavailable(run_plan.device, dtype) for dtype in dtypes.values()]
        states = (f"cannot run: {why}" if why else "runs" for why in reasons)
        peers.append((name, "TAR" if PEERS[name].tar else "no TAR", *states))
    return [
        Table("Suites", ("suite", "cases", "what"), suites, words=3),
        Table("Cases", ("case", "model and level", "of its rows"), cases, words=3),
        Table("Peers", ("peer", "computes", *dtypes), peers, words=9),
    ]
