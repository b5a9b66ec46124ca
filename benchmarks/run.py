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

from benchmarks import results
from benchmarks.machine import ROOT, differences, environment
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
    results.drop_torn_line(path)
    return run


def measure(path: Path, seconds: float = math.inf) -> Run:
    """Measures what a run's file lacks; after ``seconds`` no case begins.

    A worker that is killed costs the case that it died of.
    """
    deadline = time.monotonic() + seconds
    while (run := results.load(path)).missing and (left := deadline - time.monotonic()) > 0:
        task = run.missing[0]
        ended = _work(path, task.allocator, left)
        if ended > 0:
            raise ResultsError(f"the measuring process ended with exit status {ended}")
        if ended < 0:
            results.drop_torn_line(path)
            killer = signal.Signals(-ended).name
            # It measures in order, so it died of the first that is missing now.
            fatal = next(x for x in results.load(path).missing if x.allocator == task.allocator)
            failed = Record(fatal.case, fatal.allocator, {}, failure=f"ended by {killer}")
            results.append(path, failed)
    return run


def _limited_environment(plan: Plan) -> dict[str, Any]:
    """Lets this process and its workers use no better instructions; returns its environment."""
    os.environ.update(ISAS[plan.isa])
    return environment(plan.device, plan.threads)


def _work(path: Path, allocator: str, seconds: float) -> int:
    command = [sys.executable, "-m", "benchmarks.measure", path.resolve(), allocator, str(seconds)]
    variables = os.environ | (WARM if allocator == "warm" else {})
    return subprocess.run(command, env=variables, cwd=ROOT, check=False).returncode
