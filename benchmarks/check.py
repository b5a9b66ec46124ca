"""Whether a result is right: a sample against the float64 oracle. Wrong ones are not timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from vstar_kernels.attention.bias import Bias
from vstar_kernels.testing import (
    assert_as_exact_as_eager,
    assert_gradients,
    eager,
    largest_error,
    oracle,
)

SEQUENCES, HEADS = 32, 2  # of the sample, up to SHORT_FRAMES; one of each above
SHORT_FRAMES = 256


def sample(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns so many of each tensor's batch, the first and the last among them."""
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
        """Returns the largest error of an output."""
        (found,) = self._sample(out)
        error = largest_error(found, self._expected)
        if not error <= self._allowed:  # what ill-conditioned logits excuse takes long to find
            assert_as_exact_as_eager(found, *self._sampled, self._bias)
        return error

    def check_map(self, mean_map: Tensor) -> float:
        """Returns the error of a mean map, ``(batch, frames, frames)``, over its norm."""
        found, *inputs = (x.cpu() for x in sample(self._sequences, mean_map, *self._inputs))
        _, exact = oracle(*inputs, self._bias, return_map=True)
        _, plain = eager(*inputs, self._bias, return_map=True)
        error, theirs = (((x - exact).norm() / exact.norm()).item() for x in (found, plain))
        allowed = 2 * theirs + 2 * torch.finfo(found.dtype).eps
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
        return error

    def check_gradients(self, grads: tuple[Tensor, ...], grad_out: Tensor) -> float:
        """Returns the largest error of the three gradients over their norms."""
        (grad_out,) = self._sample(grad_out)
        names = ("query", "key", "value")

        def compute(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            leaves = [change(x.detach()).requires_grad_() for x in self._sampled]
            out = eager(*leaves, self._bias)
            found = torch.autograd.grad(out, leaves, change(grad_out).to(out))
            return dict(zip(names, found, strict=True))

        return assert_gradients(dict(zip(names, self._sample(*grads), strict=True)), compute)

    def _sample(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        taken = sample(self._sequences, *tensors)
        return tuple(x[..., : self._heads, :].cpu() for x in taken)

    @cached_property
    def _sampled(self) -> tuple[Tensor, ...]:
        return self._sample(*self._inputs)

    @cached_property
    def _expected(self) -> Tensor:
        return oracle(*self._sampled, self._bias)

    @cached_property
    def _allowed(self) -> float:
        """Returns the largest error that needs no excuse: about twice the eager formula's."""
        value = self._sampled[2]
        error = largest_error(eager(*self._sampled, self._bias), self._expected)
        return 2 * error + 2 * torch.finfo(value.dtype).eps * value.abs().max().item()
