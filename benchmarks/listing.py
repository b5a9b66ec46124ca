"""``python -m benchmarks list``: what a run would measure, and why a peer cannot run here."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from benchmarks.peers import by_name
from benchmarks.results import Plan
from benchmarks.suites import SUITES


def listing(plan: Plan, console: Console) -> None:
    """Print suites, cases and peers."""
    counts = Counter(task.case.suite for task in plan.tasks)
    suites = Table("suite", "cases", "what", title="Suites")
    for name, suite in SUITES.items():
        suites.add_row(name, str(counts[name]), (suite.__doc__ or "").splitlines()[0])
    console.print(suites)

    cases = Table("case", "model and level", "of its rows", title="Cases")
    for task in plan.tasks:
        uses = task.case.uses
        names = "\n".join(f"{use.model} {use.level}" for use in uses)
        shares = "\n".join(f"{task.case.batch} of {use.rows}" for use in uses)
        cases.add_row(task.key, names, shares)
    console.print(cases)

    peers = Table("peer", "computes", *{t.case.dtype: 0 for t in plan.tasks}, title="Peers")
    for name in plan.peers:
        peer = by_name(name)
        dtypes = dict.fromkeys(task.case.torch_dtype for task in plan.tasks)
        states = [_state(peer.unavailable(plan.device, dtype)) for dtype in dtypes]
        peers.add_row(name, "TAR" if peer.tar else "no TAR", *states)
    console.print(peers)


def _state(why: str) -> str:
    return f"cannot run: {why}" if why else "runs"
