"""The oracle, the eager formula and the tolerances that tests and benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import reference
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import block_sums


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Random query, key and value, already rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, *shape, generator=generator).to(dtype).unbind())


def oracle(query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any) -> Any:
    """The formula in float64 on the very numbers that the kernel is given."""
    return reference.tar_attention(query.double(), key.double(), value.double(), bias, **options)


def largest_error(out: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where either is not finite."""
    if not (out.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return (out.double() - expected.double()).abs().max().item() if out.numel() else 0.0


def assert_exact(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any
) -> None:
    """``out`` errs at most twice as much as PyTorch does in float32, rounded to its type, does.

    On top come roundings that the two computations need not share, nor be equally unlucky in: a few
    of the largest value, and what four of each logit's terms do to an element.
    """
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    expected = oracle(query, key, value, bias, **options)
    plain: Any = reference.tar_attention(query, key, value, bias, **options)
    if not out.numel():
        return
    eps = torch.finfo(torch.float32).eps
    size = value.double().abs().max().item()
    allowed = torch.tensor(2 * largest_error(plain, expected) + 4 * eps * size)
    error = (out.double() - expected).abs()
    if (error <= allowed).all():
        return
    # No error of the weights moves an output by more than the values' range.
    moved = 2 * eps * sensitivity(query, key, value, bias, options.get("scale"))
    allowed = allowed + moved.clamp(max=2 * size)
    worst = (error - allowed).nan_to_num(nan=float("inf")).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )


def sensitivity(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, scale: float | None
) -> Tensor:
    """How far each element of the output moves, at most, for relative errors of 1 in its logits.

    Logits are sums, of products and of the bias: they err relatively to the sum of their terms'
    absolute values tᵢⱼ, however much cancels. To first order
    |δoutᵢ| ≤ Σⱼ A′ᵢⱼ tᵢⱼ |vⱼ − outᵢ| ≤ Σⱼ A′ᵢⱼ tᵢⱼ (|vⱼ| + |outᵢ|).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.double().transpose(-3, -2) for x in (query, key, value))
    logits = scale * (q @ k.mT)
    terms = abs(scale) * (q.abs() @ k.mT.abs())
    if bias is not None and bias.strength != 0:
        weight = bias.strength * bias.matrix(query.shape[-3]).double()
        stat = _weight_of_delta(logits, bias)
        stat_terms = stat.abs()
        if isinstance(bias.stat, str) and bias.stat != "none":  # one of the logits, with its terms
            stat_terms = terms.amax(-1 if bias.stat == "row_max" else (-2, -1), keepdim=True)
        terms = terms + weight.abs() * stat_terms
        logits = logits + weight * stat
    weights = logits.softmax(-1)
    moved = weights * terms
    result = moved @ v.abs() + moved.sum(-1, keepdim=True) * (weights @ v).abs()
    return result.transpose(-3, -2)


def _weight_of_delta(logits: Tensor, bias: Bias) -> Tensor:
    stat = reference.statistic(logits, bias.stat)
    if bias.detach_stat:
        stat = stat.detach()
    return stat.clamp(min=0) if bias.clamp_negative else stat


def eager(query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any) -> Tensor:
    """The formula with every step in the inputs' type, as the official code computes it."""
    return eager_with_map(query, key, value, bias, **options)[0]


def eager_with_map(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`eager` and the mean map."""
    scale = query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    q, k, v = (x.transpose(-3, -2) for x in (query, key, value))
    logits = (q @ k.mT) * scale
    if bias is not None and bias.strength != 0:
        delta = bias.matrix(query.shape[-3]).to(logits)
        logits = logits + bias.strength * _weight_of_delta(logits, bias) * delta
    weights = logits.softmax(-1)
    mean_map = weights.mean(tuple(range(1, weights.ndim - 2)))
    mean_map = block_sums(mean_map, options.get("map_block", 1))
    return (weights @ v).transpose(-3, -2), mean_map
