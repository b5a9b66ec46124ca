"""The C++ kernels of column_attention (bindings/columns_*.h): 32- and 16-bit tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import native
from vstar_kernels.attention.call import Forward, empty_like, nothing
from vstar_kernels.attention.columns.call import ColumnCall, ColumnGradients, ColumnWanted


def unavailable() -> list[str]:
    """Returns why the library is not there."""
    return native.load().problems


def why_not(call: ColumnCall) -> list[str]:
    """Returns why the kernels cannot take this call."""
    if not call.query.is_cpu:
        return [f"takes CPU tensors, query is on {call.device}", *unavailable()]
    value = call.key if call.value is None else call.value
    reasons = [*unavailable(), *native.refusals(call.query, call.key, value)]
    if torch.is_grad_enabled() and call.columns.requires_grad:
        reasons.append("computes no gradient of columns, which requires one")
    return reasons


def forward(call: ColumnCall, *, save: bool = False) -> Forward:
    """Computes the output, where there is a value, and the maps; saves nothing."""
    maps = torch.empty(call.map_shape, dtype=torch.float32, device=call.device)
    out = None if call.value is None else empty_like(call.query)
    torch.ops.vstar_kernels.cpu_columns_forward(out, maps, *_inputs(call))
    return Forward(nothing(call.query) if out is None else out, maps)


def prepare(call: ColumnCall) -> Callable[[ColumnCall], Forward]:
    """Returns ``forward``, as nothing can be prepared for calls like this one."""
    return forward


def backward(
    call: ColumnCall,
    out: Tensor | None,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: ColumnWanted,
) -> ColumnGradients:
    """Computes the wanted gradients; the weights are computed anew.

    Raises:
        NotImplementedError: The gradient of the columns is wanted, which :func:`why_not` refuses.
    """
    if wanted.columns:
        raise NotImplementedError(
            "the cpu backend of column_attention computes no gradient of its columns"
        )
    grad_query = empty_like(call.query) if wanted.query else None
    grad_key = empty_like(call.key) if wanted.key else None
    grad_value = None
    if wanted.value and call.value is not None:
        grad_value = empty_like(call.value)
        if grad_out is None:  # the maps do not depend on it
            grad_value.zero_()
    if grad_out is not None and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    torch.ops.vstar_kernels.cpu_columns_backward(
        grad_query,
        grad_key,
        None if grad_out is None else grad_value,
        grad_out,
        None if grad_map is None else grad_map.contiguous(),
        *_inputs(call),
    )
    return ColumnGradients(grad_query, grad_key, grad_value)


def _inputs(call: ColumnCall) -> tuple[Any, ...]:
    """Returns what both operators take after their results."""
    columns = call.columns
    if columns.stride(0) == 0:  # shared by the batch
        columns = columns[:1]
    return call.query, call.key, call.value, columns.contiguous(), call.options.scale
