"""``column_attention``: the formula with all weights, and its bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vstar_kernels.testing.bounds import CELL, assert_output, largest_error
from vstar_kernels.testing.temporal import eager_weights


def eager_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """Computes :func:`vstar_kernels.column_attention` with all weights, in the inputs' type.

    In float64 it is the oracle.

    Returns:
        The output and the maps; without a value the maps.
    """
    weights = eager_weights(query, key, scale=scale)  # (batch, heads, N, T)
    maps = weights.mean(1) @ columns.to(weights)
    if value is None:
        return maps
    return (weights @ value.transpose(1, 2)).transpose(1, 2), maps


def assert_columns(
    found: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> None:
    """Asserts that :func:`vstar_kernels.column_attention`'s result is about as exact as PyTorch's.

    ``found`` is what it returned for the arguments. The bounds are those of :func:`assert_frames`;
    a map, which is a sum of weights that add up to 1, errs by the largest weight of a column more.
    """
    q, k = query.double(), key.double()
    weights = eager_weights(q, k, scale=scale)
    factor = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    terms = factor * torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs())
    maps = found
    if value is not None:
        out, maps = found
        plain, _ = eager_columns(query, key, value, columns, scale=scale)
        expected = torch.einsum("bhij,bjhd->bihd", weights, value.double())
        assert_output(out, plain, expected, value.double(), weights * terms)
    expected_maps = weights.mean(1) @ columns.double()
    assert (maps.shape, maps.dtype) == (expected_maps.shape, torch.float32)
    if not maps.numel():
        return
    error = largest_error(maps, expected_maps)
    allowed = CELL * max(1.0, terms.max().item()) * columns.abs().max().item()
    assert error <= allowed, f"a map is off by {error:.3g}, allowed {allowed:.3g}"
