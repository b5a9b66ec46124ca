"""``python -m benchmarks.cpu``: the CPU kernels against eager TAR, SDPA and their floor.

Every contestant computes the same call on the same inputs, in turn, round after round; a row shows
medians. Results are checked against the float64 oracle first. The *floor* of a case is
max(4 · bytes of one tensor / copy bandwidth, 4 · B·H·N²·D / sgemm rate), both rates measured
between the contestants of the case, the best taken.

Large outputs are mapped afresh by glibc at every call, and clearing their pages can take longer
than the kernel. The first table is therefore measured with an allocator that keeps its memory (the
program starts itself again with the environment that does so), a second one without, as users have
it by default.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import vstar_kernels as vk
from vstar_kernels import native

ALLOCATORS: dict[str, dict[str, str]] = {
    "warm": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"},
    "default": {},
}
# The same limit for the kernels, PyTorch and the libraries below it.
ISAS: dict[str, dict[str, str]] = {
    "avx512": {"VSTAR_KERNELS_CPU_ISA": "avx512"},
    "avx2": {
        "VSTAR_KERNELS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
SIGMA = 1.0
SGEMM_SIZE = 1024


@dataclass(frozen=True)
class Case:
    """One row: a type and the sizes of ``(batch, frames, heads, head_dim)``."""

    dtype: str
    frames: int
    batch: int
    heads: int = 5
    head_dim: int = 64


BATCH = {16: 2048, 32: 1024, 64: 512, 128: 256}
ELEMENTS = 2048 * 16 * 5 * 64  # of one tensor in every case but the long ones
SUITES: dict[str, list[Case]] = {
    "float32": [Case("float32", n, batch) for n, batch in BATCH.items()],
    "16-bit": [Case(t, n, BATCH[n]) for t in ("bfloat16", "float16") for n in (32, 128)],
    "frames": [Case("float32", n, ELEMENTS // (n * 5 * 64)) for n in (24, 48, 96)],
    "head-dims": [
        Case("float32", n, ELEMENTS // (n * 8 * d), heads=8, head_dim=d)
        for d in (40, 80, 96, 160)
        for n in BATCH
    ],
    "long": [Case("float32", n, 8192 // n) for n in (512, 1024, 2048)],
}
# The cases that show whether a second thread is worth its core.
SCALING = [Case("float32", 64, 512), Case("float32", 128, 256), Case("float32", 1024, 8)]


def eager_tar(query: Tensor, key: Tensor, value: Tensor, delta: Tensor) -> Tensor:
    """The formula as VSTAR users run it: materialised, in the inputs' type."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    logits = (q @ k.mT) * query.shape[-1] ** -0.5
    logits = logits + logits.amax(dim=-1, keepdim=True) * delta
    return (logits.softmax(dim=-1) @ v).transpose(1, 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's fused attention, without TAR: a lower bound for those who build on it."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def seconds(function: Callable[[], object]) -> float:
    """One run's wall time."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def check(query: Tensor, key: Tensor, value: Tensor, bias: vk.GaussianBias) -> None:
    """Refuse to time a wrong result."""
    part = [x[:8] for x in (query, key, value)]
    out = vk.tar_attention(query, key, value, bias, backend="cpu")[:8].double()
    expected = vk.reference.tar_attention(*(x.double() for x in part), bias)
    error = (out - expected).abs().max().item()
    allowed = 4 * torch.finfo(query.dtype).eps + 4e-6
    if not error <= allowed:
        raise SystemExit(f"wrong result for {tuple(query.shape)}, {query.dtype}: error {error}")


def random_inputs(case: Case) -> tuple[Tensor, ...]:
    """Query, key and value of a case."""
    shape = (case.batch, case.frames, case.heads, case.head_dim)
    return torch.randn(3, *shape).to(getattr(torch, case.dtype)).unbind()


def measure(case: Case, rounds: int, progress: tqdm) -> dict[str, object]:
    """One row: medians of each contestant in seconds, and the case's floor."""
    query, key, value = random_inputs(case)
    bias = vk.GaussianBias(SIGMA)
    delta = bias.matrix(case.frames).to(query.dtype)
    a, b, c = torch.randn(3, SGEMM_SIZE, SGEMM_SIZE).unbind()
    source, target = torch.randn_like(query), torch.empty_like(query)
    check(query, key, value, bias)

    contestants: dict[str, Callable[[], object]] = {
        "vstar_kernels": lambda: vk.tar_attention(query, key, value, bias, backend="cpu"),
        "eager": lambda: eager_tar(query, key, value, delta),
        "sdpa": lambda: sdpa(query, key, value),
        "copy": lambda: target.copy_(source),
        "sgemm": lambda: torch.mm(a, b, out=c),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():
        function()
    for _ in range(rounds):
        for name, function in contestants.items():
            times[name].append(seconds(function))
        progress.update()

    tensor_bytes = query.numel() * query.element_size()
    bandwidth = 2 * tensor_bytes / min(times["copy"])
    rate = 2 * SGEMM_SIZE**3 / min(times["sgemm"])
    floor = max(4 * tensor_bytes / bandwidth, 4 * query.numel() * case.frames / rate)
    return {
        **asdict(case),
        "seconds": {name: statistics.median(ts) for name, ts in times.items()},
        "quartiles": {name: statistics.quantiles(ts, n=4)[::2] for name, ts in times.items()},
        "copy_bytes_per_second": bandwidth,
        "sgemm_flop_per_second": rate,
        "floor_seconds": floor,
    }


def measure_scaling(rounds: int) -> list[dict[str, object]]:
    """Seconds with one and with two threads, in turn."""
    rows = []
    for case in SCALING:
        call = functools.partial(vk.tar_attention, *random_inputs(case), vk.GaussianBias(SIGMA))
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds + 1):
            for threads, times_of in times.items():
                torch.set_num_threads(threads)
                times_of.append(seconds(call))
        one, two = (statistics.median(ts[1:]) for ts in times.values())
        rows.append({**asdict(case), "one_thread": one, "two_threads": two})
    return rows


def measure_overhead(calls: int = 2000) -> float:
    """Seconds of one call on a tiny input, (1, 16, 1, 64): nearly all of it Python's."""
    query, key, value = torch.randn(3, 1, 16, 1, 64).unbind()
    bias = vk.GaussianBias(SIGMA)

    def run(count: int) -> None:
        for _ in range(count):
            vk.tar_attention(query, key, value, bias)

    run(calls)
    return statistics.median(seconds(lambda: run(calls)) / calls for _ in range(9))


def environment() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "isa": native.load().isa,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vstar_kernels": vk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def measure_all(args: argparse.Namespace) -> dict[str, object]:
    """Every row under the present environment."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = [case for suite in args.suites for case in SUITES[suite]]
    with tqdm(total=len(cases) * args.rounds, desc=args.allocator, unit="round") as progress:
        rows = [measure(case, args.rounds, progress) for case in cases]
    return {
        "allocator": args.allocator,
        "environment": environment(),
        "rounds": args.rounds,
        "rows": rows,
        "overhead_seconds": measure_overhead(),
        "scaling": measure_scaling(args.rounds),
    }


def table(result: dict) -> str:
    """Markdown: milliseconds and ratios of one result."""
    lines = [
        "| type | N | D | batch × heads | vstar_kernels ms | over the floor | eager TAR ms "
        "| faster than it | SDPA without TAR ms | faster than it | copy GB/s | sgemm GFLOP/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        ours, eager, plain = (row["seconds"][x] for x in ("vstar_kernels", "eager", "sdpa"))
        lines.append(
            f"| {row['dtype']} | {row['frames']} | {row['head_dim']} "
            f"| {row['batch']} × {row['heads']} | {ours * 1e3:.2f} "
            f"| {ours / row['floor_seconds']:.2f}× | {eager * 1e3:.1f} | {eager / ours:.1f}× "
            f"| {plain * 1e3:.1f} | {plain / ours:.1f}× "
            f"| {row['copy_bytes_per_second'] / 1e9:.0f} "
            f"| {row['sgemm_flop_per_second'] / 1e9:.0f} |"
        )
    lines.append(f"\nOne call on (1, 16, 1, 64): {result['overhead_seconds'] * 1e6:.1f} µs.")
    for row in result["scaling"]:
        one, two = row["one_thread"], row["two_threads"]
        lines.append(
            f"One thread and two at N = {row['frames']}: {one * 1e3:.1f} and {two * 1e3:.1f} ms, "
            f"{one / two:.2f}×."
        )
    return "\n".join(lines)


def describe(result: dict) -> str:
    """One line for what a result was measured on."""
    facts = result["environment"]
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}, torch {facts['torch']} "
        f"({facts['torch_cpu_capability']}), {result['allocator']} allocator, "
        f"medians of {result['rounds']} rounds:"
    )


def run_child(allocator: str, arguments: list[str], isa: str | None) -> dict:
    """Measure in a process of its own, whose allocator and libraries start with their settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        variables = {**ALLOCATORS[allocator], **(ISAS[isa] if isa else {})}
        subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.cpu", *arguments),
                *("--allocator", allocator, "--output", str(path)),
            ],
            env={**os.environ, **variables},
            check=True,
        )
        return json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, and write them as JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu")
    parser.add_argument(
        "--suites",
        nargs="+",
        default=list(SUITES),
        choices=list(SUITES),
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--isa", choices=ISAS, help="limit the kernels, PyTorch and MKL to this set"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark-output/cpu.json"))
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.allocator:
        args.output.write_text(json.dumps(measure_all(args)))
        return

    if problems := native.load().problems:
        parser.error("; ".join(problems))
    passed_on = [
        "--suites",
        *args.suites,
        "--rounds",
        str(args.rounds),
        "--threads",
        str(args.threads),
    ]
    results = [run_child(allocator, passed_on, args.isa) for allocator in ALLOCATORS]
    parts = [f"{describe(result)}\n\n{table(result)}\n" for result in results]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(parts))
    print("\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
