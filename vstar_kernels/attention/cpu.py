"""The C++ kernels (bindings/): float32, bfloat16 and float16 tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import native
from vstar_kernels.attention.bias import gaussian_table
from vstar_kernels.attention.call import (
    Call,
    Forward,
    Gradients,
    Wanted,
    empty_like,
)


def unavailable() -> list[str]:
    """Returns why the library is not there."""
    return native.load().problems


def why_not(call: Call) -> list[str]:
    """Returns why the kernels cannot take this call."""
    if not call.query.is_cpu:
        return [f"takes CPU tensors, query is on {call.device}", *unavailable()]
    reasons = list(unavailable())
    for name, tensor in (("delta", call.delta), ("stat", call.stat)):
        if tensor is not None and not tensor.is_cpu:
            reasons.append(f"takes CPU tensors, {name} is on {tensor.device}")
    reasons += native.refusals(call.query, call.key, call.value, call.out)
    return reasons


def forward(call: Call, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the mean map; saves nothing."""
    out = call.output()
    mean_map = None
    if call.options.map_block:
        mean_map = call.query.new_empty(call.map_shape, dtype=torch.float32)
    torch.ops.vstar_kernels.cpu_forward(
        out, mean_map, *_inputs(call), call.options.scale, *_map_options(call)
    )
    return Forward(out, mean_map)


def prepare(call: Call) -> Callable[[Call], Forward]:
    """Returns ``forward``, as nothing can be prepared for calls like this one."""
    return forward


def backward(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Computes the gradients; everything is computed anew, in one pass over the sequences."""
    inputs = _inputs(call)
    delta, stat = inputs[3], call.stat
    grad_query, grad_key, grad_value = map(empty_like, inputs[:3])
    contiguous = torch.contiguous_format
    grad_delta = torch.empty_like(delta, memory_format=contiguous) if wanted.delta else None
    grad_stat = torch.empty_like(stat) if wanted.stat and stat is not None else None
    torch.ops.vstar_kernels.cpu_backward(
        grad_query,
        grad_key,
        grad_value,
        grad_delta,
        grad_stat,
        call.query.new_zeros(()).expand_as(call.query) if grad_out is None else grad_out,
        None if grad_map is None else grad_map.contiguous(),
        *inputs,
        call.options.detach_stat,
        call.options.scale,
        *_map_options(call),
    )
    if grad_delta is not None and call.delta is not None:
        grad_delta = grad_delta.to(call.delta.dtype)
    return Gradients(grad_query, grad_key, grad_value, grad_delta, grad_stat)


def _map_options(call: Call) -> tuple[int, bool]:
    """Returns what both operators take last."""
    return call.options.map_block, call.options.map_heads


def _inputs(call: Call) -> tuple[Any, ...]:
    """Returns what both operators take, from ``query`` to ``clamp_negative``.

    Δ is in float32 and otherwise as its bias holds it: the library converts its layout.
    """
    options = call.options
    if options.form == "gaussian":
        delta: Tensor | None = gaussian_table(options.sigma, call.frames)
    else:
        delta = None if call.delta is None else call.delta.float()
    return (
        call.query,
        call.key,
        call.value,
        delta,
        call.stat,
        native.FORM_NUMBERS[options.form],
        options.strength,
        native.STAT_NUMBERS[options.stat],
        options.clamp_negative,
    )
