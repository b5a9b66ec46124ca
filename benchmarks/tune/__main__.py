"""``python -m benchmarks.tune``: chooses the launch configurations, ``configs*.json``.

With a GPU it measures the candidates that compile without fault and keeps the fastest, for that
GPU's architecture. ``--predict`` needs no GPU: of tiles it keeps the one with the most headroom
over the memory's bandwidth in ``benchmarks.codegen.report``, or the first with enough of it; of
streams and of all gradients the first in order of preference. Those of gradients are chosen by that
alone, with a GPU too, and of a stream's gradients for each of their kernels by itself: in 16 bits
on NVIDIA's GPUs they come in the order of ``benchmarks.units``, which takes minutes and a C
compiler. Neither keeps a configuration that breaks a rule of ``benchmarks.codegen.report``: sizes
without a fit tile get no entry, so that their calls go to the stream kernel. ``--times FILE``
measures where only a file can be taken away, and ``--take FILE`` enters its choices elsewhere. Why
a tile is missing goes into ``benchmarks/codegen/without_tile.json``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.codegen import cases, without_tile
from benchmarks.codegen.cases import Entry, Key
from benchmarks.codegen.compile import in_processes
from benchmarks.tune import choose, times
from vstar_kernels.cli.options import read_options


@dataclass(frozen=True)
class Options(cases.Selection):
    """Which configurations to choose, and how."""

    predict: bool = False
    """Choose by compiled code, for every target, without a GPU."""
    repair: bool = False
    """Keep those that are fit; without a GPU."""
    kernel: tuple[Literal["tile", "stream"], ...] = ("tile", "stream")
    """Families of kernels."""
    direction: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    """Whether of outputs or of gradients."""
    times: Path | None = None
    """Measure, and only write this file: JSON lines, to which a later call adds what it lacks."""
    stop_after: float | None = None
    """With --times, begin nothing after so many seconds."""
    take: Path | None = None
    """Choose as such a file says; needs no GPU."""

    def has(self, key: Key) -> bool:
        """Tells whether a key's configuration is to be chosen."""
        direction = "backward" if key.backward else "forward"
        return super().has(key) and key.family in self.kernel and direction in self.direction


def measured(key: Key) -> Entry | None:
    """Returns the fastest candidate on this GPU."""
    return choose.measured(key)[0]


def measure_into(path: Path, keys: list[Key], options: Options) -> None:
    """Adds the choices that a file of times lacks, after their candidates have been compiled."""
    began, known = time.monotonic(), times.read(path)
    most = math.inf if options.stop_after is None else options.stop_after
    todo = times.in_order_of_value([key for key in keys if key not in known], options.width)
    for first in range(0, len(todo), options.jobs):
        some = todo[first : first + options.jobs]
        list(in_processes(choose.compiled, some, options.jobs, desc="compile", unit="key"))
        for key in some:
            if time.monotonic() - began > most:
                return
            times.append(path, key, *choose.measured(key))


def explain(chosen: Mapping[Key, Entry | None]) -> None:
    """Enters why tiles that were looked for are missing, and takes out what has been found."""
    reasons = without_tile.read()
    for key in set(without_tile.sizes()) & set(chosen):
        reasons.pop(key, None)
        if chosen[key] is None:
            reasons[key] = choose.reason(key)
    without_tile.write(reasons)


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the files of configurations, after each key."""
    options = read_options(Options, arguments, prog="python -m benchmarks.tune")
    if options.take is not None:
        chosen = times.read(options.take)
        if not chosen:
            raise SystemExit(f"{options.take} is not there, or has no choices")
        choose.write(chosen)
        explain(chosen)
        return
    function, jobs = choose.repaired if options.repair else choose.predicted, options.jobs
    if not (options.predict or options.repair):
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU to measure; --predict and --repair need none")
        options = replace(options, target=(cases.this_gpu().architecture,))
        function, jobs = measured, 1
    todo = [key for name in options.target for key in choose.keys(name) if options.has(key)]
    if options.times is not None:
        measure_into(options.times, todo, options)
        return
    missing = []
    for key, entry in zip(todo, in_processes(function, todo, jobs, unit="key"), strict=True):
        if entry is None and not key.frames:
            missing.append(key)
            continue
        choose.write({key: entry})
        explain({key: entry})
    if missing:
        raise SystemExit(f"no stream configuration is fit for {missing}")


if __name__ == "__main__":
    main()
