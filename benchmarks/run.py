"""``python -m benchmarks run``: plans a run, and has workers measure it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import json_lines, results
from benchmarks.machine import ROOT, differences, environment
from benchmarks.progress import RESTART, Progress, Trouble
from benchmarks.results import Plan, Record, ResultsError, Run

# Large outputs are mapped afresh by glibc at every call, and clearing their pages can take longer
# than the kernel; "warm" keeps them. "default" is what users have by default, "" is on a GPU.
WARM = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
# The same limit for the kernels, PyTorch and the libraries below it.
ISAS = {
    None: {},
    "avx512": {"VSTAR_KERNELS_CPU_ISA": "avx512"},
    "avx2": {
        "VSTAR_KERNELS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


PATIENCE = 900.0  # seconds, for a CPU that computes a whole model
POLL = 0.2  # seconds


class StuckError(Exception):
    """A worker has begun nothing for too long."""


def begin(path: Path, plan: Plan) -> Run:
    """Begins a run's file."""
    results.create(path, _limited_environment(plan), plan)
    return results.load(path)


def resume(path: Path) -> Run:
    """Takes up an interrupted run. Raises ResultsError where another environment would go on."""
    run = results.load(path)
    now = _limited_environment(run.plan)
    different = differences(run.environment, now)
    if run.environment["commit"] != now["commit"]:
        different.append(f"commit: {run.environment['commit']} and {now['commit']}")
    if different:
        raise ResultsError(f"{path} was begun in another environment: {'; '.join(different)}")
    json_lines.drop_torn_line(path)
    return run


def measure(path: Path, seconds: float = math.inf, patience: float = PATIENCE) -> Run:
    """Measures what a run's file lacks; after ``seconds`` no case begins.

    A worker that is killed, or that begins nothing for ``patience`` seconds, costs the peer that it
    died of, or the case where all peers were at work.
    """
    deadline = time.monotonic() + seconds
    while (run := results.load(path)).missing and (left := deadline - time.monotonic()) > 0:
        before = len(run.missing), Progress.beside(path).troubles
        allocator = run.missing[0].allocator
        try:
            ended, why = _work(path, allocator, left, patience), ""
        except StuckError as stuck:
            ended, why = -signal.SIGKILL, str(stuck)
        json_lines.drop_torn_line(path)
        if ended < 0:
            _blame(path, allocator, why or f"ended by {signal.Signals(-ended).name}")
        elif ended not in (0, RESTART):
            raise ResultsError(f"the measuring process ended with exit status {ended}")
        if before == (len(results.load(path).missing), Progress.beside(path).troubles) and ended:
            raise ResultsError("a new measuring process met what the last one did")
    Progress.beside(path).path.unlink(missing_ok=True)
    return run


def _blame(path: Path, allocator: str, why: str) -> None:
    """Notes what a worker died of: a peer, or the case in which nobody's name is known."""
    # It measures in order, so it died of the first that is missing now.
    fatal = next(x for x in results.load(path).missing if x.allocator == allocator)
    progress = Progress.beside(path)
    if progress.task == fatal.key and progress.peer:
        progress.add(progress.peer, Trouble(why, fatal=True))
    else:
        results.append(path, Record(fatal.case, fatal.allocator, {}, failure=why))


def _limited_environment(plan: Plan) -> dict[str, Any]:
    """Lets this process and its workers use no better instructions; returns its environment."""
    os.environ.update(ISAS[plan.isa])
    return environment(plan.device, plan.threads)


def _work(path: Path, allocator: str, seconds: float, patience: float) -> int:
    """Runs a worker; returns its exit status. Raises StuckError where it begins nothing more."""
    began, progress = time.monotonic(), Progress.beside(path)
    with _start(path, allocator, seconds) as worker:
        try:
            while True:
                try:
                    return worker.wait(POLL)
                except subprocess.TimeoutExpired:
                    pass
                if min(progress.still(), time.monotonic() - began) > patience:
                    raise StuckError(f"hung for {patience:g} s")
        finally:  # whatever ends this process, ends its worker
            worker.kill()


def _start(path: Path, allocator: str, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.measure", path.resolve(), allocator, str(seconds)]
    variables = os.environ | (WARM if allocator == "warm" else {})
    return subprocess.Popen(command, env=variables, cwd=ROOT)
