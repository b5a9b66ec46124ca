"""The C++ kernels of frame_attention (bindings/frames_*.h): 32- and 16-bit tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import native
from vstar_kernels.attention.call import Forward, empty_like
from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameWanted


def unavailable() -> list[str]:
    """Returns why the library is not there."""
    return native.load().problems


def why_not(call: FrameCall) -> list[str]:
    """Returns why the kernels cannot take this call."""
    if not call.query.is_cpu:
        return [f"takes CPU tensors, query is on {call.device}", *unavailable()]
    reasons = list(unavailable())
    reasons += native.refusals(call.query, call.key, call.value)
    return reasons + _without_gradients(call)


def _without_gradients(call: FrameCall) -> list[str]:
    """Returns which gradients of a call the kernels do not compute."""
    if not (torch.is_grad_enabled() and call.requires_grad):
        return []
    reasons = [
        f"computes no gradient of {name}, which requires one"
        for name, tensor in call.tensors().items()
        if tensor.requires_grad and name not in ("query", "key", "value")
    ]
    if call.factor is not None:
        reasons.append("computes no gradients of rules with factors")
    return reasons


def forward(call: FrameCall, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the map; saves nothing."""
    out, mean_map = empty_like(call.query), None
    if call.options.mean_map != "none":
        mean_map = torch.empty(call.map_shape, dtype=torch.float32, device=call.device)
    torch.ops.vstar_kernels.cpu_frames_forward(out, mean_map, *_inputs(call))
    return Forward(out, mean_map)


def prepare(call: FrameCall) -> Callable[[FrameCall], Forward]:
    """Returns ``forward``, as nothing can be prepared for calls like this one."""
    return forward


def backward(
    call: FrameCall,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: FrameWanted,
) -> FrameGradients:
    """Computes the gradients of query, key and value; everything is computed anew.

    Raises:
        NotImplementedError: A gradient is wanted that :func:`why_not` says is not computed.
    """
    if any(wanted) or call.factor is not None:
        raise NotImplementedError(
            "the cpu backend of frame_attention computes no gradients of its tables, of a "
            "statistic, nor of rules with factors"
        )
    grads = [empty_like(tensor) for tensor in (call.query, call.key, call.value)]
    if grad_out is None:
        grad_out = call.query.new_zeros(()).expand_as(call.query)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_map = None if grad_map is None else grad_map.contiguous()
    torch.ops.vstar_kernels.cpu_frames_backward(*grads, grad_out, grad_map, *_inputs(call))
    return FrameGradients(*grads)


def _inputs(call: FrameCall) -> tuple[Any, ...]:
    """Returns what both operators take after their results."""
    options = call.options
    return (
        call.query,
        call.key,
        call.value,
        call.key_lengths,
        None if call.stat is None else call.stat.float(),
        call.query_runs,
        call.key_runs,
        call.delta,
        call.offset,
        call.factor,
        call.factor_span,
        call.band,
        native.FRAME_STAT_NUMBERS[options.stat],
        options.clamp_negative,
        options.scale,
        options.mean_map == "heads",
    )
