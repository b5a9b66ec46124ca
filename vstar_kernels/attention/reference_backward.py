"""The gradients of the reference by their formulas, where autograd cannot be asked for them.

The kernels compute the same. With P = A′, G the gradient of the mean map and m the statistic::

    dP = dO Vᵀ + G / (space · heads)        dS = P ∘ (dP − rowsum(P ∘ dP))
    dm = strength · rowsum(dS ∘ Δ)          dΔ = strength · m · dS
    dφ = dS, and dm at the logit that is the statistic
    dQ = scale · dφ K,    dK = scale · dφᵀ Q,    dV = Pᵀ dO
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vstar_kernels.attention.allocate import empty_like
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.blocks import block_gradient
from vstar_kernels.attention.call import Problem
from vstar_kernels.attention.reference import heads_first, statistic


def backward(
    problem: Problem, grad_out: Tensor | None, grad_map: Tensor | None
) -> dict[str, Tensor]:
    """Gradients by the names of the problem's tensors, with their shapes and types."""
    tensors, bias, scale = problem.tensors, problem.bias, problem.scale
    q, k, v = (heads_first(tensors[name]) for name in ("query", "key", "value"))
    logits = scale * (q @ k.mT)
    weights = _weights(logits, bias)
    d_out = torch.zeros_like(q) if grad_out is None else heads_first(grad_out)
    d_weights = d_out @ v.mT
    if grad_map is not None:
        d_weights = d_weights + _of_the_mean(grad_map, problem, d_weights)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    gradients: dict[str, Tensor] = {}
    if bias is not None:
        d_logits, gradients = _through_bias(bias, logits, d_logits)
    for name, gradient in (
        ("query", scale * (d_logits @ k)),
        ("key", scale * (d_logits.mT @ q)),
        ("value", weights.mT @ d_out),
    ):
        gradients[name] = empty_like(tensors[name]).copy_(gradient.transpose(-3, -2))
    return gradients


def _weights(logits: Tensor, bias: Bias | None) -> Tensor:
    if bias is not None:
        delta = bias.matrix(logits.shape[-1]).to(logits)
        logits = logits + bias.strength * statistic(logits, bias) * delta
    return logits.softmax(-1)


def _of_the_mean(grad_map: Tensor, problem: Problem, weights: Tensor) -> Tensor:
    """G / (space · heads), the same for all maps of a batch element."""
    whole = block_gradient(grad_map, problem.map_block, problem.frames).to(weights)
    shared = weights.shape[1:-2]
    return whole.reshape(-1, *[1] * len(shared), *whole.shape[-2:]) / math.prod(shared)


def _through_bias(bias: Bias, logits: Tensor, d_biased: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits' gradient, with what comes through the statistic, and those of the bias."""
    gradients = {}
    delta = bias.matrix(logits.shape[-1]).to(logits)
    tensors = bias.named_tensors()
    if "values" in tensors:
        per_map = bias.strength * statistic(logits, bias) * d_biased
        shared = 3 if delta.ndim == 3 else 2
        summed = per_map.sum(dim=tuple(range(per_map.ndim - shared)))
        gradients["values"] = bias.values_gradient(summed)
    if bias.detach_stat or bias.stat == "none":
        return d_biased, gradients

    d_stat = bias.strength * (d_biased * delta).sum(-1, keepdim=True)
    if bias.stat == "map_max":
        d_stat = d_stat.sum(-2, keepdim=True)
    if bias.clamp_negative:  # clamp passes the gradient at 0 too
        unclamped = statistic(logits, dataclasses.replace(bias, clamp_negative=False))
        d_stat = torch.where(unclamped >= 0, d_stat, 0.0)
    if isinstance(bias.stat, Tensor):
        gradients["stat"] = d_stat.squeeze(-1).mT.to(bias.stat)
        return d_biased, gradients
    if bias.stat == "row_max":
        return d_biased.scatter_add(-1, logits.argmax(-1, keepdim=True), d_stat), gradients
    flat, index = d_biased.flatten(-2), logits.flatten(-2).argmax(-1, keepdim=True)
    return flat.scatter_add(-1, index, d_stat.squeeze(-1)).view_as(d_biased), gradients
