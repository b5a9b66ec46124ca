"""Whether a result is right, and a refusal to time a wrong one."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import assert_exact, eager, largest_error, oracle
from vstar_kernels.bias import Bias

SAMPLES = 32


def assert_right(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: float
) -> None:
    """In float32 as exact as PyTorch; in 16 bits at most twice the eager formula's error."""
    out, query, key, value = (x.cpu() for x in (out, query, key, value))
    if query.dtype == torch.float32:
        assert_exact(out, query, key, value, bias, **options)
        return
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    expected = oracle(query, key, value, bias, **options)
    allowed = 2 * largest_error(eager(query, key, value, bias, **options), expected)
    allowed += 2 * torch.finfo(query.dtype).eps * value.abs().max().item()
    error = largest_error(out, expected)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def sample(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of each tensor so many of the batch, the first and the last among them."""
    batch = tensors[0].shape[0]
    places = torch.linspace(0, batch - 1, min(count, batch), dtype=torch.float64).long()
    return tuple(x[places.to(x.device)] for x in tensors)


def check(out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias) -> None:
    """Compare a sample of the batch and its first heads with the float64 oracle."""
    parts = sample(SAMPLES if query.shape[1] <= 128 else 2, out, query, key, value)
    try:
        out, query, key, value = (x[..., :2, :] for x in parts)
        assert_right(out, query, key, value, bias)
    except AssertionError as error:
        raise SystemExit(f"wrong result for {tuple(query.shape)}, {query.dtype}: {error}") from None
