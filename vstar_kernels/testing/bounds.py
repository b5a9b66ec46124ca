"""What the bounds of several operations have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
ROW_SUM = 4e-6  # how much a row of a float32 map may miss 1 by
CELL = 16 * EPS  # how much a weight of a float32 map may err by


def largest_error(out: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference; infinity where either is not finite."""
    if not (out.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return (out.double() - expected.double()).abs().max().item() if out.numel() else 0.0


def assert_output(
    out: Tensor, plain: Tensor, expected: Tensor, value: Tensor, moved: Tensor
) -> None:
    """Asserts the bound of an output.

    Args:
        out: The output, ``(batch, tokens, heads, head_dim)``.
        plain: That of the eager formula in the inputs' type.
        expected: That in float64.
        value: In float64, with a head for each of the queries'.
        moved: A′ times its logits' terms, ``(batch, heads, tokens, keys)``.
    """
    assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
    if not out.numel():
        return
    size = value.abs().max().item()
    moves = torch.einsum("bhij,bjhd->bihd", moved, value.abs())
    moves = moves + moved.sum(-1).mT.unsqueeze(-1) * expected.abs()
    bound = 2 * largest_error(plain, expected) + 2 * torch.finfo(out.dtype).eps * size
    allowed = bound + (2 * EPS * moves).clamp(max=2 * size)
    error = (out.double() - expected).abs()
    worst = (error - allowed).nan_to_num(nan=math.inf).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )
