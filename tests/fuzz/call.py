"""A call with its mean map and its gradients, and how exact those have to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels import testing


@dataclass(frozen=True)
class Call:
    """What a call is asked for. ``grads`` are those of the output and of the map; empty: none."""

    bias: vk.attention.bias.Bias | None
    scale: float | None
    map_block: int
    map_heads: bool
    grads: list[Tensor]

    @property
    def map_options(self) -> dict[str, int]:
        return {"return_map": True, "map_block": self.map_block, "map_heads": self.map_heads}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, backend: str
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The output, the mean map if there is one, and the gradients of query, key and value."""
        leaves = [x.detach().requires_grad_(bool(self.grads)) for x in (query, key, value)]
        options = self.map_options if self.map_block else {}
        result = vk.tar_attention(*leaves, self.bias, scale=self.scale, backend=backend, **options)
        out, mean_map = result if self.map_block else (result, None)
        gradients: tuple[Tensor, ...] = ()
        if self.grads:
            outputs = [x for x in (out, mean_map) if x is not None][: len(self.grads)]
            grads = [g.to(x.dtype) for g, x in zip(self.grads, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, leaves, grads)
        named = dict(zip(("query", "key", "value"), gradients, strict=False))
        return out.detach(), None if mean_map is None else mean_map.detach(), named


def assert_results(
    call: Call,
    inputs: list[Tensor],
    mean_map: Tensor | None,
    gradients: dict[str, Tensor],
    *,
    exact: bool,
    equal_terms: int,
) -> None:
    """The map and the gradients that there are hold testing's bounds, if ``exact`` all of them.

    Otherwise the map's rows hold theirs, and the gradients are finite.
    """
    if mean_map is not None:
        options = {"scale": call.scale, **call.map_options}
        _, expected = testing.oracle(*inputs, call.bias, **options)
        sizes = {"frames": inputs[0].shape[-3], "map_block": call.map_block}
        testing.assert_map(mean_map, expected, **sizes, rows_only=not exact)
    assert all(x.isfinite().all() for x in gradients.values()), "a gradient is not finite"

    def compute(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        changed = replace(call, grads=[change(x) for x in call.grads])
        return changed(*map(change, inputs), backend="reference")[2]

    if gradients and exact:
        query = inputs[0]
        vanishing = 16 * testing.EPS * math.sqrt(query.numel() * query.shape[-1])
        bounds = {"equal_terms": equal_terms, "vanishing": vanishing}
        testing.assert_gradients(gradients, compute, **bounds)
