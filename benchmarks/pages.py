"""``python -m benchmarks.pages``: what new pages for an output cost on a CPU, and what spares it.

glibc maps an output above 32 MiB afresh at every call and gives it back when it is freed, so that
Linux has to find and clear its pages each time. Every setting is measured in a process of its own,
the processes by turns; of each, the median call, the page faults of a call and the peak of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import ROOT, environment
from benchmarks.report.tables import Table
from benchmarks.run import WARM
from vstar_kernels.cli.options import read_options

CALLS = 15  # of a process, after three that are not timed
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Setting:
    """Variables of the environment, and whether the call is given its output."""

    variables: dict[str, str]
    reuses: bool = False


SETTINGS = {
    "default": Setting({}),
    "out=": Setting({}, reuses=True),
    "THP_MEM_ALLOC_ENABLE=1": Setting({"THP_MEM_ALLOC_ENABLE": "1"}),
    "GLIBC_TUNABLES=glibc.malloc.hugetlb=1": Setting({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "MALLOC_TOP_PAD_=67108864": Setting({"MALLOC_TOP_PAD_": "67108864"}),
    " ".join(f"{name}={value}" for name, value in WARM.items()): Setting(WARM),
}
RUN = """
import json, resource, sys, time
import torch
import vstar_kernels as vk

batch, frames, heads, head_dim, threads, calls, reuses = json.loads(sys.argv[1])
torch.set_num_threads(threads)
query, key, value = torch.randn(3, batch, frames, heads, head_dim).unbind()
bias, out = vk.GaussianBias(1.0), torch.empty_like(query).zero_() if reuses else None

def call():
    start = time.perf_counter()
    kept = vk.tar_attention(query, key, value, bias, backend="cpu", out=out)
    return time.perf_counter() - start

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    call()
before = faults()
times = [call() for _ in range(calls)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([times, (faults() - before) / calls, peak]))
"""


@dataclass(frozen=True)
class Options:
    """Measure what new pages for a large output cost, and what spares them."""

    shape: tuple[int, int, int, int] = (2048, 16, 5, 64)
    """(batch, frames, heads, head_dim) of query, key and value, in float32: 42 MB each."""
    threads: int = os.cpu_count() or 1
    """PyTorch's."""
    rounds: int = 5
    """How often all settings are measured by turns."""
    json: Path | None = None
    """Where the figures go besides."""


def measure(setting: Setting, options: Options) -> Any:
    """Returns the seconds of some calls, the page faults of one and the peak, of a process."""
    argument = json.dumps([*options.shape, options.threads, CALLS, setting.reuses])
    names = {name for other in SETTINGS.values() for name in other.variables}
    variables = {name: x for name, x in os.environ.items() if name not in names}
    command = [sys.executable, "-c", RUN, argument]
    told = subprocess.check_output(command, env=variables | setting.variables, cwd=ROOT)
    return json.loads(told)


def _summary(name: str, runs: list[Any]) -> dict[str, Any]:
    """Returns a setting's medians over its processes."""
    return {
        "setting": name,
        "seconds": median(median(times) for times, _, _ in runs),
        "faults": median(faults for _, faults, _ in runs),
        "peak_bytes": median(peak for _, _, peak in runs),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Returns the table of the docs."""
    first = results[0]["seconds"]
    rows = [
        (
            f"`{x['setting']}`" if x["setting"] != "default" else "glibc's default",
            f"{x['seconds'] * 1e3:.1f} ms",
            f"{first / x['seconds']:.2f}×",
            f"{x['faults']:,.0f}",
            f"{x['peak_bytes'] / 2**20:,.0f} MiB",
        )
        for x in results
    ]
    return Table("", ("setting", "a call", "faster", "page faults", "peak of the process"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the file."""
    options = read_options(Options, arguments, prog="python -m benchmarks.pages")
    found: dict[str, list[Any]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, setting in SETTINGS.items():
            found[name].append(measure(setting, options))
    results = [_summary(name, runs) for name, runs in found.items()]
    print(table(results).markdown())
    if options.json is not None:
        huge = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "unknown"
        facts = environment("cpu", options.threads) | {"transparent huge pages": huge}
        record = {
            "settings": {"shape": options.shape, "rounds": options.rounds, "calls": CALLS},
            "environment": facts,
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
