"""The C++ kernels (bindings/): float32, bfloat16 and float16 tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import native
from vstar_kernels.attention.allocate import empty_like
from vstar_kernels.attention.bias import Bias, DenseBias, GaussianBias, ToeplitzBias, gaussian_table
from vstar_kernels.attention.blocks import block_gradient, block_sums
from vstar_kernels.attention.call import Problem
from vstar_kernels.attention.schemas import STAT_NUMBERS, STAT_TENSOR

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
    return reasons


def run(problem: Problem) -> Tensor | tuple[Tensor, Tensor]:
    """The output, or ``(output, map)``, of a problem that ``why_not`` has nothing against."""
    query, key, value = (problem.tensors[name] for name in ("query", "key", "value"))
    out = empty_like(query)
    mean_map = None
    if problem.return_map:
        mean_map = query.new_empty(
            (problem.shape[0], problem.frames, problem.frames), dtype=torch.float32
        )
    torch.ops.vstar_kernels.cpu_forward(out, mean_map, query, key, value, *_options(problem))
    return out if mean_map is None else (out, block_sums(mean_map, problem.map_block))


def backward(
    problem: Problem,
    out: Tensor,
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    """The gradients; everything is computed anew, in one pass over the sequences."""
    query, key, value = (problem.tensors[name] for name in ("query", "key", "value"))
    gradients = {name: empty_like(problem.tensors[name]) for name in ("query", "key", "value")}
    options = _options(problem)
    grad_bias = torch.empty_like(options[0]) if "values" in wanted else None
    if "stat" in wanted:
        gradients["stat"] = torch.empty_like(problem.tensors["stat"])
    if grad_map is not None:
        grad_map = block_gradient(grad_map, problem.map_block, problem.frames).contiguous()
    torch.ops.vstar_kernels.cpu_backward(
        gradients["query"],
        gradients["key"],
        gradients["value"],
        grad_bias,
        gradients.get("stat"),
        query.new_zeros(()).expand_as(query) if grad_out is None else grad_out,
        grad_map,
        query,
        key,
        value,
        *options,
        problem.bias is not None and problem.bias.detach_stat,
    )
    if grad_bias is not None:
        gradients["values"] = _values_gradient(problem.bias, grad_bias)
    return gradients


def _options(problem: Problem) -> tuple[Any, ...]:
    """What the operators take after the tensors, from ``bias`` to ``clamp_negative``."""
    bias = problem.bias
    if bias is None:
        return None, None, problem.scale, 0.0, STAT_NUMBERS["none"], False
    if isinstance(bias.stat, Tensor):
        stat_values, stat = bias.stat, STAT_TENSOR
    else:
        stat_values, stat = None, STAT_NUMBERS[bias.stat]
    delta = _kernel_bias(bias, problem.frames)
    return delta, stat_values, problem.scale, bias.strength, stat, bias.clamp_negative


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


def _values_gradient(bias: Bias | None, kernel_gradient: Tensor) -> Tensor:
    """The gradient of a bias's values for one of what :func:`_kernel_bias` makes of them."""
    assert isinstance(bias, ToeplitzBias | DenseBias)  # the forms that have values
    if isinstance(bias, DenseBias):
        gradient = kernel_gradient.mT
        return bias.values_gradient(gradient if bias.values.ndim == 3 else gradient[0])
    gradient = kernel_gradient.flip(-1)
    return bias.table_gradient(gradient if bias.values.ndim == 2 else gradient[0])
