"""``tar_attention``: the formula with all maps, and the bounds of outputs and maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.attention.bias import Bias
from vstar_kernels.testing.bounds import CELL, EPS, ROW_SUM, largest_error


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Returns a random query, key and value, already rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, *shape, generator=generator).to(dtype)
    return tuple(x.clone() for x in drawn)  # none lies behind another, where a kernel could read on


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
    map_block: int = 1,
) -> Any:
    """Computes the formula, every step in the inputs' type, with all maps, as the official code.

    The arguments and shapes are :func:`vstar_kernels.tar_attention`'s. A caller that times it makes
    Δ once, as ``DenseBias(bias.matrix(frames).to(query), …)``.

    Returns:
        The output, or with ``return_map`` the output and the mean map.
    """
    weights = eager_weights(query, key, bias, scale=scale)
    out = (weights @ value.transpose(-3, -2)).transpose(-3, -2)
    if not return_map:
        return out
    shared = tuple(range(1, weights.ndim - (3 if map_heads else 2)))
    mean_map = weights.mean(shared) if shared else weights
    if map_block > 1:
        frames = torch.arange(query.shape[-3], device=query.device)
        in_block = F.one_hot(frames // map_block).to(mean_map)  # (frames, blocks)
        mean_map = in_block.T @ mean_map @ in_block
    return out, mean_map


def eager_weights(
    query: Tensor, key: Tensor, bias: Bias | None = None, *, scale: float | None = None
) -> Tensor:
    """Returns A′ = softmax(φ + strength · stat · Δ), ``(…, heads, frames, frames)``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.transpose(-3, -2) @ key.transpose(-3, -2).mT) * scale
    if bias is not None and bias.strength != 0:
        delta = bias.matrix(query.shape[-3]).to(logits)
        logits = logits + bias.strength * _statistic(logits, bias) * delta
    return logits.softmax(-1)


def _statistic(logits: Tensor, bias: Bias) -> Tensor:
    """Returns the statistic of each row, broadcastable to the logits."""
    dims = {"row_max": (-1,), "map_max": (-2, -1)}
    if isinstance(bias.stat, Tensor):
        stat = bias.stat.mT.unsqueeze(-1).to(logits)
    elif bias.stat not in dims:
        stat = logits.new_ones(())
    elif not logits.requires_grad:
        stat = logits.amax(dims[bias.stat], keepdim=True)
    else:  # amax is faster, but divides a gradient among ties; max gives it to the first
        flat = logits if bias.stat == "row_max" else logits.flatten(-2).unsqueeze(-2)
        stat = flat.max(-1, keepdim=True).values
    if bias.detach_stat:
        stat = stat.detach()
    return clamped(stat) if bias.clamp_negative else stat


def clamped(stat: Tensor) -> Tensor:
    """Returns max(stat, 0); the gradient passes at 0, where torch.clamp's does up to torch 2.13."""
    return torch.where(stat < 0, 0.0, stat)


def oracle(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None = None, **options: Any
) -> Any:
    """Returns :func:`eager`'s results in float64, of the very numbers that the kernel is given."""
    return eager(query.double(), key.double(), value.double(), bias, **options)


def assert_exact(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    *,
    equal_terms: int = 0,
    **options: Any,
) -> None:
    """Asserts that ``out`` errs at most twice as much as PyTorch's in float32, rounded to its type.

    On top come roundings that the two computations need not share, nor be equally unlucky in: a few
    of the largest value, and what four of each logit's terms do to an element. ``equal_terms`` is
    how many logits of a row are equal by construction, as where scale = 0: adding n equal terms
    one by one may round every time in the same direction, by up to eps / 2 of the sum.
    """
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    expected = oracle(query, key, value, bias, **options)
    plain = eager(query.float(), key.float(), value.float(), bias, **options).to(out.dtype)
    if not out.numel():
        return
    size = value.double().abs().max().item()
    allowed = torch.tensor(2 * largest_error(plain, expected) + (4 + equal_terms / 2) * EPS * size)
    error = (out.double() - expected).abs()
    if (error <= allowed).all():
        return
    # No error of the weights moves an output by more than the values' range.
    moved = 2 * EPS * sensitivity(query, key, value, bias, options.get("scale"))
    allowed = allowed + moved.clamp(max=2 * size)
    worst = (error - allowed).nan_to_num(nan=float("inf")).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )


def assert_as_exact_as_eager(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any
) -> None:
    """Asserts :func:`assert_exact` in float32, and in 16 bits at most twice :func:`eager`'s error.

    That is the bound of kernels whose weights are rounded to the inputs' type for the matrix units,
    as eager's are. Two roundings of the largest value come on top.
    """
    if query.dtype == torch.float32:
        assert_exact(out, query, key, value, bias, **options)
        return
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    expected = oracle(query, key, value, bias, **options)
    allowed = 2 * largest_error(eager(query, key, value, bias, **options), expected)
    allowed += 2 * torch.finfo(query.dtype).eps * value.abs().max().item()
    error = largest_error(out, expected)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def sensitivity(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, scale: float | None
) -> Tensor:
    """Returns how far an output's elements move, at most, for relative errors of 1 in its logits.

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
        stat = _statistic(logits, bias)
        stat_terms = stat.abs()
        if isinstance(bias.stat, str) and bias.stat != "none":  # one of the logits, with its terms
            stat_terms = terms.amax(-1 if bias.stat == "row_max" else (-2, -1), keepdim=True)
        terms = terms + weight.abs() * stat_terms
        logits = logits + weight * stat
    weights = logits.softmax(-1)
    moved = weights * terms
    result = moved @ v.abs() + moved.sum(-1, keepdim=True) * (weights @ v).abs()
    return result.transpose(-3, -2)


def assert_map(
    mean_map: Tensor, expected: Tensor, *, frames: int, map_block: int = 1, rows_only: bool = False
) -> None:
    """Asserts that a float32 map holds all weights of its rows, and each in its place.

    A row's sum does not depend on the logits, so its bound holds however large those are. A cell's
    bound is for logits of a few units, whose weights err by a few roundings; ``rows_only`` leaves
    it out.
    """
    assert mean_map.shape == expected.shape
    assert mean_map.dtype == torch.float32
    if not mean_map.numel():
        return
    size = min(map_block, frames)  # rows, and columns, of the map that a cell is summed over
    error = (mean_map.double().sum(-1) - expected.double().sum(-1)).abs().max().item()
    assert error <= ROW_SUM * size, f"a row of the map is off by {error:.3g}"
    if not rows_only:
        error = largest_error(mean_map, expected)
        assert error <= CELL * size**2, f"the map is off by {error:.3g}, allowed {CELL * size**2}"
