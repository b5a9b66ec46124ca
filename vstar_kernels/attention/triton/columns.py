"""The Triton backend of :func:`vstar_kernels.column_attention`; imports no triton before it runs.

:mod:`columns_forward` and :mod:`columns_backward` are the kernels and their launchers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.call import Forward, empty_like, nothing
from vstar_kernels.attention.columns.call import ColumnCall, ColumnGradients, ColumnWanted
from vstar_kernels.attention.triton import columns_plan, plan
from vstar_kernels.attention.triton.columns_plan import ColumnsKey

if TYPE_CHECKING:
    from vstar_kernels.attention.triton.columns_backward import ColumnsBackwardPlan
    from vstar_kernels.attention.triton.columns_forward import ColumnsPlan


def unavailable() -> list[str]:
    """Returns why no kernel can run here."""
    return list(backend.unavailable())


def why_not(call: ColumnCall) -> list[str]:
    """Returns why the kernels cannot take this call."""
    value = call.key if call.value is None else call.value
    reasons = backend.why_not_tensors(call.query, call.key, value)
    rows = call.batch * call.heads * max(call.queries, call.keys)
    if rows > backend.MAX_ROWS:
        reasons.append(f"takes up to {backend.MAX_ROWS} rows of head_dim, the call has {rows}")
    if torch.is_grad_enabled() and call.columns.requires_grad:
        reasons.append("computes no gradient of columns, which requires one")
    return reasons


def forward(call: ColumnCall, *, save: bool = False) -> Forward:
    """Computes the output, where there is a value, and the maps.

    With ``save``, it saves each row's log-sum-exp for the backward pass, ``(batch, heads, N)``.
    """
    out = _output(call)
    if not call.query.numel():
        maps = torch.zeros(call.map_shape, dtype=torch.float32, device=call.device)
        return Forward(nothing(call.query) if out is None else out, maps)
    return _run(columns_plan.forward_key(call, out, save=save), call, out)


def prepare(call: ColumnCall) -> Callable[[ColumnCall], Forward]:
    """Returns ``forward`` for calls that have this one's plan."""
    if not call.query.numel():
        return forward
    key = columns_plan.forward_key(call, _output(call))

    def run(call: ColumnCall) -> Forward:
        return _run(key, call, _output(call))

    return plan.prepared(key, run, forward)


def _output(call: ColumnCall) -> Tensor | None:
    return empty_like(call.query) if call.options.wants_out else None


def _run(key: ColumnsKey, call: ColumnCall, out: Tensor | None) -> Forward:
    with backend.on(call.device):
        return _forward_plan(key).run(call, out, save=key.save)


def backward(
    call: ColumnCall,
    out: None,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: ColumnWanted,
) -> ColumnGradients:
    """Computes the wanted gradients."""
    grad_query = empty_like(call.query)
    if not call.query.numel():
        return _kept(call, grad_query, None, None, wanted)
    if not saved:
        key = columns_plan.forward_key(call, None, maps=False, save=True)
        saved = _run(key, call, None).saved
    if grad_out is not None and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_map is not None:
        grad_map = grad_map.contiguous()
    key = columns_plan.backward_key(
        call, grad_out, grad_map, grad_query, wants_keys=wanted.key or wanted.value
    )
    with backend.on(call.device):
        made = _backward_plan(key)
        of_keys = made.run(call, saved[0], grad_out, grad_map, grad_query)
    return _kept(call, grad_query, *of_keys, wanted)


def _kept(
    call: ColumnCall,
    grad_query: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    wanted: ColumnWanted,
) -> ColumnGradients:
    """Returns the wanted gradients, laid as their tensors are; where None is computed, zeros."""

    def laid_like(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        laid = empty_like(tensor)
        return laid.zero_() if gradient is None else laid.copy_(gradient)

    return ColumnGradients(
        grad_query if wanted.query else None,
        laid_like(call.key, grad_key) if wanted.key else None,
        laid_like(call.value, grad_value) if wanted.value else None,
    )


@functools.lru_cache(maxsize=1024)
def _forward_plan(key: ColumnsKey) -> ColumnsPlan:
    from vstar_kernels.attention.triton import columns_forward

    return columns_forward.make_plan(key)


@functools.lru_cache(maxsize=1024)
def _backward_plan(key: ColumnsKey) -> ColumnsBackwardPlan:
    from vstar_kernels.attention.triton import columns_backward

    return columns_backward.make_plan(key)
