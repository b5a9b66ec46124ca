"""The report's tables as plain text cells, for the terminal and in Markdown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import rich.table
from rich.console import Console
from scipy.stats import gmean

from benchmarks import results
from benchmarks.cases import Use
from benchmarks.frames import RULES
from benchmarks.peers import EAGER, PEERS, SDPA, VSTAR_KERNELS, WITHOUT_RULE
from benchmarks.report import figures
from benchmarks.results import Run
from benchmarks.suites import SUITES

OVERVIEW, BEHIND, FAILURES = "Overview", "Where vstar_kernels is not first", "What failed"
MODELS = "Temporal self-attention of one denoising step"
DISTURBED = "Measured beside other work: not to be relied on"
# Shown even where they are empty.
ALWAYS = (OVERVIEW, BEHIND)
# The others are too wide for it.
IN_THE_TERMINAL = (OVERVIEW, BEHIND, DISTURBED, FAILURES, MODELS)
RATIO_NOTE = "The columns of peers say how many times as long as vstar_kernels they take."
STATUSES = (results.MEASURED, results.UNAVAILABLE, results.REFUSED, results.FAILED, results.WRONG)
FILE_COLUMNS = 160  # where the output is no terminal
TITLES = {name: peer.title for name, peer in PEERS.items()}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``words`` columns hold words, the others figures."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1

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
        rule = ["---" if index < self.words else "--:" for index in range(len(self.head))]
        lines = [f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows)]
        title = f"{heading}{self.title}" if self.title else ""
        parts = [title, "\n".join(lines) if self.rows else "", self.note]
        return "\n\n".join(filter(None, parts)) + "\n"


def of_frame(title: str, frame: pd.DataFrame, note: str = "", words: int = 1) -> Table:
    """Returns a table of a frame's cells, with dashes where there are none."""
    cells = frame.astype(object).fillna("–")
    return Table(title, list(cells), cells.to_numpy().tolist(), note, words)


def console() -> Console:
    """Returns a console of the terminal's width, or wide enough for a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def digits(value: float) -> str:
    """Returns a figure with at least three digits."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def written(figures: pd.Series, write: Callable[[float], str]) -> pd.Series:
    """Returns figures as text, missing where they are."""
    return figures.astype(object).map(write, na_action="ignore")


times = partial(written, write="{:.2f}×".format)
percent = partial(written, write="{:.0%}".format)


def milliseconds(seconds: pd.Series) -> pd.Series:
    """Returns times without their unit."""
    return written(seconds * 1e3, digits)


def geometric_mean(ratios: pd.Series) -> float:
    """Returns the geometric mean of the ratios that there are."""
    return float(gmean(ratios, nan_policy="omit")) if ratios.notna().any() else float("nan")


def overview(run: Run) -> Table:
    """Returns a line for each suite and type."""
    rows = []
    for name, suite in SUITES.items():
        of_suite = figures.kernel_rows(run, name)
        for dtype, found in of_suite.groupby("dtype", sort=False):
            ours, others = found[found.peer == VSTAR_KERNELS], figures.fastest_others(found)
            low, high = percent(ours.share.agg(["min", "max"]))
            first = f"{(others.ratio >= 1).sum()} of {len(others)}"
            ratios = (found[found.peer == EAGER], others, found[found.peer == SDPA])
            means = times(pd.Series([geometric_mean(x.ratio) for x in ratios]))
            floors = f"{low} to {high}" if ours.share.any() else None
            rows.append((suite.title, dtype, str(len(ours)), floors, *means, first))
    head = ["suite", "type", "cases", "share of the floor"]
    head += [TITLES[EAGER], "fastest other with TAR", TITLES[SDPA], "first with TAR"]
    note = (
        f"{RATIO_NOTE} Geometric means over the cases. The floor is the larger of the bytes over "
        "the bandwidth of a copy and the operations over the rate of PyTorch's matrix product, "
        "both measured in the same rounds, the best taken; above 100% the kernels outrun one of "
        "those."
    )
    return of_frame(OVERVIEW, pd.DataFrame(rows, columns=head), note, words=2)


