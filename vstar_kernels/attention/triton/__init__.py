"""The Triton kernels: float32, bfloat16 and float16 tensors on NVIDIA and AMD GPUs.

With ``TRITON_INTERPRET=1`` in the environment of the process, Triton's interpreter runs the same
kernels on CPU tensors, slowly, for tests. Nothing here imports triton before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vstar_kernels.attention.call import Call, Forward, Gradients, Wanted, empty_like
from vstar_kernels.attention.triton import devices, plan
from vstar_kernels.attention.triton.plan import PlanKey

if TYPE_CHECKING:
    from vstar_kernels.attention.triton.stream import StreamPlan
    from vstar_kernels.attention.triton.stream_backward import StreamBackwardPlan
    from vstar_kernels.attention.triton.tile import TilePlan
    from vstar_kernels.attention.triton.tile_backward import TileBackwardPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_MAP_FRAMES = 4096  # 64 MiB for each batch element
MAX_ROWS = 2**31 - 1  # no grid has more programs than a call has such rows
HERE = contextlib.nullcontext()  # where the current device is the call's already
OLDEST_GPU = (8, 0)  # the compute capability from which on there is bfloat16


@functools.cache
def interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> list[str]:
    """Returns why no kernel can run here."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (torch's GPU builds bring it; else pip install triton)"]
    if not interpreted() and not torch.cuda.is_available():
        return ["torch finds no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"]
    return []


def why_not_tensors(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor | None = None
) -> list[str]:
    """Returns why no kernel can take these tensors, ``(…, head_dim)``."""
    if not (query.is_cpu if interpreted() else query.is_cuda):
        place = "cpu" if interpreted() else "cuda"
        return [f"takes {place} tensors, query is on {query.device}", *unavailable()]
    if unavailable():
        return list(unavailable())
    reasons = [*_too_old(query.device)]
    if query.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        reasons.append(f"takes {allowed}, query is {query.dtype}")
    head_dim = query.shape[-1]
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, query has {head_dim}")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        if tensor is not None and (stride := tensor.stride()[-1]) != 1 and head_dim > 1:
            reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
    return reasons


def why_not(call: Call) -> list[str]:
    """Returns why the kernels cannot take this call."""
    reasons = why_not_tensors(call.query, call.key, call.value, call.out)
    rows = call.query.numel() // call.head_dim
    if rows > MAX_ROWS:
        reasons.append(f"takes up to {MAX_ROWS} rows of head_dim, query has {rows}")
    if call.options.map_block == 1 and call.frames > MAX_MAP_FRAMES:
        reasons.append(
            f"returns the mean map of up to {MAX_MAP_FRAMES} frames, query has {call.frames}; "
            "map_block=k returns its sums over k × k frames"
        )
    return reasons


def forward(call: Call, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the mean map.

    With ``save``, the stream kernels save what their backward pass needs of each row.
    """
    out = call.output()
    if not out.numel():
        blocks = call.map_shape if call.options.map_block else None
        # The mean over no sequences.
        return Forward(out, None if blocks is None else plan.new(out, *blocks).fill_(math.nan))
    call = _with_delta_here(call)
    return _run(plan.forward_key(call, out, save=save), call, out)


def prepare(call: Call) -> Callable[[Call], Forward]:
    """Returns ``forward`` for calls that have this one's plan."""
    if not call.query.numel():
        return forward
    key = plan.forward_key(_with_delta_here(call), call.output())

    def run(call: Call) -> Forward:
        return _run(key, _with_delta_here(call), call.output())

    return plan.prepared(key, run, forward)


def _run(key: PlanKey, call: Call, out: Tensor) -> Forward:
    with on(out.device):
        return _forward_plan(key).run(call, out)


def backward(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Computes the gradients."""
    gradients = Gradients(*map(empty_like, (call.query, call.key, call.value)))
    if not out.numel():
        grad_delta = (
            torch.zeros_like(call.delta) if wanted.delta and call.delta is not None else None
        )
        grad_stat = torch.empty_like(call.stat) if wanted.stat and call.stat is not None else None
        return gradients._replace(delta=grad_delta, stat=grad_stat)
    if call.stat is not None and not call.options.detach_stat:
        gradients = gradients._replace(stat=torch.empty_like(call.stat))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_map is not None:
        grad_map = grad_map.contiguous()
    given, call = call, _with_delta_here(call)
    key = plan.backward_key(call, out, saved, grad_out, grad_map, gradients, wanted)
    with on(call.device):
        made = _backward_plan(key)
        grad_matrix = made.run(call, out, saved, grad_out, grad_map, gradients)
    if grad_matrix is not None:
        matrix = grad_matrix if call.delta_per_head else grad_matrix[0]
        gradients = gradients._replace(delta=given.delta_gradient(matrix))
    return gradients if wanted.stat else gradients._replace(stat=None)


@functools.lru_cache(maxsize=4096)
def _forward_plan(key: PlanKey) -> TilePlan | StreamPlan:
    from vstar_kernels.attention.triton import stream, tile

    return tile.make_plan(key) or stream.make_plan(key)


@functools.lru_cache(maxsize=4096)
def _backward_plan(key: PlanKey) -> TileBackwardPlan | StreamBackwardPlan:
    from vstar_kernels.attention.triton import stream_backward, tile_backward

    return tile_backward.make_plan(key) or stream_backward.make_plan(key)


def _with_delta_here(call: Call) -> Call:
    """Returns the call with Δ's entries on its device, those of a row side by side.

    Beside queries in float32 they are float32, too. Triton takes the weights that they are in for
    numbers of 16 bits otherwise, and multiplies these as TF32 on sm_100, whatever it was asked for
    (triton-lang/triton#10176).
    """
    if call.delta is None:
        return call
    delta = devices.on_device(call.delta, call.device)
    if delta.dtype.itemsize < call.query.dtype.itemsize:
        delta = delta.to(call.query.dtype)
    if delta.stride(-1) != 1 and delta.shape[-1] > 1:
        delta = delta.contiguous()
    return call if delta is call.delta else dataclasses.replace(call, delta=delta)


def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which Triton launches on the device."""
    if device.index is None or device.index == torch.cuda.current_device():  # None: the CPU's
        return HERE
    return torch.cuda.device(device)


@functools.cache
def _too_old(device: torch.device) -> list[str]:
    if device.type == "cpu" or torch.version.hip:
        return []
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return []
    return [f"needs compute capability {OLDEST_GPU}, {device} has {capability}"]
