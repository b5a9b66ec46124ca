"""``python -m benchmarks.cpu_backward``: CPU gradients and mean maps, their speed and memory.

Forward and backward together are measured against autograd through eager TAR and through SDPA,
which has no TAR, and against their floor: max(bytes of the eleven tensors that they read and write
/ copy bandwidth, their seven products of N×N×D / sgemm rate). The kernels are called without
autograd around them. The mean map is what it adds to the forward.

Memory is what a process of its own takes at most, beyond what it holds anyway: inputs, output,
the output's gradient and the three gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import vstar_kernels as vk
from benchmarks.cpu import (
    ALLOCATORS,
    SGEMM_SIZE,
    SIGMA,
    Case,
    describe,
    eager_tar,
    environment,
    random_inputs,
    sdpa,
    seconds,
)
from vstar_kernels import native
from vstar_kernels.bias import gaussian_table
from vstar_kernels.ops import STAT_NUMBERS

CASES = [Case("float32", n, batch) for n, batch in ((16, 512), (32, 512), (64, 512), (128, 256))]
MEMORY_CASE = CASES[-1]
CONTESTANTS = ("vstar_kernels", "eager", "sdpa")


class Kernels:
    """The operators for one case, as the autograd layer calls them."""

    def __init__(self, frames: int, head_dim: int) -> None:
        native.load()
        self._bias = gaussian_table(SIGMA, frames)[None]
        self._scale = head_dim**-0.5

    def forward(self, *inputs: Tensor, mean_map: bool = False) -> Tensor:
        out = torch.empty_like(inputs[0])
        batch, frames = out.shape[:2]
        means = out.new_empty(batch, frames, frames, dtype=torch.float32) if mean_map else None
        torch.ops.vstar_kernels.cpu_forward(out, means, *inputs, *self._options())
        return out

    def backward(self, grad_out: Tensor, *inputs: Tensor) -> list[Tensor]:
        grads = [torch.empty_like(x) for x in inputs]
        torch.ops.vstar_kernels.cpu_backward(
            *grads, None, None, grad_out, None, *inputs, *self._options(), False
        )
        return grads

    def both(self, grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.forward(*inputs), self.backward(grad_out, *inputs)

    def _options(self) -> tuple[object, ...]:
        return self._bias, None, self._scale, 1.0, STAT_NUMBERS["row_max"], False


def through_autograd(
    function: Callable[..., Tensor], grad_out: Tensor, *inputs: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The output of a differentiable function and its gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad_out))


def contestants(case: Case) -> dict[str, Callable[..., tuple[Tensor, list[Tensor]]]]:
    """Each takes the output's gradient and the inputs, and returns the output and gradients."""
    delta = vk.GaussianBias(SIGMA).matrix(case.frames).to(getattr(torch, case.dtype))
    return {
        "vstar_kernels": Kernels(case.frames, case.head_dim).both,
        "eager": lambda *tensors: through_autograd(
            lambda q, k, v: eager_tar(q, k, v, delta), *tensors
        ),
        "sdpa": lambda *tensors: through_autograd(sdpa, *tensors),
    }


