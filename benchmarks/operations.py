"""The operations: what a peer is made to do in a case, and how its result is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import BIAS, NO_BIAS, Inputs
from benchmarks.cases import Case
from benchmarks.check import Oracle
from benchmarks.clock import Tensors, TimedCall
from benchmarks.peers import Peer

CALLS = 500  # of a call that takes microseconds


class Forward:
    """One call without gradients, on one of ``num_sets`` sets of random inputs at a time."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        self.case = case
        # One block of memory for all three: two of them are what a copy of equal traffic reads.
        self.blocks = [
            torch.randn(3, *case.shape, device=device).to(case.torch_dtype) for _ in range(num_sets)
        ]
        self.inputs: list[Tensors] = [tuple(block.unbind()) for block in self.blocks]
        self._like: Inputs = self.inputs[0]
        self._oracles = {bias: Oracle(self._like, bias) for bias in (BIAS, NO_BIAS)}

    def offers(self, peer: Peer) -> bool:
        """Returns whether the peer has this operation at all."""
        return peer.build is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        """Returns what is to be timed, and what the peer notes about itself."""
        attention = peer.build(self._like)
        return TimedCall(name, attention), getattr(attention, "note", "")

    def check(self, peer: Peer, result: Any) -> float:
        """Returns the error of a peer's result. Raises AssertionError if it is too large."""
        return self._oracles[peer.bias].check_forward(result)


class Call(Forward):
    """The same, so short that only many take a time worth measuring; with the CPU's part."""

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        timed, note = super().timed_call(name, peer)
        return replace(timed, repeats=CALLS, wall_clock=True), note


class Map(Forward):
    """One call that returns the mean map too."""

    def offers(self, peer: Peer) -> bool:
        return peer.build_with_map is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        return TimedCall(name, peer.build_with_map(self._like)), ""

    def check(self, peer: Peer, result: Any) -> float:
        out, mean_map = result if isinstance(result, tuple) else (result, None)
        error = self._oracles[BIAS].check_forward(out)
        return error if mean_map is None else max(error, self._oracles[BIAS].check_map(mean_map))


class Backward(Forward):
    """The output and, through autograd, the gradients of query, key and value."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        super().__init__(case, device, num_sets)
        self._grad_out = torch.randn_like(self._like[0])

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        timed, note = super().timed_call(name, peer)

        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = timed.function(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, self._grad_out)

        return TimedCall(name, call), note

    def check(self, peer: Peer, result: Any) -> float:
        out, *grads = result
        oracle = self._oracles[peer.bias]
        return max(oracle.check_forward(out), oracle.check_gradients(grads, self._grad_out))


OPERATIONS: dict[str, Callable[[Case, str, int], Forward]] = {
    "forward": Forward,
    "map": Map,
    "backward": Backward,
    "call": Call,
}
