"""The operations: what a peer is made to do in a case, and how its result is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Oracle
from benchmarks.clock import Contestant, Tensors
from benchmarks.peers import Peer
from benchmarks.peers.peer import Attention
from benchmarks.peers.tar import BIAS, NO_BIAS
from benchmarks.unet import RegularizedUnet

CALLS = 500  # of a call that takes microseconds


class Operation:
    """A case's inputs, and one contestant of each peer that has this operation."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        self.case = case
        # One block of memory for all three: two of them are what a copy of equal traffic reads.
        self.blocks = [
            torch.randn(3, *case.shape, device=device).to(case.torch_dtype) for _ in range(num_sets)
        ]
        self.oracles = {tar: Oracle(self._first, BIAS if tar else NO_BIAS) for tar in (True, False)}

    @property
    def inputs(self) -> Sequence[Tensors]:
        """The arguments of the contestants' calls, set by set."""
        return [tuple(block.unbind()) for block in self.blocks]

    def offers(self, peer: Peer) -> bool:
        """Whether the peer has this operation at all."""
        return peer.build is not None

    def contestant(self, peer: Peer) -> tuple[Contestant, str]:
        """Ready to be timed, and what the peer has to say about itself."""
        attention = self._attention(peer)
        return Contestant(peer.name, attention), getattr(attention, "note", "")

    def check(self, peer: Peer, result: Any) -> float:
        """The error of a peer's result. Raises AssertionError if it is too large."""
        return self.oracles[peer.tar].check_forward(result)

    def _attention(self, peer: Peer) -> Attention:
        assert peer.build is not None
        return peer.build(self._first)

    @property
    def _first(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.blocks[0].unbind()
        return query, key, value


class Forward(Operation):
    """One call without gradients."""


class Call(Operation):
    """The same, so short that only many take a time worth measuring; with the CPU's part."""

    def contestant(self, peer: Peer) -> tuple[Contestant, str]:
        contestant, note = super().contestant(peer)
        return Contestant(peer.name, contestant.call, repeats=CALLS, whole=True), note


class Map(Operation):
    """One call that returns the mean map too."""

    def offers(self, peer: Peer) -> bool:
        return peer.build_with_map is not None

    def contestant(self, peer: Peer) -> tuple[Contestant, str]:
        assert peer.build_with_map is not None
        return Contestant(peer.name, peer.build_with_map(self._first)), ""

    def check(self, peer: Peer, result: Any) -> float:
        out, mean_map = result
        error = self.oracles[True].check_forward(out)
        return error if mean_map is None else max(error, self.oracles[True].check_map(mean_map))


class Backward(Operation):
    """The output and, through autograd, the gradients of query, key and value."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        super().__init__(case, device, num_sets)
        self.grad_out = torch.randn_like(self._first[0])

    def contestant(self, peer: Peer) -> tuple[Contestant, str]:
        attention = self._attention(peer)

        def both(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attention(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, self.grad_out)

        return Contestant(peer.name, both), getattr(attention, "note", "")

    def check(self, peer: Peer, result: Any) -> float:
        out, *grads = result
        oracle = self.oracles[peer.tar]
        return max(oracle.check_forward(out), oracle.check_gradients(grads, self.grad_out))


class Step:
    """One evaluation of a whole UNet, its temporal attention by the peers' processors."""

    def __init__(self, case: Case, device: str, width: int) -> None:
        self.case = case
        self._unet = RegularizedUnet(case, device, width)

    @property
    def inputs(self) -> Sequence[Tensors]:
        """The latents."""
        return [(self._unet.latents,)]

    def offers(self, peer: Peer) -> bool:
        """Whether diffusers' modules can be given this peer."""
        return peer.processor is not None

    def contestant(self, peer: Peer) -> tuple[Contestant, str]:
        """Ready to be timed; its processors are installed before each call."""
        assert peer.processor is not None
        processors = self._unet.processors(peer.processor)
        install = functools.partial(self._unet.install, processors)
        return Contestant(peer.name, self._unet, prepare=install), ""

    def check(self, peer: Peer, result: Any) -> float:
        """The result's distance from the reference's. Raises AssertionError if it is too large."""
        return self._unet.check(result, BIAS if peer.tar else NO_BIAS)


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "forward": Forward,
    "map": Map,
    "backward": Backward,
    "call": Call,
}