def models(run: Run) -> Table:
    """Returns the temporal self-attention of one denoising step of each model."""
    note = (
        f"{RATIO_NOTE} Both samples of classifier-free guidance. Where rows are divided, that many "
        "times fewer were measured at most, and the time multiplied: rows are independent."
    )
    steps = figures.steps(run)
    ours = steps[steps.peer == VSTAR_KERNELS].set_index(figures.STEP)
    ours = ours.sort_values(["dtype", "model", "frames"])
    others = figures.fastest_others(steps, figures.STEP).set_index(figures.STEP)
    ratios = steps.pivot(index=figures.STEP, columns="peer", values="ratio").reindex(columns=PEERS)
    frame = pd.DataFrame(index=ours.index)
    frame["calls"] = ours.calls.astype(str)
    frame["vstar_kernels ms"] = milliseconds(ours.time)
    frame[TITLES[EAGER]] = times(ratios[EAGER])
    frame["fastest other with TAR"] = times(others.ratio) + " " + others.peer.map(TITLES)
    frame[TITLES[SDPA]] = times(ratios[SDPA])
    frame["rows"] = written(ours.scale, lambda x: f"÷{x:.3g}" if x > 1 else "all")
    frame = frame.reset_index(names=["model", "type", "N"]).astype({"N": str})
    return of_frame(MODELS, frame, note, words=2)


def cases(run: Run, suite: str) -> Table:
    """Returns a line for each case of a suite."""
    found = figures.kernel_rows(run, suite)
    ours = found[found.peer == VSTAR_KERNELS].set_index("key")
    frame = pd.DataFrame({"batch × N × heads × D": ours["size"], "type": ours.dtype})
    frame["vstar_kernels ms"] = milliseconds(ours.time)
    frame["±"] = written(ours.spread.fillna(0), "{:.1%}".format)
    if ours.share.any():
        frame["share of the floor"] = percent(ours.share)
        frame["bound by"] = ours.bound
    # How many times as long as the kernels a peer takes, or why it has no time.
    cell = (times(found.ratio) + " " + found.note).str.strip().fillna(found.status)
    cells = found.assign(cell=cell).pivot(index="key", columns="peer", values="cell")
    for peer in found[found.time.notna()].peer.unique():
        if peer != VSTAR_KERNELS:
            frame[TITLES[peer]] = cells[peer]
    peaks = found.pivot(index="key", columns="peer", values="peak_bytes").reindex(columns=PEERS)
    frame["MiB"] = written(peaks[VSTAR_KERNELS] / 2**20, digits)
    frame["eager MiB"] = written(peaks[EAGER] / 2**20, digits)
    note = f"{RATIO_NOTE} MiB: the peak beyond inputs and results. {SUITES[suite].note}".strip()
    return of_frame(SUITES[suite].title, frame, note, words=2)


def frames(run: Run) -> Table:
    """Returns a line for each shape and rule of attention over frames."""
    found = figures.frames(run)
    ours = found[found.peer == VSTAR_KERNELS].set_index("key")
    frame = pd.DataFrame({"model": ours.uses.map(lambda uses: ", ".join(x.model for x in uses))})
    frame["rule"] = ours.rule.map(lambda name: RULES[name].title)
    frame["measured"] = ours["size"].map(lambda size: size.rpartition(",")[0])
    frame["of its operations"] = ours.uses.map(lambda uses: ", ".join(map(share, uses)))
    frame["type"] = ours.dtype
    frame["vstar_kernels ms"] = milliseconds(ours.time) + " " + ours.note
    frame["±"] = written(ours.spread.fillna(0), "{:.1%}".format)
    frame["share of the floor"] = percent(ours.share)
    frame["over no rule"] = times(ours.cost)
    cell = (times(found.ratio) + " " + found.note).str.strip().fillna(found.status)
    cells = found.assign(cell=cell).pivot(index="key", columns="peer", values="cell")
    for peer in found[found.time.notna()].peer.unique():
        if peer not in (VSTAR_KERNELS, WITHOUT_RULE):
            frame[TITLES[peer]] = cells[peer]
    frame["MiB"] = written(ours.peak_bytes / 2**20, digits)
    frame["error"] = written(ours.largest_error, "{:.1e}".format)
    note = (
        f"{RATIO_NOTE} Over no rule: the time over vstar_kernels' own without one, in the same "
        "rounds. The floor is that of the pairs that the rule shows. MiB: the peak beyond inputs "
        "and results. Error: the largest, of sampled tokens against float64. Where a share of its "
        "operations is given, the model's call was scaled down to what was measured: fewer tokens "
        "a frame, less text, fewer heads."
    )
    return of_frame(SUITES["frames"].title, frame, note, words=3)


