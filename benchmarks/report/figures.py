"""What the report says of a run's records, as tidy frames: a row for each case and peer."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pandas as pd

from benchmarks.peers import PEERS, VSTAR_KERNELS, WITHOUT_RULE
from benchmarks.results import Run

DEFAULT = "default"  # the allocator's setting
OTHERS_WITH_TAR = tuple(name for name, peer in PEERS.items() if peer.tar and not peer.ours)
STEP = ["model", "dtype", "frames"]
CASE = ["suite", "dtype", "batch", "frames", "heads", "head_dim", "threads", "uses", "item_bytes"]
CASE += ["rule"]
LABELS = ["key", "case", "size", "allocator", "bound", "peer", "status", "note"]
NUMBERS = ["time", "ratio", "spread", "share", "peak_bytes", "bandwidth", "flops_per_second"]
NUMBERS += ["largest_error"]
USE = ["model", "level", "full_batch", "calls", "measured"]


def tidy(run: Run) -> pd.DataFrame:
    """Returns the peers' figures in each case in which the kernels have a time.

    ``ratio`` is a peer's time over the kernels', ``share`` the floor over a peer's time.
    """
    rows = []
    for record in run.records:
        if not (ours := record.median(VSTAR_KERNELS)):
            continue
        case, floors = record.case, record.floors
        shared = vars(case) | {
            "key": record.key,
            "case": case.key,
            "size": case.size,
            "allocator": record.allocator,
            "item_bytes": case.torch_dtype.itemsize,
            "bandwidth": record.bandwidth,
            "flops_per_second": record.flops_per_second,
            "bound": max(floors, key=lambda name: floors[name], default="–"),
        }
        for peer, outcome in record.peers.items():
            figures = {
                "peer": peer,
                "time": outcome.median,
                "ratio": outcome.median and outcome.median / ours,
                "spread": outcome.spread,
                "share": record.floor_over_time(peer),
            }
            rows.append(shared | vars(outcome) | figures)
    return pd.DataFrame(rows, columns=CASE + LABELS + NUMBERS).astype(dict.fromkeys(NUMBERS, float))


def kernel_rows(run: Run, suite: str | None = None) -> pd.DataFrame:
    """Returns the rows of :func:`tidy` that compare kernels: warm allocator, or a GPU."""
    found = tidy(run)
    found = found[found.allocator != DEFAULT]
    return found if suite is None else found[found.suite == suite]


def frames(run: Run) -> pd.DataFrame:
    """Returns the rows of attention over frames; ``cost`` is a time over ours without a rule."""
    found = kernel_rows(run, "frames")
    plain = found[found.peer == WITHOUT_RULE].set_index("key").time
    return found.join(plain.rename("plain"), on="key").eval("cost = time / plain")


def fastest_others(rows: pd.DataFrame, by: str | list[str] = "key") -> pd.DataFrame:
    """Returns, of each case, the row of the fastest of the others that compute TAR."""
    others = rows[rows.peer.isin(OTHERS_WITH_TAR) & rows.time.notna()]
    return others.loc[others.groupby(by, sort=False).time.idxmin()]


def not_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of others that compute TAR and are the fastest of all that do."""
    fastest = fastest_others(rows)
    return fastest[fastest.ratio < 1]


def steps(run: Run) -> pd.DataFrame:
    """Returns the models' denoising steps whose levels the ``short`` suite has all measured.

    A row for each step and peer that was measured at every level: its ``time`` at full size, and
    its ``ratio`` to the kernels'. ``scale`` is the full batch over the measured one, of the level
    most scaled down.
    """
    planned = Counter(
        (use.model, task.case.dtype, task.case.frames)
        for task in run.plan.tasks
        if task.case.suite == "short" and task.allocator != DEFAULT
        for use in task.case.uses
    )
    calls = kernel_rows(run, "short").explode("uses", ignore_index=True)
    calls = calls.drop(columns="uses").join(pd.DataFrame(map(asdict, calls.uses), columns=USE))
    calls["scale"] = calls.full_batch / calls.batch
    calls["time"] *= calls.scale * calls.calls
    groups = calls.groupby([*STEP, "peer"], sort=False)
    found = groups.agg({"time": "sum", "calls": "sum", "scale": "max"})
    found = found.assign(levels=groups.time.count()).reset_index()
    found = found[found.levels == [planned[step] for step in found[STEP].itertuples(index=False)]]
    ours = found[found.peer == VSTAR_KERNELS].set_index(STEP).time
    return found.join(ours.rename("ours"), on=STEP).eval("ratio = time / ours")
