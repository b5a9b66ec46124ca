"""Compiles the kernels that a run will launch, by several processes, before it is timed.

``python -m benchmarks.precompile FILE INDEX COUNT`` is one of them: it makes its share of the calls
that a run's file lacks, of few sequences. Triton keeps what it compiles on the disk.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.machine import ROOT, end_with_parent
from benchmarks.measure import make_operation
from benchmarks.peers import PEERS
from benchmarks.results import Plan, Task

# Kernels are compiled anew for sizes that are multiples of 16: fewer sequences are or are not too.
SEQUENCES, MULTIPLE = 64, 16
WHOLE_MODELS = ("step", "block", "model")  # whose kernels are those of other suites' calls


def compile_kernels(path: Path, jobs: int, seconds: float) -> None:
    """Has so many processes compile for a run's file, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    jobs = min(jobs, len(distinct(results.load(path).missing)))
    command = [sys.executable, "-m", "benchmarks.precompile", str(path.resolve())]
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(jobs):
            process = subprocess.Popen([*command, str(index), str(jobs)], cwd=ROOT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def distinct(tasks: list[Task]) -> list[Case]:
    """Returns the cases with few sequences, one of those that take the same kernels, in order."""
    found: dict[Case, None] = {}
    for task in tasks:
        case = task.case
        if case.operation not in WHOLE_MODELS:
            batch = min(case.batch, SEQUENCES + case.batch % MULTIPLE)
            found.setdefault(replace(case, suite=case.operation, batch=batch, uses=()))
    return list(found)


def call(case: Case, plan: Plan) -> None:
    """Makes a case's call by each of this package's peers."""
    operation = make_operation(case, plan, 1)
    with torch.set_grad_enabled(case.operation.endswith("backward")):
        for name, peer in PEERS.items():
            if peer.ours and name in plan.peers and operation.offers(peer):
                # What fails here fails again where it is measured, which says so.
                with contextlib.suppress(Exception):
                    timed, _ = operation.timed_call(name, peer)
                    timed.function(*operation.inputs[0])


def main(path: Path, index: int, count: int) -> None:
    """Compiles every ``count``-th of a run's kernels, from ``index`` on."""
    run = results.load(path)
    for case in distinct(run.missing)[index::count]:
        with contextlib.suppress(Exception):  # likewise
            call(case, run.plan)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
