"""``out=``: a tensor of the caller's that takes an operation's output, as those of torch do.

A backend writes into it where the call is only run. Where the call is traced or watched, or under
``torch.func``, the operation stays the one that has a result of its own, which is then copied: our
operator has no side effect in a graph, and torch decides what memory is shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.bias import check_strided
from vstar_kernels.attention.call import Call, carry_tangents


def check(call: Call, out: Tensor) -> None:
    """Checks that a call may write its output into ``out``.

    Raises:
        ValueError: It has another shape, type or device, or a gradient is wanted.
        TypeError: It is no tensor.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}")
    check_strided(out, "out")
    if out.shape != call.shape:
        raise ValueError(f"out must have query's shape {tuple(call.shape)}, got {tuple(out.shape)}")
    if out.dtype != call.dtype:
        raise ValueError(f"out must have the output's type {call.dtype}, got {out.dtype}")
    if out.device != call.device:
        raise ValueError(f"out must be on query's device {call.device}, got {out.device}")
    if torch.is_grad_enabled() and (call.requires_grad or out.requires_grad):
        wanting = [name for name, x in call.tensors().items() if x.requires_grad] or ["out"]
        raise ValueError(
            f"out= has no gradient, and {wanting[0]} requires one: leave out= away, or call under "
            "torch.no_grad()"
        )


def filled(out: Tensor, found: Any) -> Any:
    """Copies the output into ``out``; returns what the public function returns with it."""
    if isinstance(found, Tensor):
        return out.copy_(found)
    attended, mean_map = found
    return out.copy_(attended), mean_map


def check_memory(call: Call, out: Tensor) -> None:
    """Checks that a backend may write to ``out`` while it reads the call's tensors.

    A kernel reads keys and values again after it has written outputs, so none of its tensors may
    lie where ``out`` does.

    Raises:
        ValueError: It shares memory with one of them or with itself, cannot be written to here, or
            a tensor carries a tangent.
    """
    tensors = call.tensors()
    if carry_tangents([*tensors.values(), out]):
        raise ValueError("out= has no forward-mode derivative, and a tensor carries a tangent")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out is an inference tensor, which only torch.inference_mode() writes to")
    if _may_overlap_itself(out):
        raise ValueError(
            "out must have each of its elements in a place of its own, "
            f"got shape {tuple(out.shape)}, strides {out.stride()}"
        )
    first, end = _extent(out)
    for name, tensor in tensors.items():
        other_first, other_end = _extent(tensor)
        if first < other_end and other_first < end and tensor.device == out.device:
            raise ValueError(
                "out's memory, from its first to its last element, must not meet that of " + name
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the addresses of a tensor's first element and of the end of its last."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _may_overlap_itself(tensor: Tensor) -> bool:
    """Returns whether two elements may have one place: whether a step is within a smaller one's."""
    if not tensor.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False
