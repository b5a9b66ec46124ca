"""A call with its mean map and its gradients, and how exact those have to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import vstar_kernels as vk

EPS = torch.finfo(torch.float32).eps
ROW_SUM = 4e-6  # a row of a map is off by at most, as in tests/attention/cpu_call.py


@dataclass(frozen=True)
class Call:
    """What a call is asked for. ``grads`` are those of the output and of the map; empty: none."""

    bias: vk.attention.bias.Bias | None
    scale: float | None
    map_block: int
    grads: list[Tensor]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, backend: str
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """The output, the mean map if there is one, and the gradients of query, key and value."""
        leaves = [x.detach().requires_grad_(bool(self.grads)) for x in (query, key, value)]
        options = {"return_map": True, "map_block": self.map_block} if self.map_block else {}
        result = vk.tar_attention(*leaves, self.bias, scale=self.scale, backend=backend, **options)
        out, mean_map = result if self.map_block else (result, None)
        gradients: tuple[Tensor, ...] = ()
        if self.grads:
            outputs = [x for x in (out, mean_map) if x is not None][: len(self.grads)]
            grads = [g.to(x.dtype) for g, x in zip(self.grads, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, leaves, grads)
        return out.detach(), None if mean_map is None else mean_map.detach(), gradients


def assert_results(
    call: Call,
    inputs: list[Tensor],
    mean_map: Tensor | None,
    gradients: tuple[Tensor, ...],
    *,
    exact: bool,
) -> None:
    """Of the map and the gradients that there are; where not ``exact``, no bound but finite."""
    if mean_map is None and not gradients:
        return
    _, true_map, true_gradients = call(*(x.double() for x in inputs), backend="reference")
    if mean_map is not None:
        assert true_map is not None
        assert_map(mean_map, true_map, call.map_block, inputs[0].shape[-3], exact=exact)
    assert all(x.isfinite().all() for x in gradients), "a gradient is not finite"
    if gradients and exact:
        plain = call(*inputs, backend="reference")[2]
        assert_gradients(gradients, true_gradients, plain)


def assert_map(
    mean_map: Tensor, expected: Tensor, map_block: int, frames: int, *, exact: bool
) -> None:
    """All weights are in it; where ``exact``, each in its place."""
    assert mean_map.shape == expected.shape
    error = (mean_map.double().sum((1, 2)) - expected.sum((1, 2))).abs().max().item()
    assert error <= ROW_SUM * frames, f"the map's sum is off by {error:.3g}"
    if exact:
        error = (mean_map - expected).abs().max().item()
        assert error <= 16 * EPS * map_block**2, f"the map is off by {error:.3g}"


def assert_gradients(
    gradients: tuple[Tensor, ...], expected: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> None:
    """They err about as little as autograd does."""
    for name, ours, theirs, true in zip(
        ("query", "key", "value"), gradients, plain, expected, strict=True
    ):
        size = true.norm().item()
        error, allowed = ((x.double() - true).norm().item() for x in (ours, theirs))
        # The rounding that is left where all terms cancel, as with values that are all alike.
        nothing = 16 * EPS * math.sqrt(true.numel() * true.shape[-1])
        allowed = 3 * allowed + 8 * EPS * size + nothing
        assert error <= allowed, f"grad_{name}: error {error:.3g}, allowed {allowed:.3g}"
