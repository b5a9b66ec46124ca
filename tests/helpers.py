"""What the tests compare with and how closely."""

from __future__ import annotations

import torch
from torch import Tensor

import vstar_kernels as vk


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Random query, key and value, already rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, *shape, generator=generator).to(dtype).unbind())


def oracle(
    query: Tensor, key: Tensor, value: Tensor, bias: vk.bias.Bias | None, **options
) -> Tensor:
    """The formula in float64 on the very numbers that the kernel is given."""
    return vk.reference.tar_attention(query.double(), key.double(), value.double(), bias, **options)


def largest_error(out: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where either is not finite."""
    if not (out.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return (out.double() - expected.double()).abs().max().item() if out.numel() else 0.0


def assert_exact(out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias, **options) -> None:
    """``out`` errs at most twice as much as PyTorch does in float32, rounded to its type, does.

    On top come a few roundings of the output, and one of the largest logit: an error of that size
    in a logit is relative in its weight, and the two computations need not be unlucky together.
    """
    expected = oracle(query, key, value, bias, **options)
    plain = vk.reference.tar_attention(query, key, value, bias, **options)
    allowed = 2 * largest_error(plain, expected)
    if out.numel():
        size = max(1.0, expected.abs().max().item())
        logits = largest_logit(query, key, bias, options.get("scale"))
        allowed += torch.finfo(torch.float32).eps * size * (4 + logits)
    error = largest_error(out, expected)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def largest_logit(query: Tensor, key: Tensor, bias, scale: float | None) -> float:
    """A bound on the regularized logits, for a Δ of at most 1."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.double().transpose(-3, -2) for x in (query, key))
    largest = scale * (q @ k.mT).abs().max().item()
    return abs(largest) * (1 + abs(bias.strength if bias else 0.0))
