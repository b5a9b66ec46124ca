"""The Triton kernels: float32, bfloat16 and float16 tensors on NVIDIA and AMD GPUs.

With ``TRITON_INTERPRET=1`` in the environment of the process, Triton's interpreter runs the same
kernels on CPU tensors, slowly, for tests. Nothing here imports triton before it is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from vstar_kernels.attention.call import Call, Forward, Gradients, Wanted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_MAP_FRAMES = 4096  # 64 MiB for each batch element
MAX_ROWS = 2**31 - 1  # no grid has more programs than the problem has rows
OLDEST_GPU = (8, 0)  # the compute capability from which on there is bfloat16


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> list[str]:
    """Why no kernel can run here."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (torch's GPU builds bring it; else pip install triton)"]
    if not interpreted() and not torch.cuda.is_available():
        return ["torch finds no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"]
    return []


def why_not(call: Call) -> list[str]:
    """Returns why the kernels cannot take this call."""
    place = "cpu" if interpreted() else "cuda"
    if call.device.type != place:
        return [f"takes {place} tensors, query is on {call.device}", *unavailable()]
    if unavailable():
        return list(unavailable())
    reasons = _too_old(call.device)
    if call.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        reasons.append(f"takes {allowed}, query is {call.dtype}")
    if call.head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, query has {call.head_dim}")
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        stride = tensor.stride(-1)
        if stride != 1 and call.head_dim > 1:
            reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
    rows = math.prod(call.shape[:-1])
    if rows > MAX_ROWS:
        reasons.append(f"takes up to {MAX_ROWS} rows of head_dim, query has {rows}")
    if call.options.map_block == 1 and call.frames > MAX_MAP_FRAMES:
        reasons.append(
            f"returns the mean map of up to {MAX_MAP_FRAMES} frames, query has {call.frames}; "
            "map_block=k returns its sums over k × k frames"
        )
    return reasons


def forward(call: Call, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the mean map; saves nothing."""
    return _module("launch").run(call)


def backward(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Computes the gradients; everything is computed anew but the output."""
    return _module("launch_backward").run(call, out, grad_out, grad_map, wanted)


def _too_old(device: torch.device) -> list[str]:
    if device.type == "cpu" or torch.version.hip:
        return []
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return []
    return [f"needs compute capability {OLDEST_GPU}, {device} has {capability}"]


@functools.cache
def _module(name: str) -> ModuleType:
    """One of this package's, all of which import triton."""
    return importlib.import_module(f"vstar_kernels.attention.triton.{name}")
