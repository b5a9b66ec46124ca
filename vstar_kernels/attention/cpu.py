"""The C++ kernels (bindings/): float32, bfloat16 and float16 tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import native
from vstar_kernels.attention.bias import gaussian_table, signed_table, table_gradient
from vstar_kernels.attention.call import (
    Call,
    Forward,
    Gradients,
    Wanted,
    block_gradient,
    block_sums,
    empty_like,
)
from vstar_kernels.attention.schemas import STAT_NUMBERS, STAT_TENSOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> list[str]:
    """Returns why the library is not there."""
    return native.load().problems


def why_not(call: Call) -> list[str]:
    """Returns why the kernels cannot take this call."""
    if call.device.type != "cpu":
        return [f"takes CPU tensors, query is on {call.device}", *unavailable()]
    reasons = list(unavailable())
    for name, tensor in (("delta", call.delta), ("stat", call.stat)):
        if tensor is not None and tensor.device.type != "cpu":
            reasons.append(f"takes CPU tensors, {name} is on {tensor.device}")
    if call.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        reasons.append(f"takes {allowed}, query is {call.dtype}")
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        stride = tensor.stride(-1)
        if stride != 1 and call.head_dim > 1:
            reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
    return reasons


def forward(call: Call, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the mean map; saves nothing."""
    out = empty_like(call.query)
    mean_map = None
    if call.options.map_block:
        mean_map = call.query.new_empty(
            (call.shape[0], call.frames, call.frames), dtype=torch.float32
        )
    torch.ops.vstar_kernels.cpu_forward(
        out, mean_map, call.query, call.key, call.value, *_arguments(call)
    )
    if mean_map is not None:
        mean_map = block_sums(mean_map, call.options.map_block)
    return Forward(out, mean_map)


def backward(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Computes the gradients; everything is computed anew, in one pass over the sequences."""
    arguments = _arguments(call)
    grad_query, grad_key, grad_value = map(empty_like, (call.query, call.key, call.value))
    grad_bias = torch.empty_like(arguments[0]) if wanted.delta else None
    grad_stat = torch.empty_like(call.stat) if wanted.stat and call.stat is not None else None
    if grad_map is not None:
        grad_map = block_gradient(grad_map, call.options.map_block, call.frames).contiguous()
    torch.ops.vstar_kernels.cpu_backward(
        grad_query,
        grad_key,
        grad_value,
        grad_bias,
        grad_stat,
        call.query.new_zeros(()).expand_as(call.query) if grad_out is None else grad_out,
        grad_map,
        call.query,
        call.key,
        call.value,
        *arguments,
        call.options.detach_stat,
    )
    grad_delta = None if grad_bias is None else _delta_gradient(call, grad_bias)
    return Gradients(grad_query, grad_key, grad_value, grad_delta, grad_stat)


def _arguments(call: Call) -> tuple[Any, ...]:
    """Returns what the operators take after the tensors, from ``bias`` to ``clamp_negative``."""
    options = call.options
    stat = STAT_NUMBERS[options.stat] if call.stat is None else STAT_TENSOR
    return (
        _kernel_bias(call),
        call.stat,
        options.scale,
        options.strength,
        stat,
        options.clamp_negative,
    )


def _kernel_bias(call: Call) -> Tensor | None:
    """Returns Δ with the query's frame along the last dimension, as the kernels read it.

    It is a table over i − j, ``(1 or heads, 2L−1)``, or a transposed matrix,
    ``(1 or heads, N, N)``.
    """
    form = call.options.form
    if form == "none":
        return None
    if form == "gaussian":
        return gaussian_table(call.options.sigma, call.frames)[None]  # symmetric
    assert call.delta is not None  # the other forms hold it
    entries = call.delta.detach().float()
    if form == "dense":
        kernel_bias = entries.mT.contiguous()
    else:
        kernel_bias = signed_table(form, entries).flip(-1)
    return kernel_bias if call.delta_per_head else kernel_bias[None]


def _delta_gradient(call: Call, kernel_gradient: Tensor) -> Tensor:
    """Returns the gradient of Δ's entries for one of what :func:`_kernel_bias` makes of them."""
    assert call.delta is not None  # or nobody could want its gradient
    gradient = kernel_gradient if call.delta_per_head else kernel_gradient[0]
    if call.options.form == "dense":
        return call.delta_gradient(gradient.mT)
    return table_gradient(call.options.form, call.delta, gradient.flip(-1))
