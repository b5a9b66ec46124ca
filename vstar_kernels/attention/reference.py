"""The plain PyTorch oracle: any device, any floating-point type, any strides, differentiable.

It is what every kernel is tested against, so it is written to be compared with the formula. It
holds all attention maps in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_kernels.attention.allocate import empty_like
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.blocks import block_sums
from vstar_kernels.attention.call import Problem


def tar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_block: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vstar_kernels.tar_attention` by its formula, in float32 or, of float64, in float64.

    The arguments are those of :func:`vstar_kernels.tar_attention` and are not checked here.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (heads_first(x) for x in (query, key, value))
        logits = scale * (q @ k.mT)
        if bias is not None and bias.strength != 0:
            delta = bias.matrix(query.shape[-3]).to(logits)
            logits = logits + bias.strength * statistic(logits, bias) * delta
        weights = logits.softmax(dim=-1)
        out = empty_like(query).copy_((weights @ v).transpose(-3, -2))
    if not return_map:
        return out
    mean = weights.mean(dim=tuple(range(1, weights.ndim - 2)))
    return out, block_sums(mean, map_block).float()


def heads_first(x: Tensor) -> Tensor:
    """(…, frames, heads, head_dim) → (…, heads, frames, head_dim), in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(-3, -2)


def statistic(logits: Tensor, bias: Bias) -> Tensor:
    """Each row's weight before ``strength``, broadcastable to ``(…, heads, frames, frames)``."""
    if isinstance(bias.stat, Tensor):
        stat = bias.stat.mT.unsqueeze(-1).to(logits)
    elif bias.stat == "row_max":
        # max(dim), not amax: one index takes a tie's gradient, the first.
        stat = logits.max(dim=-1, keepdim=True).values
    elif bias.stat == "map_max":
        stat = logits.flatten(-2).max(dim=-1).values[..., None, None]
    else:
        stat = logits.new_ones(())
    if bias.detach_stat:
        stat = stat.detach()
    return stat.clamp(min=0) if bias.clamp_negative else stat


def backward(
    problem: Problem,
    out: Tensor,
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    """The gradients by their formulas; a call that PyTorch can see through has them by autograd."""
    from vstar_kernels.attention import reference_backward  # which builds on this module

    return reference_backward.backward(problem, grad_out, grad_map)


def unavailable() -> list[str]:
    """It runs wherever torch does."""
    return []


def why_not(problem: Problem) -> list[str]:
    """It runs every checked call."""
    return []


def run(problem: Problem) -> Tensor | tuple[Tensor, Tensor]:
    """The output, or ``(output, map)``."""
    tensors = problem.tensors
    return tar_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        problem.bias,
        scale=problem.scale,
        return_map=problem.return_map,
        map_block=problem.map_block,
    )