def transformers(run: Run) -> Table:
    """Returns a line for each video transformer and rule, with every peer's time and memory."""
    suite = SUITES["dit-model"]
    found = figures.kernel_rows(run, "dit-model")
    ours = found[found.peer == VSTAR_KERNELS].set_index("key")
    frame = pd.DataFrame({"model": ours.uses.map(lambda uses: ", ".join(x.model for x in uses))})
    frame["rule"] = ours.rule.map(lambda name: RULES[name].title)
    frame["measured"] = ours["size"].map(lambda size: size.rpartition(",")[0])
    frame["of its attention"] = ours.uses.map(lambda uses: ", ".join(map(share, uses)))
    frame["type"] = ours.dtype
    frame["vstar_kernels ms"] = milliseconds(ours.time) + " " + ours.note
    frame["±"] = written(ours.spread.fillna(0), "{:.1%}".format)
    frame["MiB"] = written(ours.peak_bytes / 2**20, digits)
    ratio = (times(found.ratio) + " " + found.note).str.strip().fillna(found.status)
    cells = found.assign(ratio=ratio).pivot(index="key", columns="peer", values="ratio")
    peaks = found.pivot(index="key", columns="peer", values="peak_bytes")
    for peer in found[found.time.notna()].peer.unique():
        if peer != VSTAR_KERNELS:
            frame[TITLES[peer]] = cells[peer]
            mebibytes = written(peaks[peer] / 2**20, digits)
            frame.insert(frame.shape[1], "MiB", mebibytes, allow_duplicates=True)
    note = (
        f"{RATIO_NOTE} MiB: the peak beyond weights, inputs and results. Where a share of its "
        f"attention is given, frames had fewer tokens. {suite.note}"
    )
    return of_frame(suite.title, frame, note, words=3)


def share(use: Use) -> str:
    """Returns what share of a model's call was measured."""
    return f"1/{1 / use.measured:,.0f}" if use.measured < 1 else "all"


def allocators(run: Run) -> Table:
    """Returns what fresh memory costs users who leave the allocator as it is."""
    found = figures.tidy(run)
    short = found[found.suite == "short"]
    warm, default = (short[short.allocator == x] for x in ("warm", figures.DEFAULT))
    both = warm.merge(default, on=["case", "peer"], suffixes=("_warm", "")).set_index("case")
    ours = both[both.peer == VSTAR_KERNELS]
    frame = pd.DataFrame({"batch × N × heads × D": ours["size"], "type": ours.dtype})
    for name in (VSTAR_KERNELS, EAGER, SDPA):
        of_peer = both[both.peer == name]
        frame[f"{TITLES[name]} ms"] = milliseconds(of_peer.time)
        over_warm = times(of_peer.time / of_peer.time_warm)
        frame.insert(frame.shape[1], "over warm", over_warm, allow_duplicates=True)
    note = (
        "With glibc's defaults a large output is mapped afresh at every call, and its pages are "
        "cleared. All other tables: an allocator that keeps its memory."
    )
    return of_frame("The default allocator", frame, note, words=2)


