"""The public operation: it checks the call, chooses a backend and runs it."""

from __future__ import annotations

import functools
from typing import overload

import torch
from torch import Tensor

from vstar_kernels.attention import autograd, dispatch
from vstar_kernels.attention.columns.call import ColumnCall, ColumnOptions, check_call


@overload
def column_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def column_attention(
    query: Tensor,
    key: Tensor,
    value: None,
    columns: Tensor,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
def column_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a few keys, and how much of it chosen columns of its weights get, in one pass.

    With P_h = softmax(scale · Q_h K_hᵀ) of each of H heads and G the columns::

        out_h = P_h V_h,    maps = 1/H · Σ_h P_h G

    It is cross-attention to a text with the maps of K of its words, which guide the latents in
    StarVid (arXiv 2409.15259). The weights of all keys are never held, nor kept for the gradient.

    Args:
        query: ``(batch, queries, heads, head_dim)``; any strides, though the kernels need head_dim
            contiguous. Under autocast query, key and value are cast as for
            scaled_dot_product_attention.
        key, value: ``(batch, keys, heads, head_dim)`` of query's type and device, such as a text
            that is expanded over the frames. Without a value (None), only the maps are computed.
        columns: G, ``(keys, columns)`` or ``(batch, keys, columns)`` in float32: one-hot for the
            map of one key; 1/m at each of a word's m keys for their mean.
        scale: Factor on QKᵀ; 1/√head_dim if None.
        backend: A name of :func:`vstar_kernels.backends.available`, which then runs or raises.
            None takes the fastest that can run the call, and warns once when that is the reference.

    Returns:
        The output, allocated as ``torch.empty_like(query)`` allocates, and the maps ``(batch,
        queries, columns)`` in float32; without a value, the maps.

    Raises:
        ValueError: A bad argument, an unknown backend, or a named backend that cannot run the call,
            with every reason.
        TypeError: An argument of the wrong kind.
    """
    given = None  # by which a call like this one is found again
    if not torch.compiler.is_compiling():
        values = () if value is None else (value,)
        given = (value is None, scale, backend), (query, key, columns, *values)
        run = dispatch.COLUMN_ATTENTION.calls.get(*given)
        if run is not None:
            return run(*given[1])
    call = check_call(query, key, value, columns, scale=scale)
    dispatch.COLUMN_ATTENTION.check_name(backend)
    if autograd.traced(call):  # a backend is chosen when it runs
        return autograd.column_attention(call, backend)
    chosen = dispatch.COLUMN_ATTENTION.choose(call, backend)
    if chosen != "reference" and autograd.needed(call):
        return autograd.column_attention(call, chosen)
    if given is not None:
        make = functools.partial(_call, call.options, call.columns.shape)
        dispatch.COLUMN_ATTENTION.remember(*given, chosen, call, make)
    out, maps, _ = dispatch.COLUMN_ATTENTION.run(chosen, call)
    return dispatch.COLUMN_ATTENTION.results(call.options, out, maps)


def _call(
    options: ColumnOptions,
    shape: torch.Size,
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    value: Tensor | None = None,
) -> ColumnCall:
    """Returns the call of these options on tensors, with the columns expanded to a shape."""
    if columns.shape != shape:
        columns = columns.expand(*shape)  # of numbers, which is twice as fast as of a shape
    return ColumnCall(query, key, value, columns, options)
