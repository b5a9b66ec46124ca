"""The public operation: it checks the call, chooses a backend and runs it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vstar_kernels.attention import autograd, dispatch, output
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import BIASES, Call, Options, check_call


@overload
def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = ...,
    *,
    scale: float | None = ...,
    return_map: Literal[False] = ...,
    map_heads: bool = ...,
    map_block: int = ...,
    backend: str | None = ...,
    out: Tensor | None = ...,
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
    map_heads: bool = ...,
    map_block: int = ...,
    backend: str | None = ...,
    out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
    map_block: int = 1,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Temporal self-attention, regularized as in VSTAR (arXiv 2403.13501, eq. 3)::

        φ = scale · QKᵀ,  A′ = softmax(φ + strength · stat · Δ),  out = A′V

    Args:
        query, key, value: ``(batch, frames, heads, head_dim)``, what
            ``hidden.unflatten(-1, (heads, head_dim))`` gives, or
            ``(batch, space, frames, heads, head_dim)``. Same shape, type and device; any strides,
            though the kernels need head_dim contiguous. They are never copied to be made
            contiguous. Under autocast they are cast as for scaled_dot_product_attention.
            Meta tensors give meta tensors. Values of a magnitude beyond float32's largest number
            over the number of frames may overflow.
        bias: Δ and its weight: a :class:`GaussianBias`, :class:`ToeplitzBias` or
            :class:`DenseBias`. None, or a strength of 0, is plain scaled-dot-product attention.
        scale: Factor on QKᵀ; 1/√head_dim if None.
        return_map: Also return the mean of A′ over space and heads (4-D: over heads),
            ``(batch, frames, frames)`` in float32.
        map_heads: Return the map of each head, the mean over space alone (4-D: of nothing),
            ``(batch, heads, frames, frames)``.
        map_block: Return the map's sums over blocks of so many frames instead, for long videos;
            on the CPU the whole map is then never in memory.
        backend: A name of :func:`vstar_kernels.backends.available`, which then runs or raises.
            None takes the fastest that can run the call, and warns once when that is the reference.
        out: A tensor for the output, of its shape, type and device, whose memory no other argument
            shares; any strides, though the kernels need head_dim contiguous. As for torch's own
            operations nothing that is written there has a gradient.

    Returns:
        The output, which is ``out`` or allocated as ``torch.empty_like(query)`` allocates, or
        ``(output, map)``.

    Raises:
        ValueError: A bad argument, an unknown backend, or a named backend that cannot run the call,
            with every reason.
        TypeError: An argument of the wrong kind.
    """
    given = None  # by which a call like this one is found again
    if out is None and (bias is None or type(bias) in BIASES) and not torch.compiler.is_compiling():
        fixed, of_bias = ((), ()) if bias is None else bias.parts
        arguments = fixed, scale, return_map, map_heads, map_block, backend
        given = arguments, (query, key, value, *of_bias)
        run = dispatch.TAR_ATTENTION.calls.get(*given)
        if run is not None:
            return run(*given[1])
    call = check_call(
        query,
        key,
        value,
        bias,
        scale=scale,
        return_map=return_map,
        map_heads=map_heads,
        map_block=map_block,
    )
    dispatch.TAR_ATTENTION.check_name(backend)
    if out is None:
        return _attend(call, backend, given)
    output.check(call, out)
    if autograd.needed(call) or type(out) not in autograd.PLAIN or out.is_neg():
        return output.filled(out, _attend(call, backend))
    output.check_memory(call, out)
    found = _attend(dataclasses.replace(call, out=out), backend)
    torch.autograd.graph.increment_version(out)  # or autograd would not notice what it has kept
    return found


def _attend(
    call: Call, backend: str | None, given: tuple[Any, Any] | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns what the public function returns; remembers the call by what was ``given``."""
    operation, has_autograd = dispatch.TAR_ATTENTION, autograd.needed(call)
    if has_autograd:
        # Of meta tensors there is nothing to compute: the operator knows the results' shapes.
        is_meta = call.query.is_meta and backend is None
        is_traced = torch.compiler.is_compiling() and backend != "reference"
        if is_meta or is_traced or autograd.spread(call):
            return autograd.attention(call, backend)
    chosen = operation.choose(call, backend)
    if has_autograd and chosen != "reference":
        return autograd.attention(call, chosen)
    if given is not None:
        make = functools.partial(_call, call.options, call.delta is not None)
        operation.remember(*given, chosen, call, make)
    out, mean_map, _ = operation.run(chosen, call)
    return operation.results(call.options, out, mean_map)


def _call(
    options: Options, has_delta: bool, query: Tensor, key: Tensor, value: Tensor, *of_bias: Tensor
) -> Call:
    """Returns the call of these options on tensors, the bias's last."""
    delta = of_bias[0] if has_delta else None
    stat = of_bias[-1] if options.stat == "tensor" else None
    stat = stat.detach() if stat is not None and options.detach_stat else stat
    return Call(query, key, value, delta, stat, options)