def peers(run: Run) -> Table:
    """Returns who was compared, and why some were not."""
    rows = []
    for name in run.plan.peers:
        outcomes = [x.peers[name] for x in run.records if name in x.peers]
        counts = Counter(x.status for x in outcomes)
        text = ", ".join(f"{status} {counts[status]}" for status in STATUSES if counts[status])
        reasons = dict.fromkeys(x.reason for x in outcomes if x.status == results.UNAVAILABLE)
        rows.append((TITLES[name], name, computes(name), text, "; ".join(reasons)))
    head = ("peer", "name", "computes", "cases", "why it cannot run here")
    return Table("Peers", head, rows, words=5)


def computes(peer: str) -> str:
    """Returns what a peer computes."""
    return "TAR" if PEERS[peer].tar else "no TAR"


def failures(run: Run) -> Table:
    """Returns cases without figures, and peers that failed, were refused or wrong in a case.

    A peer's cases of one reason share a row.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for record in run.records:
        if record.failure:
            found.setdefault(("all", results.FAILED, record.failure), []).append(record.key)
        for name, outcome in record.peers.items():
            if outcome.status not in (results.MEASURED, results.UNAVAILABLE):
                why = (TITLES[name], outcome.status, outcome.reason)
                found.setdefault(why, []).append(record.key)
    rows = [
        (keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more", *why)
        for why, keys in found.items()
    ]
    return Table(FAILURES, ("case", "peer", "", "reason"), rows, words=4)


def disturbed(run: Run) -> Table:
    """Returns where other processes had too much of the processor."""
    rows = [(x.key, f"{x.disturbance:.0%}") for x in run.records if x.disturbed]
    return Table(DISTURBED, ("case", "share of the processor"), rows)


def behind(run: Run) -> Table:
    """Returns where another that computes TAR is faster."""
    found = figures.kernel_rows(run)
    slower = figures.not_first(found)
    first = "vstar_kernels is the fastest that computes TAR in every case."
    note = "" if len(slower) else first if len(found) else "Nothing of it was measured."
    cells = zip(slower.key, slower.peer.map(TITLES), times(slower.ratio), strict=True)
    return Table(BEHIND, ("case", "first", "its time over ours"), [*cells], note, words=2)


TABLES = {"frames": frames, "dit-model": transformers}  # of suites that have one of their own


def all_tables(run: Run) -> list[Table]:
    """Returns the report's tables in order, without the empty ones."""
    found = [
        *(make(run) for make in (overview, behind, disturbed, failures, models)),
        *(TABLES.get(name, lambda run, name=name: cases(run, name))(run) for name in SUITES),
        allocators(run),
        peers(run),
    ]
    return [table for table in found if table.rows or table.title in ALWAYS]


def listing(plan: results.Plan) -> list[Table]:
    """Returns what a run would measure, and why a peer cannot run here."""
    measured = [task.case for task in plan.tasks]
    counts = Counter(case.suite for case in measured)
    suites = [(name, str(counts[name]), suite.cases.__doc__) for name, suite in SUITES.items()]
    cases = [
        (
            task.key,
            "\n".join(f"{use.model} {use.level}" for use in task.case.uses),
            "\n".join(f"{task.case.batch} of {use.full_batch}" for use in task.case.uses),
        )
        for task in plan.tasks
    ]
    dtypes = {case.dtype: case.torch_dtype for case in measured}
    peers = []
    for name in plan.peers:
        reasons = [PEERS[name].unavailable(plan.device, dtype) for dtype in dtypes.values()]
        states = (f"cannot run: {why}" if why else "runs" for why in reasons)
        peers.append((name, computes(name), *states))
    return [
        Table("Suites", ("suite", "cases", "what"), suites, words=3),
        Table("Cases", ("case", "model and level", "of its rows"), cases, words=3),
        Table("Peers", ("peer", "computes", *dtypes), peers, words=9),
    ]
