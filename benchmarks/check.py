"""Whether a result is right: a sample against the float64 oracle. Wrong ones are not timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels.attention.bias import Bias
from vstar_kernels.testing import (
    assert_as_exact_as_eager,
    eager,
    largest_error,
    oracle,
)

SEQUENCES, HEADS = 32, 2  # of the sample, up to SHORT_FRAMES; one of each above
SHORT_FRAMES = 256


def assert_right(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: float
) -> None:
    """In float32 as exact as PyTorch; in 16 bits at most twice the eager formula's error."""
    assert_as_exact_as_eager(*(x.cpu() for x in (out, query, key, value)), bias, **options)


def sample(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of each tensor so many of the batch, the first and the last among them."""
    batch = tensors[0].shape[0]
    places = torch.linspace(0, batch - 1, min(count, batch), dtype=torch.float64).long()
    return tuple(x[places.to(x.device)] for x in tensors)


class Oracle:
    """A sample of one case's inputs, and what they must give in float64, with ``bias``.

    Its methods return the error that they find and raise AssertionError if it is too large.
    """

    def __init__(self, inputs: tuple[Tensor, ...], bias: Bias) -> None:
        short = inputs[0].shape[1] <= SHORT_FRAMES
        self._sequences, self._heads = (SEQUENCES, HEADS) if short else (1, 1)
        self._inputs = inputs
        self._bias = bias

    def check_forward(self, out: Tensor) -> float:
        """The largest error of an output."""
        (found,) = self._sample(out)
        error = largest_error(found, self._expected)
        if not error <= self._allowed:  # what ill-conditioned logits excuse takes long to find
            assert_right(found, *self._parts, self._bias)
        return error

    def check_map(self, mean_map: Tensor) -> float:
        """The error of a mean map over all heads, ``(batch, frames, frames)``, over its norm."""
        found, *inputs = (x.cpu() for x in sample(self._sequences, mean_map, *self._inputs))
        doubles = [x.double() for x in inputs]
        _, expected = vk.reference.tar_attention(*doubles, self._bias, return_map=True)
        _, plain = eager(*inputs, self._bias, return_map=True)
        return _relative_error(found, expected, plain)

    def check_gradients(self, grads: list[Tensor], grad_out: Tensor) -> float:
        """The largest error of the three gradients over their norms."""
        (last,) = self._sample(grad_out)

        def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = [x.to(dtype).requires_grad_() for x in self._parts]
            return torch.autograd.grad(function(*leaves, self._bias), leaves, last.to(dtype))

        exact = gradients(vk.reference.tar_attention, torch.float64)
        plain = gradients(eager, last.dtype)
        found = self._sample(*grads)
        return max(_relative_error(*x) for x in zip(found, exact, plain, strict=True))

    def _sample(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts = sample(self._sequences, *tensors)
        return tuple(x[..., : self._heads, :].cpu() for x in parts)

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        return self._sample(*self._inputs)

    @cached_property
    def _expected(self) -> Tensor:
        return oracle(*self._parts, self._bias)

    @cached_property
    def _allowed(self) -> float:
        """As :func:`assert_right`."""
        value = self._parts[2]
        exact = value.dtype == torch.float32
        plain = vk.reference.tar_attention if exact else eager
        eps = torch.finfo(value.dtype).eps
        error = largest_error(plain(*self._parts, self._bias), self._expected)
        return 2 * error + 2 * eps * value.abs().max().item()


def _relative_error(found: Tensor, exact: Tensor, plain: Tensor) -> float:
    """The error over the norm of ``exact``; twice that of ``plain`` is allowed, and two eps."""
    error, theirs = (((x.double() - exact).norm() / exact.norm()).item() for x in (found, plain))
    allowed = 2 * theirs + 2 * torch.finfo(found.dtype).eps
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
    return error
