"""Times one launch configuration, for ``benchmarks.tune``."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.check import Oracle
from benchmarks.clock import GpuClock, TimedCall, time_in_turn
from benchmarks.codegen import cases
from benchmarks.codegen.cases import Entry
from vstar_kernels.attention.call import Call
from vstar_kernels.testing import largest_error, oracle

TRAFFIC = 512 * 2**20  # bytes of one call
ROUNDS = 15
SECONDS = 2.0  # for the rounds
TF32_ERROR = 2e-2


def seconds(entry: Entry) -> float:
    """Returns the median time of a Gaussian call with this configuration, checked first."""
    plan, plan_key = cases.gaussian_plan(entry, TRAFFIC)
    clock = GpuClock()
    inputs = [
        tuple(torch.randn(3, *plan_key.shape, device="cuda").to(plan_key.dtype).unbind())
        for _ in range(clock.sets(TRAFFIC))
    ]
    out = torch.full_like(inputs[0][0], float("nan"))

    def run(query: Tensor, key: Tensor, value: Tensor) -> None:
        plan.run(Call(query, key, value, None, None, plan_key.options), out)

    run(*inputs[0])
    check(out, inputs[0], entry.kind)
    candidate = TimedCall("candidate", run)
    try:
        ready = clock.warm_up(candidate, inputs)
    except RuntimeError:
        return float("inf")
    times = time_in_turn(clock, [ready], len(inputs), rounds=ROUNDS, seconds=SECONDS)
    return statistics.median(times[candidate.name])


def check(out: Tensor, inputs: tuple[Tensor, ...], kind: str) -> None:
    """Refuses to time a wrong result."""
    bias = vk.GaussianBias(1.0)
    try:
        if kind == "tf32":  # which keeps ten bits of the operands
            error = largest_error(out[:2].cpu(), oracle(*(x[:2].cpu() for x in inputs), bias))
            assert error <= TF32_ERROR, f"error {error}"
        else:
            Oracle(inputs, bias).check_forward(out)
    except AssertionError as error:
        raise SystemExit(f"wrong result for {tuple(out.shape)}, {kind}: {error}") from None