def check(case: Case, grad_out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Refuse to time wrong gradients."""
    part = [x[:8].double() for x in (grad_out, *inputs)]
    ours = Kernels(case.frames, case.head_dim).backward(grad_out, *inputs)
    bias = vk.GaussianBias(SIGMA)
    _, expected = through_autograd(lambda *x: vk.reference.tar_attention(*x, bias), *part)
    for x, exact in zip(ours, expected, strict=True):
        error = ((x[:8] - exact).norm() / exact.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"wrong gradients for {case}: relative error {error}")


def measure(case: Case, rounds: int, progress: tqdm) -> dict[str, object]:
    """One row: medians of each contestant in seconds, and the case's floor."""
    inputs = random_inputs(case)
    grad_out = torch.randn_like(inputs[0])
    check(case, grad_out, inputs)
    kernels = Kernels(case.frames, case.head_dim)
    a, b, c = torch.randn(3, SGEMM_SIZE, SGEMM_SIZE).unbind()
    source, target = torch.randn_like(grad_out), torch.empty_like(grad_out)

    functions: dict[str, Callable[[], object]] = {
        name: lambda function=function: function(grad_out, *inputs)
        for name, function in contestants(case).items()
    }
    functions |= {
        "forward": lambda: kernels.forward(*inputs),
        "forward with map": lambda: kernels.forward(*inputs, mean_map=True),
        "copy": lambda: target.copy_(source),
        "sgemm": lambda: torch.mm(a, b, out=c),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
        progress.update()

    tensor_bytes = grad_out.numel() * grad_out.element_size()
    bandwidth = 2 * tensor_bytes / min(times["copy"])
    rate = 2 * SGEMM_SIZE**3 / min(times["sgemm"])
    products = 7 * 2 * grad_out.numel() * case.frames
    return {
        **asdict(case),
        "seconds": {name: statistics.median(ts) for name, ts in times.items()},
        "quartiles": {name: statistics.quantiles(ts, n=4)[::2] for name, ts in times.items()},
        "copy_bytes_per_second": bandwidth,
        "sgemm_flop_per_second": rate,
        "floor_seconds": max(11 * tensor_bytes / bandwidth, products / rate),
    }


def resident(field: str) -> int:
    """Bytes in memory: ``VmRSS`` now, ``VmHWM`` at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measure_memory(contestant: str) -> int:
    """Bytes that one forward and backward take beyond inputs, output and gradients."""
    case = MEMORY_CASE
    # Libraries make room for themselves at their first call.
    small = Case(case.dtype, case.frames, batch=2)
    tensors = random_inputs(small)
    contestants(small)[contestant](tensors[0], *tensors)
    inputs = random_inputs(case)
    grad_out = torch.randn_like(inputs[0])
    function = contestants(case)[contestant]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    out, grads = function(grad_out, *inputs)
    kept = sum(x.numel() * x.element_size() for x in (out, *grads))
    return resident("VmHWM") - before - kept


def measure_all(args: argparse.Namespace) -> dict[str, object]:
    """Every row under the present environment."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tqdm(total=len(CASES) * args.rounds, desc="gradients", unit="round") as progress:
        rows = [measure(case, args.rounds, progress) for case in CASES]
    return {
        "allocator": "warm",
        "environment": environment(),
        "rounds": args.rounds,
        "rows": rows,
    }


def table(result: dict) -> str:
    """Markdown: milliseconds and ratios of one result."""
    lines = [
        "| N | D | batch × heads | vstar_kernels ms | over the floor | eager TAR ms "
        "| faster than it | SDPA without TAR ms | faster than it | forward ms | the map adds |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        ours, eager, plain = (row["seconds"][name] for name in CONTESTANTS)
        forward, mapped = (row["seconds"][name] for name in ("forward", "forward with map"))
        lines.append(
            f"| {row['frames']} | {row['head_dim']} | {row['batch']} × {row['heads']} "
            f"| {ours * 1e3:.2f} | {ours / row['floor_seconds']:.2f}× "
            f"| {eager * 1e3:.1f} | {eager / ours:.1f}× | {plain * 1e3:.1f} | {plain / ours:.1f}× "
            f"| {forward * 1e3:.2f} | {mapped / forward - 1:.0%} |"
        )
    memory = result["memory_bytes"]
    shares = ", ".join(f"{name} {memory[name] / 2**20:.1f} MiB" for name in CONTESTANTS)
    lines.append(
        f"\nPeak memory at N = {MEMORY_CASE.frames}, batch {MEMORY_CASE.batch}, beyond inputs, "
        f"output and gradients: {shares}."
    )
    return "\n".join(lines)


def run_child(arguments: list[str], variables: dict[str, str]) -> dict:
    """Measure in a process of its own, whose allocator starts with its settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu_backward", *arguments, "--output", str(path)],
            env={**os.environ, **variables},
            check=True,
        )
        return json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_backward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmark-output/cpu_backward.json"))
    parser.add_argument("--part", choices=["speed", *CONTESTANTS], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.part == "speed":
        args.output.write_text(json.dumps(measure_all(args)))
        return
    if args.part:
        torch.set_num_threads(args.threads)
        args.output.write_text(json.dumps(measure_memory(args.part)))
        return

    if problems := native.load().problems:
        parser.error("; ".join(problems))
    passed_on = ["--rounds", str(args.rounds), "--threads", str(args.threads)]
    result = run_child([*passed_on, "--part", "speed"], ALLOCATORS["warm"])
    # The default allocator gives back what is freed, so that what is resident is what is in use.
    result["memory_bytes"] = {
        name: run_child([*passed_on, "--part", name], {}) for name in CONTESTANTS
    }
    text = f"{describe(result)}\n\n{table(result)}\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
