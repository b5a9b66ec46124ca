"""The formula in plain PyTorch: any device, any floating-point type, any strides, differentiable.

This is the oracle that every kernel is tested against, so it is written to be compared with the
formula in :class:`vstar_kernels.attention.columns.call.ColumnCall`. It holds the weights of all
queries, keys and heads in memory. With dO and dM the gradients of the output and of the maps, its
backward pass, which the kernels compute too, is::

    dP_h = dO_h V_hᵀ + 1/H · dM Gᵀ        dS_h = P_h ∘ (dP_h − rowsum(P_h ∘ dP_h))
    dQ_h = scale · dS_h K_h,    dK_h = scale · dS_hᵀ Q_h,    dV_h = P_hᵀ dO_h
    dG = 1/H · Σ_h P_hᵀ dM
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.call import Forward, laid_like, nothing
from vstar_kernels.attention.columns.call import (
    ColumnCall,
    ColumnGradients,
    ColumnWanted,
    check_call,
)


def column_attention(*arguments: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vstar_kernels.column_attention` by its formula, in float32 or, of float64, in float64.

    The arguments are those of :func:`vstar_kernels.column_attention` but ``backend``.
    """
    call = check_call(*arguments, **options)
    out, maps, _ = forward(call)
    assert maps is not None
    return (out, maps) if call.options.wants_out else maps


def unavailable() -> list[str]:
    """Returns no reason: the reference runs wherever torch does."""
    return []


def why_not(call: ColumnCall) -> list[str]:
    """Returns no reason: the reference runs every checked call."""
    return []


def forward(call: ColumnCall, *, save: bool = False) -> Forward:
    """Computes the output, where there is a value, and the maps; saves nothing."""
    with torch.autocast(call.device.type, enabled=False):
        weights = _weights(call)
        maps = weights.mean(1) @ call.columns.to(weights)
        out = nothing(call.query)
        if call.value is not None:
            attended = weights @ heads_first(call.value)
            out = laid_like(call.query, attended.transpose(1, 2))
    return Forward(out, maps.float())


def _weights(call: ColumnCall) -> Tensor:
    """Returns P, ``(batch, heads, N, T)``."""
    logits = heads_first(call.query) @ heads_first(call.key).mT
    return (call.options.scale * logits).softmax(-1)


def heads_first(x: Tensor) -> Tensor:
    """(batch, tokens, heads, head_dim) → (batch, heads, tokens, head_dim), at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)


def backward(
    call: ColumnCall,
    out: Tensor | None,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: ColumnWanted,
) -> ColumnGradients:
    """Computes the wanted gradients by their formulas, where autograd cannot be asked for them."""
    weights, scale = _weights(call), call.options.scale
    columns, value = call.columns.to(weights), call.value
    d_weights = torch.zeros_like(weights)
    d_out = None
    if grad_out is not None and value is not None:
        d_out = heads_first(grad_out)
        d_weights = d_weights + d_out @ heads_first(value).mT
    if grad_map is not None:
        d_mean = grad_map.to(weights)
        d_weights = d_weights + ((d_mean @ columns.mT) / call.heads).unsqueeze(1)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))

    d_query = d_key = d_value = d_columns = None
    if wanted.query:
        of_query = scale * (d_logits @ heads_first(call.key))
        d_query = laid_like(call.query, of_query.transpose(1, 2))
    if wanted.key:
        of_key = scale * (d_logits.mT @ heads_first(call.query))
        d_key = laid_like(call.key, of_key.transpose(1, 2))
    if wanted.value and value is not None:
        of_value = torch.zeros_like(heads_first(value)) if d_out is None else weights.mT @ d_out
        d_value = laid_like(value, of_value.transpose(1, 2))
    if wanted.columns:
        of_columns = torch.zeros_like(columns) if grad_map is None else weights.mean(1).mT @ d_mean
        d_columns = of_columns.to(call.columns.dtype)
    return ColumnGradients(d_query, d_key, d_value, d_columns)
