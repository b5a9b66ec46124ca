"""The Triton backend of :func:`vstar_kernels.frame_attention`; imports no triton before it runs.

:mod:`frames_plan` says what each tile of rows sees, :mod:`frames_forward` and
:mod:`frames_backward` are the kernels and their launchers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.call import Forward, empty_like
from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameWanted
from vstar_kernels.attention.triton import frames_plan, plan
from vstar_kernels.attention.triton.frames_plan import FramesKey

if TYPE_CHECKING:
    from vstar_kernels.attention.triton.frames_backward import FramesBackwardPlan
    from vstar_kernels.attention.triton.frames_forward import FramesPlan

MAX_KEYS = 2**30  # places of keys, and twice as many, are int32


def unavailable() -> list[str]:
    """Returns why no kernel can run here."""
    return list(backend.unavailable())


def why_not(call: FrameCall) -> list[str]:
    """Returns why the kernels cannot take this call."""
    reasons = backend.why_not_tensors(call.query, call.key, call.value)
    rows = call.batch * call.heads * max(call.tokens, call.keys)
    if rows > backend.MAX_ROWS:
        reasons.append(f"takes up to {backend.MAX_ROWS} rows of head_dim, the call has {rows}")
    if call.keys > MAX_KEYS:
        reasons.append(f"takes up to {MAX_KEYS} keys, the call has {call.keys}")
    for name in ("delta", "offset"):
        table = getattr(call, name)
        if torch.is_grad_enabled() and table is not None and table.requires_grad:
            reasons.append(f"has no gradient of the rule's tables, {name} requires one")
    return reasons


def forward(call: FrameCall, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the map.

    With ``save``, it saves what the backward pass needs of each row.
    """
    out = empty_like(call.query)
    if not out.numel() or not call.keys:
        out.zero_()
        if call.options.mean_map == "none":
            return Forward(out)
        return Forward(out, torch.zeros(call.map_shape, dtype=torch.float32, device=call.device))
    return _run(frames_plan.frames_key(call, out, save=save), call, out)


def prepare(call: FrameCall) -> Callable[[FrameCall], Forward]:
    """Returns ``forward`` for calls that have this one's plan."""
    if not call.query.numel() or not call.keys:
        return forward
    key = frames_plan.frames_key(call, empty_like(call.query))

    def run(call: FrameCall) -> Forward:
        return _run(key, call, empty_like(call.query))

    return plan.prepared(key, run, forward)


def _run(key: FramesKey, call: FrameCall, out: Tensor) -> Forward:
    with backend.on(call.device):
        return _forward_plan(key, call.device).run(call, out)


def backward(
    call: FrameCall,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: FrameWanted,
) -> FrameGradients:
    """Computes the gradients."""
    gradients = FrameGradients(
        empty_like(call.query),
        empty_like(call.key),
        empty_like(call.value),
        stat=None if call.stat is None else _rows_first(call),
    )
    if not out.numel() or not call.keys:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients if wanted.stat else gradients._replace(stat=None)
    saved = saved or forward(call, save=True).saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_map is not None:  # one without a row, where all queries are text, has nothing to read
        grad_map = grad_map.contiguous() if grad_map.numel() else None
    key = frames_plan.backward_key(call, out, grad_out, grad_map, gradients)
    with backend.on(call.device):
        made = _backward_plan(key, call.device)
        made.run(call, out, saved, grad_out, grad_map, gradients)
    return gradients if wanted.stat else gradients._replace(stat=None)


def _rows_first(call: FrameCall) -> Tensor:
    """Returns a gradient of the statistic for a kernel to fill, whose rows lie side by side."""
    shape = (call.batch, call.heads, call.tokens)
    return torch.empty(shape, dtype=torch.float32, device=call.device).transpose(1, 2)


@functools.lru_cache(maxsize=1024)
def _forward_plan(key: FramesKey, device: torch.device) -> FramesPlan:
    from vstar_kernels.attention.triton import frames_forward

    return frames_forward.make_plan(key, device)


@functools.lru_cache(maxsize=1024)
def _backward_plan(key: FramesKey, device: torch.device) -> FramesBackwardPlan:
    from vstar_kernels.attention.triton import frames_backward

    return frames_backward.make_plan(key, device)
