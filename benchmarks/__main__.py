"""The commands of ``python -m benchmarks``: run, compare, report, list."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from benchmarks import results, run
from benchmarks.peers import PEERS, VSTAR_KERNELS
from benchmarks.precompile import compile_kernels
from benchmarks.results import ResultsError
from benchmarks.suites import Selection, plan
from vstar_kernels.cli.options import amount, integer, option, parsed, run_command

OUTPUT = Path("benchmark-output")
COMPILING = 0.4  # of a run's time, at most


@dataclass(frozen=True)
class Run(Selection):
    """Measure, and report."""

    stop_after: Annotated[float | None, parsed(amount, "SECONDS"), option()] = None
    """Begin no case after so many seconds."""
    patience: Annotated[float, parsed(amount, "SECONDS")] = run.PATIENCE
    """Give up a peer that takes longer than so many seconds."""
    compile_jobs: Annotated[int, parsed(integer(0), "N")] = 0
    """Compile a GPU's kernels beforehand, by so many processes."""
    no_report: bool = False
    """Only write the results."""
    output: Annotated[Path | None, option("FILE", default=f"a new one in {OUTPUT}/")] = None
    """Where the results go."""
    resume: Annotated[Path | None, option("FILE")] = None
    """Go on with a run that was interrupted."""

    def run(self) -> int:
        if self.resume:
            path = self.resume
            begun = run.resume(path)
        else:
            planned = plan(self)
            name = f"{planned.device}-{datetime.now():%Y-%m-%dT%H%M%S}.jsonl"
            path = self.output or OUTPUT / name
            begun = run.begin(path, planned)
        print(f"{len(begun.missing)} cases to measure; results in {path}")
        to_go_on = f"To go on: python -m benchmarks run --resume {path}"
        try:
            seconds = math.inf if self.stop_after is None else self.stop_after
            if self.compile_jobs and begun.plan.device == "cuda":
                began = time.monotonic()
                compile_kernels(path, self.compile_jobs, COMPILING * seconds)
                seconds -= time.monotonic() - began
            done = run.measure(path, seconds, self.patience)
        except KeyboardInterrupt:
            print(f"\n{to_go_on}", file=sys.stderr)
            return 130
        if not self.no_report:
            Report(path).run()
        if done.missing:
            print(f"{len(done.missing)} cases are not measured yet. {to_go_on}")
        ours = [(x.key, x.peers[VSTAR_KERNELS]) for x in done.records if x.peers]
        wrong = [f"wrong: {key}: {x.reason}" for key, x in ours if x.status == results.WRONG]
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
        return 1 if wrong else 0


@dataclass(frozen=True)
class Compare:
    """Compare two runs; the exit status is 1 where B is slower than A."""

    a: Positional[Path]
    """The run before."""
    b: Positional[Path]
    """The run after."""
    tolerance: Annotated[float, parsed(amount, "X")] = 0.05
    """How much slower a suite may be."""
    peer: str = VSTAR_KERNELS
    """Whose times are compared."""

    def run(self) -> int:
        from benchmarks.compare import compare
        from benchmarks.report.tables import console

        if self.peer not in PEERS:
            raise ResultsError(f"--peer: there is no {self.peer}; known: {', '.join(PEERS)}")
        before, after = results.load(self.a), results.load(self.b)
        comparison = compare(before, after, peer=self.peer, tolerance=self.tolerance)
        comparison.print(console())
        return 0 if comparison.passed else 1


@dataclass(frozen=True)
class Report:
    """Write the tables and the page of a run."""

    file: Positional[Path]
    output: Annotated[Path | None, option("FILE", default="beside the run's")] = None
    """Where the tables and the page go."""

    def run(self) -> int:
        from benchmarks.report.page import write_report

        write_report(self.file, self.output or self.file)
        return 0


@dataclass(frozen=True)
class List(Selection):
    """Show what a run would measure, and who cannot run here and why."""

    def run(self) -> int:
        from benchmarks.report.tables import console, listing

        for table in listing(plan(self)):
            console().print(table.for_terminal())
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    return run_command(
        {"run": Run, "compare": Compare, "report": Report, "list": List},
        sys.argv[1:] if arguments is None else arguments,
        prog="python -m benchmarks",
        description="Every suite against every peer.",
    )


if __name__ == "__main__":
    raise SystemExit(main())
