"""``python -m benchmarks.worker FILE ALLOCATOR SECONDS``: measures what a run's file lacks.

A process of its own for each allocator setting, because the allocator reads it once, at the start;
and because a peer that brings a process down must not take the run with it.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import results
from benchmarks.measure import measure
from benchmarks.peers.peer import reason
from benchmarks.results import Plan, Record, Task


def record(task: Task, plan: Plan, progress: tqdm) -> Record:
    """A task's record, or the reason why there is none."""
    # A case may fail in any way; the others still run.
    try:
        return measure(task, plan, lambda doing: progress.set_postfix_str(doing))
    except Exception as error:
        return Record(task, {}, failure=reason(error))


def main(path: Path, allocator: str, seconds: float) -> None:
    """Measure this allocator's tasks in order, writing each as it ends.

    None begins after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    logging.getLogger("xformers").setLevel(logging.ERROR)  # its reasons are in the results
    run = results.load(path)
    missing = [task for task in run.missing if task.allocator == allocator]
    total = len(run.plan.tasks)
    with tqdm(total=total, initial=total - len(run.missing), unit="case") as progress:
        for task in missing:
            if time.monotonic() > deadline:
                break
            progress.set_description(task.key)
            results.append(path, record(task, run.plan, progress))
            progress.update()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
