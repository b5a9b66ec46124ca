"""The report's tables as plain text cells; rendered elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import results
from benchmarks.peers import by_name
from benchmarks.report import cells, figures
from benchmarks.report.figures import OURS, PLAIN, THEIRS
from benchmarks.results import Record, Run

SUITE_TITLES = {
    "short": "The models' calls",
    "long": "Long sequences",
    "unet": "Whole UNet steps",
    "backward": "Forward and backward",
    "maps": "With the mean map",
    "overhead": "Overhead of a call",
    "threads": "Threads",
}
OVERVIEW, BEHIND, FAILURES = "Overview", "Where vstar_kernels is not first", "What failed"
MODELS = "Temporal self-attention of one denoising step"
ALWAYS = (OVERVIEW, BEHIND)
DISTURBED = "Measured beside other work: not to be relied on"
# The others are too wide for it.
IN_THE_TERMINAL = (OVERVIEW, BEHIND, DISTURBED, FAILURES, MODELS)
RATIO_NOTE = "The columns of peers say how many times as long as vstar_kernels they take."


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``left`` columns are words, the others figures."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    left: int = 1


def overview(run: Run) -> Table:
    """A line for each suite and type."""
    rows = []
    records = figures.kernels(run)
    for suite, title in SUITE_TITLES.items():
        dtypes = dict.fromkeys(x.case.dtype for x in figures.of_suite(records, suite))
        for dtype in dtypes:
            mine = [x for x in figures.of_suite(records, suite) if x.case.dtype == dtype]
            compared = [x for x in mine if figures.fastest_other(x)]
            first = len(compared) - len(figures.not_first(mine))
            shares = [x for x in (record.share_of_floor(OURS) for record in mine) if x]
            rows.append(
                (
                    title,
                    dtype,
                    str(len(mine)),
                    f"{min(shares):.0%} to {max(shares):.0%}" if shares else "–",
                    cells.times(figures.geometric_mean(figures.ratio(x, THEIRS) for x in mine)),
                    cells.times(
                        figures.geometric_mean(
                            figures.ratio(x, figures.fastest_other(x) or "") for x in mine
                        )
                    ),
                    cells.times(figures.geometric_mean(figures.ratio(x, PLAIN) for x in mine)),
                    f"{first} of {len(compared)}",
                )
            )
    head = (
        *("suite", "type", "cases", "share of the floor", figures.title(THEIRS)),
        *("fastest other with TAR", figures.title(PLAIN), "first with TAR"),
    )
    note = (
        f"{RATIO_NOTE} Geometric means over the cases. The floor is the larger of the bytes over "
        "the bandwidth of a copy and the operations over the rate of PyTorch's matrix product, "
        "both measured in the same rounds, the best taken; above 100% the kernels outrun one of "
        "those."
    )
    return Table(OVERVIEW, head, rows, note, left=2)


def models(run: Run) -> Table:
    """The temporal self-attention of one denoising step of each model."""
    rows = []
    found = figures.steps(run)
    for step in sorted(found, key=lambda x: (x.dtype, x.model, x.frames)):
        ours = step.seconds[OURS]
        others = {x: step.seconds[x] for x in figures.OTHER_TAR if x in step.seconds}
        other = min(others, key=lambda x: others[x], default="")
        rows.append(
            (
                step.model,
                step.dtype,
                str(step.frames),
                f"{step.calls}",
                cells.milliseconds(ours),
                cells.times(step.seconds[THEIRS] / ours if THEIRS in step.seconds else None),
                f"{cells.times(others[other] / ours)} {figures.title(other)}" if other else "–",
                cells.times(step.seconds[PLAIN] / ours if PLAIN in step.seconds else None),
                f"÷{step.scale:.3g}" if step.scale > 1 else "all",
            )
        )
    head = (
        *("model", "type", "N", "calls", "vstar_kernels ms", figures.title(THEIRS)),
        *("fastest other with TAR", figures.title(PLAIN), "rows"),
    )
    note = (
        f"{RATIO_NOTE} Both samples of classifier-free guidance. Where rows are divided, that many "
        "times fewer were measured at most, and the time multiplied: rows are independent."
    )
    return Table(MODELS, head, rows, note, left=2)


def suite(run: Run, name: str) -> Table:
    """A line for each case of a suite."""
    records = figures.of_suite(figures.kernels(run), name)
    peers = [
        peer
        for peer in dict.fromkeys(x for record in records for x in record.peers)
        if peer != OURS and any(record.median(peer) for record in records)
    ]
    columns = COLUMNS if any(record.floor for record in records) else COLUMNS[:-2]
    head = (
        *(title for title, _ in columns),
        *(figures.title(peer) for peer in peers),
        *("MiB", "eager MiB"),
    )
    rows = [
        (
            *(cell(record) for _, cell in columns),
            *(cells.peer(record, peer) for peer in peers),
            *(cells.mebibytes(record, peer) for peer in (OURS, THEIRS)),
        )
        for record in records
    ]
    note = f"{RATIO_NOTE} MiB: the peak beyond inputs and results. {NOTES.get(name, '')}".strip()
    return Table(SUITE_TITLES[name], head, rows, note, left=2)


COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("batch × N × heads × D", cells.shape),
    ("type", lambda x: x.case.dtype),
    ("vstar_kernels ms", lambda x: cells.milliseconds(x.median(OURS))),
    ("±", lambda x: f"{x.peers[OURS].spread or 0:.1%}"),
    ("share of the floor", lambda x: cells.percent(x.share_of_floor(OURS))),
    ("bound by", cells.bound),
)
NOTES = {
    "unet": "ModelScope's UNet with random weights, TAR with σ = 1 on every level but the first "
    "temporal block; batch is its rows at the finest level.",
    "overhead": "One call of many, the CPU's part included.",
    "short": "One call at each level; which models make it stands in the run's file.",
}


def allocators(run: Run) -> Table:
    """What fresh memory costs users who leave the allocator as it is."""
    default = {x.case.key: x for x in run.records if x.task.allocator == figures.DEFAULT}
    rows = []
    for record in figures.of_suite(figures.kernels(run), "short"):
        other = default.get(record.case.key)
        if other is None or not other.median(OURS):
            continue
        line = [cells.shape(record), record.case.dtype]
        for peer in (OURS, THEIRS, PLAIN):
            warm, fresh = record.median(peer), other.median(peer)
            longer = fresh / warm if fresh and warm else None
            line += [cells.milliseconds(fresh), cells.times(longer)]
        rows.append(tuple(line))
    head = ["batch × N × heads × D", "type"]
    for peer in (OURS, THEIRS, PLAIN):
        head += [f"{figures.title(peer)} ms", "over warm"]
    note = (
        "With glibc's defaults a large output is mapped afresh at every call, and its pages are "
        "cleared. All other tables: an allocator that keeps its memory."
    )
    return Table("The default allocator", tuple(head), rows, note, left=2)


def peers(run: Run) -> Table:
    """Who was compared, and why some were not."""
    rows = []
    for name in run.plan.peers:
        outcomes = [x.peers[name] for x in run.records if name in x.peers]
        counts = {
            status: sum(x.status == status for x in outcomes)
            for status in (results.MEASURED, *REASONS)
        }
        text = ", ".join(f"{status} {count}" for status, count in counts.items() if count)
        computes = "TAR" if by_name(name).tar else "no TAR"
        reasons = dict.fromkeys(x.reason for x in outcomes if x.status == results.UNAVAILABLE)
        rows.append((figures.title(name), name, computes, text, "; ".join(reasons)))
    return Table(
        "Peers", ("peer", "name", "computes", "cases", "why it cannot run here"), rows, left=5
    )


REASONS = (results.UNAVAILABLE, results.REFUSED, results.FAILED, results.WRONG)


def failures(run: Run) -> Table:
    """Cases without figures, and peers that failed, were refused or were wrong in a case."""
    rows = []
    for record in run.records:
        if record.failure:
            rows.append((record.task.key, "all", results.FAILED, record.failure))
        for name, outcome in record.peers.items():
            if outcome.status in REASONS and outcome.status != results.UNAVAILABLE:
                rows.append((record.task.key, figures.title(name), outcome.status, outcome.reason))
    return Table(FAILURES, ("case", "peer", "", "reason"), rows, left=4)


def disturbed(run: Run) -> Table:
    """Where other processes had too much of the processor."""
    rows = [
        (record.task.key, cells.percent(record.others))
        for record in run.records
        if record.disturbed
    ]
    return Table(DISTURBED, ("case", "share of the processor"), rows)


def behind(run: Run) -> Table:
    """Where another that computes TAR is faster."""
    rows = [
        (record.task.key, figures.title(name), cells.times(times))
        for record, name, times in figures.not_first(figures.kernels(run))
    ]
    first = "vstar_kernels is the fastest that computes TAR in every case."
    note = "" if rows else first if figures.kernels(run) else "Nothing of it was measured."
    return Table(BEHIND, ("case", "first", "its time over ours"), rows, note, left=2)


def all_tables(run: Run) -> list[Table]:
    """The report's tables in order, without the empty ones."""
    present = dict.fromkeys(record.case.suite for record in figures.kernels(run))
    found = [
        overview(run),
        behind(run),
        disturbed(run),
        failures(run),
        models(run),
        *(suite(run, name) for name in SUITE_TITLES if name in present),
        allocators(run),
        peers(run),
    ]
    return [table for table in found if table.rows or table.title in ALWAYS]
