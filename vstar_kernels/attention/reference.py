"""The formulas in plain PyTorch: any device, any floating-point type, any strides, differentiable.

This is the oracle that every kernel is tested against, so it is written to be compared with the
paper. It holds all attention maps in memory. With P = A′, G the gradient of the mean map and m the
statistic, its backward pass, which the kernels compute too, is::

    dP = dO Vᵀ + G / (maps in the mean)     dS = P ∘ (dP − rowsum(P ∘ dP))
    dm = strength · rowsum(dS ∘ Δ)          dΔ = strength · m · dS
    dφ = dS, and dm at the logit that is the statistic
    dQ = scale · dφ K,    dK = scale · dφᵀ Q,    dV = Pᵀ dO
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import (
    Call,
    Forward,
    Gradients,
    Wanted,
    block_gradient,
    block_sums,
    clamped,
    has_autocast,
    laid_like,
    make_call,
)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vstar_kernels.tar_attention` by its formula, in float32 or, of float64, in float64.

    The arguments are those of :func:`vstar_kernels.tar_attention` and are not checked here.
    """
    call = make_call(query, key, value, bias, scale, map_block if return_map else 0, map_heads)
    out, mean_map, _ = forward(call)
    return out if mean_map is None else (out, mean_map)


def unavailable() -> list[str]:
    """Returns no reason: the reference runs wherever torch does."""
    return []


def why_not(call: Call) -> list[str]:
    """Returns no reason: the reference runs every checked call."""
    return []


def forward(call: Call, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the mean map; saves nothing."""
    with _without_autocast(call.device):
        _, weights = _logits_and_weights(call)
        v = heads_first(call.value)
        values = (weights @ v).transpose(-3, -2)
        out = laid_like(call.query, values) if call.out is None else call.out.copy_(values)
    if not call.options.map_block:
        return Forward(out)
    shared = _shared_dims(call, weights)
    mean = weights.mean(dim=shared) if shared else weights
    return Forward(out, block_sums(mean, call.options.map_block).float())


def _shared_dims(call: Call, weights: Tensor) -> tuple[int, ...]:
    """Returns the dimensions of ``(batch, [space,] heads, …)`` that the map is the mean over."""
    return tuple(range(1, weights.ndim - (3 if call.options.map_heads else 2)))


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if has_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def heads_first(x: Tensor) -> Tensor:
    """(…, frames, heads, head_dim) → (…, heads, frames, head_dim), in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(-3, -2)


def statistic(logits: Tensor, stat: str | Tensor) -> Tensor:
    """Returns each row's statistic, broadcastable to ``(…, heads, frames, frames)``.

    A given ``stat`` is of ``(…, frames, heads)``.
    """
    if isinstance(stat, Tensor):
        return stat.mT.unsqueeze(-1).to(logits)
    if stat == "row_max":
        # max(dim), not amax: one index takes a tie's gradient, the first.
        return logits.max(dim=-1, keepdim=True).values
    if stat == "map_max":
        return logits.flatten(-2).max(dim=-1).values[..., None, None]
    return logits.new_ones(())


def _logits_and_weights(call: Call) -> tuple[Tensor, Tensor]:
    """Returns φ and A′, ``(…, heads, frames, frames)``."""
    options = call.options
    logits = options.scale * (heads_first(call.query) @ heads_first(call.key).mT)
    if options.form == "none":
        return logits, logits.softmax(dim=-1)
    delta = call.delta_matrix().to(logits)
    biased = logits + options.strength * _weight_of_delta(call, logits) * delta
    return logits, biased.softmax(dim=-1)


def _weight_of_delta(call: Call, logits: Tensor) -> Tensor:
    """Returns what Δ is weighted by besides the strength: the statistic, detached or clamped."""
    stat = statistic(logits, call.options.stat if call.stat is None else call.stat)
    if call.options.detach_stat:
        stat = stat.detach()
    return clamped(stat) if call.options.clamp_negative else stat


def backward(
    call: Call,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Computes the gradients by their formulas, where autograd cannot be asked for them."""
    scale = call.options.scale
    q, k, v = (heads_first(x) for x in (call.query, call.key, call.value))
    logits, weights = _logits_and_weights(call)
    d_out = torch.zeros_like(q) if grad_out is None else heads_first(grad_out)
    d_weights = d_out @ v.mT
    if grad_map is not None:
        d_weights = d_weights + _gradient_of_the_mean(call, grad_map, d_weights)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    d_delta, d_stat = None, None
    if call.options.form != "none":
        if wanted.delta:
            d_delta = _delta_gradient(call, logits, d_logits)
        d_logits, d_stat = _through_statistic(call, logits, d_logits)

    return Gradients(
        laid_like(call.query, scale * (d_logits @ k).transpose(-3, -2)),
        laid_like(call.key, scale * (d_logits.mT @ q).transpose(-3, -2)),
        laid_like(call.value, (weights.mT @ d_out).transpose(-3, -2)),
        d_delta,
        d_stat if wanted.stat else None,
    )


def _gradient_of_the_mean(call: Call, grad_map: Tensor, weights: Tensor) -> Tensor:
    """Returns G over the number of maps in a mean, which is the same for all of those."""
    whole = block_gradient(grad_map, call.options.map_block, call.frames).to(weights)
    shared = _shared_dims(call, weights)
    whole = whole.reshape(len(whole), *[1] * len(shared), *whole.shape[1:])
    return whole / math.prod(weights.shape[dim] for dim in shared)


def _delta_gradient(call: Call, logits: Tensor, d_biased: Tensor) -> Tensor:
    """Returns the gradient of Δ's entries, summed over all that share them."""
    per_map = call.options.strength * _weight_of_delta(call, logits) * d_biased
    kept = 3 if call.delta_per_head else 2
    return call.delta_gradient(per_map.sum(dim=tuple(range(per_map.ndim - kept))))


def _through_statistic(
    call: Call, logits: Tensor, d_biased: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns dφ, with what comes through the statistic, or that of a statistic that was given."""
    options = call.options
    if options.detach_stat or options.stat == "none":
        return d_biased, None
    delta = call.delta_matrix().to(logits)
    d_stat = options.strength * (d_biased * delta).sum(-1, keepdim=True)
    if options.stat == "map_max":
        d_stat = d_stat.sum(-2, keepdim=True)
    if options.clamp_negative:  # as clamped passes it
        stat = statistic(logits, options.stat if call.stat is None else call.stat)
        d_stat = torch.where(stat >= 0, d_stat, 0.0)
    if call.stat is not None:
        return d_biased, d_stat.squeeze(-1).mT.to(call.stat)
    if options.stat == "row_max":
        return d_biased.scatter_add(-1, logits.argmax(-1, keepdim=True), d_stat), None
    flat, index = d_biased.flatten(-2), logits.flatten(-2).argmax(-1, keepdim=True)
    return flat.scatter_add(-1, index, d_stat.squeeze(-1)).view_as(d_biased), None
