"""Random calls of the CPU kernels between guard pages, against the float64 oracle.

    python -m tests.fuzz.fuzz_cpu --calls 10000 [--seed 1] [--operation frames]
    python -m tests.fuzz.fuzz_cpu --case "Case(shape=...)"     # what a failure prints

The calls run in a process of their own, which writes each one down before it makes it: of a crash
there is otherwise nothing left to make it again from. POSIX only, for the guard pages.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

# Threads that spin between calls are a burden on a busy machine; OpenMP reads it as it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tests.fuzz.case import Case, Layout, Runner, cases
from tests.fuzz.columns import ColumnCase, ColumnRunner, column_cases
from tests.fuzz.frames import FrameCase, FrameRunner, frame_cases

OPERATIONS = {
    "tar": (Case, Runner, cases),
    "frames": (FrameCase, FrameRunner, frame_cases),
    "columns": (ColumnCase, ColumnRunner, column_cases),
}


def fuzz(operation: str, calls: int, first_seed: int, record: Path) -> None:
    """Make ``calls`` drawn calls, the present one always in ``record``."""
    _, make_runner, drawn = OPERATIONS[operation]
    runner = make_runner()
    start = time.monotonic()
    done = 0
    step = max(1, min(1000, calls // 10))

    @seed(first_seed)
    @settings(
        max_examples=calls,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn())
    def check(case: Case | FrameCase | ColumnCase) -> None:
        nonlocal done
        record.write_text(repr(case))
        runner.run(case)
        done += 1
        if done % step == 0:
            print(f"{done} of {calls} calls, {time.monotonic() - start:.0f} s", flush=True)

    check()
    print(f"{done} calls of {operation}, no failure")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=10_000, help="of each operation")
    parser.add_argument("--operation", choices=OPERATIONS, help="the only one; else each")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--case", help="make this one call")
    args = parser.parse_args()
    faulthandler.enable()
    if args.case:
        kinds = {kind: make for kind, make, _ in OPERATIONS.values()}
        case = eval(args.case, {x.__name__: x for x in (*kinds, Layout)})
        kinds[type(case)]().run(case)
        print("no failure")
        return 0
    operations = [args.operation] if args.operation else list(OPERATIONS)
    return max(watch(operation, args.calls, args.seed) for operation in operations)


def watch(operation: str, calls: int, first_seed: int) -> int:
    """Have a process make the calls; return 1 if it does not come to an end, and say why."""
    print(f"{calls} calls of {operation}, --seed {first_seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "case"
        # Forked, as this one has imported everything and computed nothing.
        process = multiprocessing.get_context("fork").Process(
            target=fuzz, args=(operation, calls, first_seed, record)
        )
        process.start()
        process.join()
        code = process.exitcode
        if code == 0:
            return 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        case = record.read_text() if record.exists() else None
    print(f"\nfailed: {how}. The last call, to be made again:")
    print(f'  python -m tests.fuzz.fuzz_cpu --case "{case}"', flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
