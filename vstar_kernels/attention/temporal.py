"""The one public operation: check the call, choose a backend, run it."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from vstar_kernels.attention import autograd
from vstar_kernels.attention import dispatch as selection
from vstar_kernels.attention.bias import Bias, DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.attention.call import Problem

LAYOUTS = "(batch, frames, heads, head_dim) or (batch, space, frames, heads, head_dim)"


@overload
def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = ...,
    *,
    scale: float | None = ...,
    return_map: Literal[False] = ...,
    map_block: int = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = ...,
    *,
    scale: float | None = ...,
    return_map: Literal[True],
    map_block: int = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_block: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Temporal self-attention, regularized as in VSTAR (arXiv 2403.13501, eq. 3)::

        φ = scale · QKᵀ,  A′ = softmax(φ + strength · stat · Δ),  out = A′V

    Args:
        query, key, value: ``(batch, frames, heads, head_dim)``, what
            ``hidden.unflatten(-1, (heads, head_dim))`` gives, or
            ``(batch, space, frames, heads, head_dim)``. Same shape, type and device; any strides,
            though the kernels need head_dim contiguous. They are never copied to be made
            contiguous. Under autocast they are cast as for scaled_dot_product_attention.
        bias: Δ and its weight: a :class:`GaussianBias`, :class:`ToeplitzBias` or
            :class:`DenseBias`. None, or a strength of 0, is plain scaled-dot-product attention.
        scale: Factor on QKᵀ; 1/√head_dim if None.
        return_map: Also return the mean of A′ over space and heads (4-D: over heads),
            ``(batch, frames, frames)`` in float32.
        map_block: Return the map's sums over blocks of so many frames instead, for long videos.
        backend: A name of :func:`vstar_kernels.backends.available`, which then runs or raises.
            None takes the fastest that can run the call, and warns once when that is the reference.

    Returns:
        The output, allocated as ``torch.empty_like(query)`` allocates, or ``(output, map)``.

    Raises:
        ValueError: A bad argument, an unknown backend, or a named backend that cannot run the call,
            with every reason.
        TypeError: An argument of the wrong kind.
    """
    problem = _check(query, key, value, bias, scale, return_map, map_block)
    if torch.compiler.is_compiling() and backend != "reference":
        return autograd.attention(problem, backend)
    chosen = selection.choose(problem, backend)
    if chosen != "reference" and autograd.needed(problem):
        return autograd.attention(problem, chosen)
    return selection.BACKENDS[chosen].run(problem)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    scale: float | None,
    return_map: bool,
    map_block: int,
) -> Problem:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if torch.is_autocast_enabled(query.device.type):
        tensors = {name: _autocast(tensor) for name, tensor in tensors.items()}
        query = tensors["query"]
    shape, dtype, device = query.shape, query.dtype, query.device
    if len(shape) not in (4, 5):
        raise ValueError(f"query must be {LAYOUTS}, got shape {tuple(shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"query must be of a floating-point type, got {dtype}")
    if shape[-3] == 0 or shape[-1] == 0:
        raise ValueError(
            f"query must have at least one frame and one element of head_dim, got {tuple(shape)}"
        )
    for name in ("key", "value"):
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have query's shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have query's type {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")

    if scale is None:
        scale = 1.0 / math.sqrt(shape[-1])
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")

    if bias is not None:
        if not isinstance(bias, GaussianBias | ToeplitzBias | DenseBias):
            raise TypeError(
                "bias must be a GaussianBias, a ToeplitzBias, a DenseBias or None, "
                f"got {type(bias).__name__}"
            )
        bias.check(shape[-3], shape[-2])
        _check_stat(bias, query)
        if bias.strength == 0:
            bias = None
        else:
            tensors.update(bias.named_tensors())
    if isinstance(map_block, bool) or not isinstance(map_block, int):
        raise TypeError(f"map_block must be an integer, got {type(map_block).__name__}")
    if map_block < 1:
        raise ValueError(f"map_block must be at least 1 frame, got {map_block}")
    return Problem(tuple(shape), dtype, device, tensors, bias, scale, return_map, map_block)


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast does to the arguments of scaled_dot_product_attention."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def _check_stat(bias: Bias, query: Tensor) -> None:
    if not isinstance(bias.stat, Tensor):
        return
    if bias.stat.shape != query.shape[:-1]:
        raise ValueError(
            "a stat tensor must have query's shape without head_dim, "
            f"{tuple(query.shape[:-1])}, got {tuple(bias.stat.shape)}"
        )
    if bias.stat.device != query.device:
        raise ValueError(
            f"a stat tensor must be on query's device {query.device}, got {bias.stat.device}"
        )
