"""The operations of the ``cross`` suites: attention to a text, with the maps of some words.

The shapes are those of the cross-attention of workloads.json's ``cross`` models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.clock import TimedCall
from benchmarks.column_adapters import columns_of_words
from benchmarks.operations import Forward
from benchmarks.peers import Peer
from vstar_kernels.testing import assert_columns, eager_columns, largest_error

# The error of others' results over that of the eager formula in their type: they round maps too.
FACTOR = 4


class Cross(Forward):
    """One call without gradients."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        assert case.keys is not None
        self.case = case
        text = (2, case.batch, case.keys, case.heads, case.head_dim)
        # A query and a gradient of the output: what a copy of equal traffic reads.
        self.blocks = [
            torch.randn(2, *case.shape, device=device).to(case.torch_dtype) for _ in range(num_sets)
        ]
        self.inputs = [
            (block[0], *torch.randn(text, device=device).to(case.torch_dtype).unbind())
            for block in self.blocks
        ]
        self._columns = columns_of_words(case.keys).to(device)

    def offers(self, peer: Peer) -> bool:
        return peer.build_cross is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        assert peer.build_cross is not None
        return TimedCall(name, peer.build_cross(self._columns)), ""

    def check(self, peer: Peer, result: Any) -> float:
        """Checks the first and the last sequence's results."""
        query, key, value = self._sample(self.inputs[0])
        out, maps = found = self._sample(result[:2])
        columns = self._columns.cpu()
        exact = eager_columns(query.double(), key.double(), value.double(), columns.double())
        if peer.ours:
            assert_columns(found, query, key, value, columns)
        else:
            plain = eager_columns(query, key, value, columns)
            eps = torch.finfo(query.dtype).eps
            sizes = value.abs().max().item(), columns.max().item()
            for x, y, z, size in zip(found, plain, exact, sizes, strict=True):
                error, allowed = largest_error(x, z), FACTOR * (largest_error(y, z) + eps * size)
                assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
        return max(largest_error(out, exact[0]), largest_error(maps, exact[1]))

    def _sample(self, tensors: Any) -> tuple[Tensor, ...]:
        places = sorted({0, self.case.batch - 1})
        return tuple(x[places].cpu() for x in tensors)


class CrossBackward(Cross):
    """The output, the maps and, through autograd, the gradient of the query alone."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        super().__init__(case, device, num_sets)
        maps = (*case.shape[:2], self._columns.shape[1])
        self._grads = self.blocks[0][1], case.heads * torch.randn(maps, device=device)

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        timed, note = super().timed_call(name, peer)

        def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            leaf = query.detach().requires_grad_()
            out, maps = timed.function(leaf, key, value)
            grads = self._grads[0], self._grads[1].to(maps.dtype)
            return out.detach(), maps.detach(), *torch.autograd.grad((out, maps), leaf, grads)

        return TimedCall(name, call), note

    def check(self, peer: Peer, result: Any) -> float:
        error = super().check(peer, result)
        exact, plain = self._gradient(Tensor.double), self._gradient(lambda x: x)
        (found,) = self._sample(result[2:])
        allowed = FACTOR * ((plain.double() - exact).norm() / exact.norm()).item()
        allowed += FACTOR * torch.finfo(found.dtype).eps
        relative = ((found.double() - exact).norm() / exact.norm()).item()
        assert relative <= allowed, f"the gradient's error {relative:.3g}, allowed {allowed:.3g}"
        return max(error, largest_error(found, exact))

    def _gradient(self, change: Any) -> Tensor:
        """Returns the eager formula's gradient of the sampled queries, of changed inputs."""
        query, key, value = (change(x) for x in self._sample(self.inputs[0]))
        query.requires_grad_()
        results = eager_columns(query, key, value, change(self._columns.cpu()))
        grads = [change(x).to(y) for x, y in zip(self._sample(self._grads), results, strict=True)]
        (gradient,) = torch.autograd.grad(results, query, grads)
        return gradient
