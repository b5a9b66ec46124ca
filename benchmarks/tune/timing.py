"""Times one launch configuration, for ``benchmarks.tune``."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.check import Oracle
from benchmarks.clock import GpuClock, TimedCall, time_in_turn
from benchmarks.codegen import cases
from benchmarks.codegen.cases import Row
from vstar_kernels.attention.triton import launch, plan
from vstar_kernels.attention.triton.configs import TileConfig
from vstar_kernels.attention.triton.facts import Facts
from vstar_kernels.attention.triton.plan import Launch
from vstar_kernels.testing import largest_error, oracle

TRAFFIC = 512 * 2**20  # bytes of one call
ROUNDS = 15
SECONDS = 2.0  # for the rounds
TF32_ERROR = 2e-2


def architecture() -> str:
    """Whose rows serve this GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU to measure; --predict needs none")
    return launch._device(torch.device("cuda", 0)).architecture


def seconds(row: Row) -> float:
    """The median of a Gaussian call with this configuration, checked first."""
    facts = small_facts(row)
    call = a_launch(row, facts)
    shape, dtype = facts.shape, facts.dtype
    clock = GpuClock()
    traffic = 4 * torch.Size(shape).numel() * dtype.itemsize
    inputs = [
        tuple(torch.randn(3, *shape, device="cuda").to(dtype).unbind())
        for _ in range(clock.sets(traffic))
    ]
    query, key, value = inputs[0]
    out = torch.full_like(query, float("nan"))
    call({"q": query, "k": key, "v": value, "out": out})
    _check(out, query, key, value, row.kind)

    def run(query: Tensor, key: Tensor, value: Tensor) -> None:
        call({"q": query, "k": key, "v": value, "out": out})

    candidate = TimedCall("candidate", run)
    try:
        ready = clock.warm_up(candidate, inputs)
    except RuntimeError:
        return float("inf")
    times = time_in_turn(clock, [ready], len(inputs), rounds=ROUNDS, seconds=SECONDS)
    return statistics.median(times[candidate.name])


def small_facts(row: Row) -> Facts:
    """A Gaussian call on this GPU that moves about TRAFFIC bytes."""
    facts = cases.facts(row, cases.GAUSSIAN, row.width)
    _, *sizes = facts.shape
    sequence_bytes = 4 * torch.Size(sizes).numel() * facts.dtype.itemsize
    batch = max(1, TRAFFIC // sequence_bytes)
    device = launch._device(torch.device("cuda", 0))
    return facts._replace(shape=(batch, *sizes), device=device)


def a_launch(row: Row, facts: Facts) -> Launch:
    """The configuration's kernel."""
    if isinstance(row.config, TileConfig):
        return plan.tile_launch(facts, row.config)
    return plan.stream_launch(facts, row.config)


def _check(out: Tensor, query: Tensor, key: Tensor, value: Tensor, kind: str) -> None:
    """Refuse to time a wrong result."""
    bias = vk.GaussianBias(1.0)
    try:
        if kind == "tf32":  # which keeps ten bits of the operands
            parts = (x[:2].cpu() for x in (query, key, value))
            error = largest_error(out[:2].cpu(), oracle(*parts, bias))
            assert error <= TF32_ERROR, f"error {error}"
        else:
            Oracle((query, key, value), bias).check_forward(out)
    except AssertionError as error:
        raise SystemExit(f"wrong result for {tuple(query.shape)}, {kind}: {error}") from None
