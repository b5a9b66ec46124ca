"""The C++ kernels (bindings/): float32, bfloat16 and float16 tensors on the CPU, forward."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_kernels import native
from vstar_kernels.bias import Bias, DenseBias, GaussianBias, gaussian_table
from vstar_kernels.ops import STAT_NUMBERS, STAT_TENSOR
from vstar_kernels.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> list[str]:
    """Why the library is not there."""
    return native.load().problems


def why_not(problem: Problem) -> list[str]:
    """Why the kernels cannot take this call."""
    if problem.device.type != "cpu":
        return [f"takes CPU tensors, query is on {problem.device}", *unavailable()]
    reasons = list(unavailable())
    for name, tensor in problem.tensors.items():
        if tensor.device.type != "cpu":
            reasons.append(f"takes CPU tensors, {name} is on {tensor.device}")
    if problem.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        reasons.append(f"takes {allowed}, query is {problem.dtype}")
    for name in ("query", "key", "value"):
        stride = problem.tensors[name].stride(-1)
        if stride != 1 and problem.head_dim > 1:
            reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
    if wanted := problem.needs_grad():
        reasons.append(f"has no gradients yet, wanted for {', '.join(wanted)}")
    if problem.return_map:
        reasons.append("does not return the mean map yet")
    return reasons


def run(problem: Problem) -> Tensor:
    """The output of a problem that ``why_not`` has nothing against."""
    query, key, value = (problem.tensors[name] for name in ("query", "key", "value"))
    out = torch.empty_like(query)
    if out.stride(-1) != 1:  # of a query with expanded dimensions, whose order means nothing
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    bias = problem.bias
    if bias is None:
        torch.ops.vstar_kernels.cpu_forward(
            out, query, key, value, None, None, problem.scale, 0.0, STAT_NUMBERS["none"], False
        )
        return out
    stat_values, stat = (
        (bias.stat, STAT_TENSOR)
        if isinstance(bias.stat, Tensor)
        else (None, STAT_NUMBERS[bias.stat])
    )
    torch.ops.vstar_kernels.cpu_forward(
        out,
        query,
        key,
        value,
        _kernel_bias(bias, problem.frames),
        stat_values,
        problem.scale,
        bias.strength,
        stat,
        bias.clamp_negative,
    )
    return out


def _kernel_bias(bias: Bias, frames: int) -> Tensor:
    """Δ with the query's frame along the last dimension, as the kernels read it.

    A table over i − j, ``(1 or heads, 2L−1)``, or a transposed matrix, ``(1 or heads, N, N)``.
    """
    if isinstance(bias, GaussianBias):
        return gaussian_table(float(bias.sigma), frames)[None]  # symmetric
    if isinstance(bias, DenseBias):
        matrix = bias.values.detach().float().mT.contiguous()
        return matrix if matrix.ndim == 3 else matrix[None]
    table = bias.signed_table().detach().float().flip(-1)
    return table if table.ndim == 2 else table[None]
