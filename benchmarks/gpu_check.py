"""``python -m benchmarks.gpu_check``: the checks that need a GPU, by stages that can be resumed.

Stages are run in order until the time is up. Each writes its results as they come, is stopped at
its limit with all that it started, and goes on where an earlier run's results are given. A run of
stages leaves few files: one of JSON lines for each stage, ``log.txt`` and ``summary.md``.
``gpu_check.sh`` begins it where packages are missing; docs/benchmarks.md says how.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from benchmarks import json_lines, pytest_lines, results
from benchmarks.machine import ROOT, end_with_parent
from benchmarks.results import ResultsError
from vstar_kernels.cli.options import integer, number, parsed, read_options, several

MOST_JOBS = 16
PATIENCE = 90.0  # seconds for one peer of a case, or one test, kernels compiled by then
REPORTING = 15.0  # seconds of the limit for the summary
MOMENT = 5.0  # seconds that a stopped program has to end in order
TESTS = {
    "tests": (
        "tests/attention/test_triton_gpu.py",
        "tests/attention/test_triton.py",
        "tests/attention/columns/test_triton.py",
        "tests/attention/frames/test_triton.py",
        "tests/benchmarks/test_clock.py",
    ),
    "shipped": ("-m", "shipped", "tests/attention/test_shipped.py"),
}
INTERPRETED = "test_window or test_streams or 1-gaussian"  # quick ones, where there is no GPU
SANITIZERS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Stage:
    """A part of the checks: the run it is in, what it does, and its seconds at most.

    ``suites`` are those that ``python -m benchmarks run`` measures, with its options.
    """

    name: str
    run: int
    title: str
    limit: float
    suites: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def measured(name: str, run: int, limit: float, title: str, suites: str, options: str) -> Stage:
    """Returns a stage that measures suites."""
    return Stage(name, run, title, limit, tuple(suites.split()), tuple(options.split()))


# In order of value: correctness; the models' calls by numbers of frames; long ones; whole models.
STAGES = (
    Stage("tests", 1, "the kernels' tests, in parallel", 540),
    measured("tile", 2, 330, "the models' calls, up to 128 frames", "short",
             "--frames 32 64 128 16 48 "
             "--peers eager sdpa-bias xformers-bias strength-0 sdpa xformers flash-attn"),
    measured("long", 2, 150, "256 to 8,192 frames", "long",
             "--long-frames 1024 4096 256 2048 8192 512 "
             "--peers eager sdpa-bias strength-0 sdpa flash-attn"),
    measured("gradients", 2, 120, "gradients, maps, the overhead of a call",
             "overhead maps backward", "--frames 16 64 32 128 --peers eager without-map sdpa"),
    measured("unet", 3, 150, "UNet steps in CUDA graphs", "unet", "--peers eager sdpa"),
    measured("frames", 3, 210, "attention over frames, under every rule", "frames",
             "--transformers wan2.1-1.3b-480p cogvideox-5b-480p ltx-2-512x768 wan2.1-14b-480p "
             "hunyuanvideo-720p --peers composed sdpa-bias ultravico strength-0 sdpa flash-attn "
             "sage"),
    measured("columns", 3, 90, "attention to a text with maps of words", "cross cross-backward",
             "--peers eager sdpa-weights sdpa-values"),
    measured("transformers", 3, 120, "whole video transformers", "dit-model",
             "--peers composed strength-0 sdpa"),
    Stage("tune", 4, "the tiles' candidates, timed", 180),
    measured("compiled", 4, 150, "some calls against torch.compile and FlexAttention", "short",
             "--frames 64 16 128 --models videocrafter2-320x512 animatediff-sd15-512x512 "
             "--peers eager-compiled flex sdpa"),
    measured("frames-compiled", 4, 90, "attention over frames against FlexAttention", "frames",
             "--transformers wan2.1-1.3b-480p --peers flex-frames sdpa"),
    Stage("sanitizer", 4, "compute-sanitizer over a call of each kernel", 180),
    Stage("shipped", 5, "the calls of every shipped configuration, in parallel", 540),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
RUNS = tuple(sorted({str(stage.run) for stage in STAGES}))
# Beyond ``--quick``, of what a CPU interprets or computes at length.
QUICK = (
    *("--quick", "--rounds", "2", "--seconds", "0.1", "--frames", "16", "--long-frames", "256"),
    *("--models", "modelscope-256x256", "--transformers", "wan2.1-1.3b-480p", "--rules", "tar"),
)


def stages_of(text: str) -> tuple[Stage, ...]:
    """Reads a run's number, or a stage's name."""
    if text not in (*RUNS, *BY_NAME):
        known = ", ".join((*RUNS, *BY_NAME))
        raise ValueError(f"must be a run or a stage, got {text!r}; known: {known}")
    return tuple(stage for stage in STAGES if text in (str(stage.run), stage.name))


def above_zero(text: str) -> float:
    """Reads a finite number above 0."""
    found = number(text)
    if found <= 0:
        raise ValueError(f"must be a number above 0, got {text!r}")
    return found


@dataclass(frozen=True)
class Options:
    """Check a GPU: tests, figures, a sanitizer."""

    stages: Positional[Annotated[tuple[tuple[Stage, ...], ...], several(stages_of, "RUN|STAGE")]]
    """Runs of ten minutes, 1 to 5, or stages."""
    output: Path = Path("benchmark-output/gpu_check")
    """A folder for the results."""
    resume: Path | None = None
    """A folder with results of these stages to go on with."""
    limit: Annotated[float, parsed(above_zero, "SECONDS")] = 570.0
    """Seconds for all."""
    device: Literal["cuda", "cpu"] = "cuda"
    """A CPU, for a dry run."""
    quick: bool = False
    """Do little of each stage."""
    jobs: Annotated[int, parsed(integer(1), "N")] = min(MOST_JOBS, os.cpu_count() or 1)
    """Processes that compile and test."""


@dataclass
class Check:
    """A run of stages: how far each has come, and how long it took."""

    options: Options
    began: float = field(default_factory=time.monotonic)
    states: dict[str, tuple[str, float]] = field(default_factory=dict)
    bad: bool = False

    def left(self) -> float:
        """Returns the seconds that stages may still take."""
        return self.options.limit - REPORTING - (time.monotonic() - self.began)

    def run(self) -> int:
        """Runs the stages; returns the exit status, 1 where something is wrong."""
        output, resume = self.options.output, self.options.resume
        if resume and not resume.is_dir():
            raise SystemExit(f"resume must be a folder with results, {resume} is none")
        output.mkdir(parents=True, exist_ok=True)
        todo = list(dict.fromkeys(x for stages in self.options.stages for x in stages))
        try:
            for stage in todo:
                file = output / f"{stage.name}.jsonl"
                if resume and not file.exists():
                    earlier = resume / file.name
                    if earlier.exists():
                        shutil.copyfile(earlier, file)
                began = time.monotonic()
                if self.left() <= 0:
                    self.states[stage.name] = ("not begun: no time left", 0.0)
                    continue
                print(f"{stage.name}: {stage.title}", flush=True)
                limit = stage.limit if self.options.device == "cuda" else math.inf
                try:
                    state = self._stage(stage, file, min(limit, self.left()))
                except (OSError, ValueError, ResultsError) as error:  # of a file that is not ours
                    self.bad, state = True, f"{type(error).__name__}: {error}"
                self.states[stage.name] = (state, time.monotonic() - began)
                print(f"{stage.name}: {state}", flush=True)
        finally:
            self._summarise(todo)
        return 1 if self.bad else 0

    def _stage(self, stage: Stage, file: Path, seconds: float) -> str:
        """Runs one stage; returns how it ended."""
        special = {"sanitizer": self._sanitize, "tune": self._tune}
        special |= {name: functools.partial(self._tests, files) for name, files in TESTS.items()}
        return special.get(stage.name, lambda *args: self._measure(stage, *args))(file, seconds)

    def _measure(self, stage: Stage, file: Path, seconds: float) -> str:
        command = ["-m", "benchmarks", "run", "--no-report", "--patience", str(PATIENCE)]
        command += ["--stop-after", str(max(1.0, seconds - MOMENT))]
        command += ["--compile-jobs", str(self.options.jobs)]
        if file.exists():
            command += ["--resume", str(file)]
        else:
            command += ["--output", str(file), "--device", self.options.device]
            command += ["--suites", *stage.suites, *stage.options]
            command += QUICK if self.options.quick else ()
        finished = file.exists() and not results.load(file).missing
        ended = 0 if finished else self._python(command, seconds)
        if not file.exists():
            self.bad = True
            return f"ended with status {ended}, without results"
        run = results.load(file)
        done, failed = len(run.records), sum(bool(x.failure) for x in run.records)
        wrong = sum(x.status == results.WRONG for r in run.records for x in r.peers.values())
        self.bad |= bool(ended or failed or wrong)
        notes = [f"{done} of {len(run.plan.tasks)} cases"]
        notes += [f"{failed} failed"] if failed else []
        notes += [f"{wrong} wrong results"] if wrong else []
        notes += [f"status {ended}: log.txt says why"] if ended else []
        return ", ".join(notes)

    def _tests(self, files: Sequence[str], file: Path, seconds: float) -> str:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.pytest_lines"]
        command += ["--lines", str(file.resolve()), "--patience", str(PATIENCE)]
        before = file.with_suffix(".before")
        if file.exists():
            # What is left out may not change while processes are started anew.
            shutil.copyfile(file, before)
            command += ["--but", str(before.resolve())]
        # A few at a time and in order: the most important ones come first.
        command += ["-n", str(self.options.jobs), "--dist", "load", "--maxschedchunk", "2"]
        command += ["--max-worker-restart", "1000"]
        environment = {"HYPOTHESIS_PROFILE": "ci"}
        if self.options.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            command += ["-k", INTERPRETED] if self.options.quick else []
        ended = self._python([*command, *files], seconds, environment)
        before.unlink(missing_ok=True)
        found = [x["outcome"] for x in pytest_lines.read(file).values()]
        counts = {name: found.count(name) for name in ("passed", "skipped", "failed")}
        self.bad |= bool(counts["failed"]) or ended not in (0, 5, None)
        stopped = ", stopped at its limit" if ended is None else ""
        return ", ".join(f"{n} {name}" for name, n in counts.items()) + stopped

    def _tune(self, file: Path, seconds: float) -> str:
        if self.options.device == "cpu":
            return "times nothing without a GPU"
        command = ["-m", "benchmarks.tune", "--times", str(file), "--jobs", str(self.options.jobs)]
        command += ["--stop-after", str(max(1.0, seconds - MOMENT))]
        command += ["--kernel", "tile", "--direction", "forward", "--kind", "16-bit"]
        command += ["--width", *(["64"] if self.options.quick else ["64", "48", "80", "160"])]
        ended = self._python(command, seconds)
        count = len(file.read_text().splitlines()) if file.exists() else 0
        self.bad |= ended not in (0, None)
        return f"{count} configurations chosen" + (f", status {ended}" if ended else "")

    def _sanitize(self, file: Path, seconds: float) -> str:
        tools = pytest_lines.read(file)
        calls = ["-m", "benchmarks.kernel_calls", "--device", self.options.device]
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.access(program, os.X_OK):
            ended = self._python(calls, seconds)
            self.bad |= ended != 0
            how = {0: "ran", None: "were stopped at their limit"}.get(ended, f"ended with {ended}")
            return f"compute-sanitizer is not installed: the calls {how} without it"
        deadline = time.monotonic() + seconds
        self._python(calls, seconds / 3)  # which compiles them
        # PyTorch's caching allocator would hide accesses past the end of a tensor.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tried, tool in enumerate(SANITIZERS):
            if tools.get(tool, {}).get("outcome") == "passed":
                continue
            began = time.monotonic()
            share = (deadline - began) / (len(SANITIZERS) - tried)
            command = [
                program,
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                "--target-processes",
                "all",
            ]
            ended = self._command([*command, sys.executable, *calls], share, environment)
            outcome = {0: "passed", None: "stopped at its limit"}.get(ended, f"status {ended}")
            line = {"test": tool, "outcome": outcome, "seconds": time.monotonic() - began}
            json_lines.append(file, line)
        found = {name: x["outcome"] for name, x in pytest_lines.read(file).items()}
        self.bad |= any("status" in outcome for outcome in found.values())
        return ", ".join(f"{name} {outcome}" for name, outcome in found.items())

    def _python(
        self, arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None
    ) -> int | None:
        return self._command([sys.executable, *arguments], seconds, environment)

    def _command(
        self, command: Sequence[str], seconds: float, environment: dict[str, str] | None = None
    ) -> int | None:
        """Runs a program, its output in the log; returns its status, None if it was stopped."""
        with (self.options.output / "log.txt").open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            with started(command, log, environment or {}) as process:
                try:
                    return process.wait(max(0.0, seconds))
                except subprocess.TimeoutExpired:
                    return None

    def _summarise(self, todo: list[Stage]) -> None:
        """Prints and writes how the stages ended, and writes the tables of what they measured."""
        rows = ["| stage | result | seconds |", "|---|---|--:|"]
        rows += [f"| {stage.name} | {self._told(stage)} |" for stage in todo]
        parts = ["# Stages\n", *rows, ""]
        print(*parts, sep="\n")
        for stage in todo:
            file = self.options.output / f"{stage.name}.jsonl"
            if stage.suites and file.exists():
                parts += [f"# {stage.name}: {stage.title}\n", tables(file)]
            elif stage.name != "tune" and file.exists():
                parts += _failures(file)
        (self.options.output / "summary.md").write_text("\n".join(parts), encoding="utf-8")

    def _told(self, stage: Stage) -> str:
        state, seconds = self.states.get(stage.name, ("stopped", 0.0))
        return f"{state} | {seconds:.0f}"


def _failures(file: Path) -> list[str]:
    """Returns why tests failed, or why that is not known."""
    try:
        failed = [x for x in pytest_lines.read(file).values() if x["outcome"] == "failed"]
    except (OSError, ValueError) as error:
        return [f"No outcomes: {error}\n"]
    return [f"- {x['test']}:\n\n```\n{x.get('why', '')}\n```\n" for x in failed]


def tables(file: Path) -> str:
    """Returns the tables of a run's file, whatever there is of it; or why there are none."""
    from benchmarks.report.page import describe
    from benchmarks.report.tables import all_tables

    try:
        run = results.load(file)
        return "\n".join([f"{describe(run)}\n", *(x.markdown() for x in all_tables(run))])
    except (ResultsError, ValueError, KeyError) as error:
        return f"No tables: {error}\n"


@contextmanager
def started(
    command: Sequence[str], log: object, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program in a group of its own, which ends when the body does, however that ends."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=log,  # type: ignore[arg-type]  # a file that is open for writing
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(MOMENT)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages that are asked for."""
    options = read_options(Options, arguments, prog="benchmarks/gpu_check.sh")

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for request in (signal.SIGTERM, signal.SIGINT):  # what runs is stopped, the summary written
        signal.signal(request, end)
    return Check(options).run()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
