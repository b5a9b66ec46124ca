"""What is moved between processes, with its gradient; each is linear, and so is its adjoint.

Where processes compute the same from the whole (the loss of the whole video), a gradient is that of
the whole already; where each computes something else from what all know (text, statistics), the
gradients of all are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.models.sharded.ranks import Ranks, shares, starts

_Map = Callable[[Tensor], Tensor]


class Spread:
    """How the frames of a video are spread over processes.

    Args:
        ranks: The processes.
        frames: N, of the whole video.

    Attributes:
        counts: How many frames each process has.
        first, count: The first frame of this process, and how many it has.
    """

    def __init__(self, ranks: Ranks, frames: int) -> None:
        self.ranks, self.frames = ranks, frames
        self.counts = shares(frames, ranks.size)
        self.first = starts(self.counts)[ranks.rank]
        self.count = self.counts[ranks.rank]


def to_positions(x: Tensor, spread: Spread) -> Tensor:
    """Turns all positions of some frames into some positions of all frames.

    Where there are fewer positions than processes, those that are left over compute the first one
    once more, as no attention takes none; nobody is given their results.

    Args:
        x: ``(batch, positions, frames here, channels)``.
        spread: How the frames are spread.

    Returns:
        ``(batch, positions here, frames, channels)``.
    """
    back = functools.partial(_to_frames, spread, x.shape[1])
    return _linear(x, functools.partial(_to_positions, spread, idle_too=True), back)


def to_frames(x: Tensor, positions: int, spread: Spread) -> Tensor:
    """Undoes :func:`to_positions`; ``positions`` is how many there are in all."""
    forward = functools.partial(_to_frames, spread, positions)
    return _linear(x, forward, functools.partial(_to_positions, spread, idle_too=False))


def _to_positions(spread: Spread, x: Tensor, *, idle_too: bool) -> Tensor:
    batch, positions, _, channels = x.shape
    here = shares(positions, spread.ranks.size)
    parts = [part if part.shape[1] or not idle_too else x[:, :1] for part in x.split(here, 1)]
    count = parts[spread.ranks.rank].shape[1]
    shapes = [(batch, count, frames, channels) for frames in spread.counts]
    came = torch.cat(spread.ranks.exchange("all-to-all", parts, shapes), 2)
    return came if count else came.new_zeros(batch, 1, spread.frames, channels)


def _to_frames(spread: Spread, positions: int, x: Tensor) -> Tensor:
    batch, _, _, channels = x.shape
    here = shares(positions, spread.ranks.size)
    shapes = [(batch, count, spread.count, channels) for count in here]
    own = x[:, : here[spread.ranks.rank]]
    return torch.cat(spread.ranks.exchange("all-to-all", own.split(spread.counts, 2), shapes), 1)


def take_frames(x: Tensor, dim: int, spread: Spread) -> Tensor:
    """Returns this process's frames of a tensor that all have."""
    gather = functools.partial(_gather_frames, spread, dim)
    return _linear(x, functools.partial(_take_frames, spread, dim), gather)


def gather_frames(x: Tensor, dim: int, spread: Spread) -> Tensor:
    """Returns the frames of all processes."""
    take = functools.partial(_take_frames, spread, dim)
    return _linear(x, functools.partial(_gather_frames, spread, dim), take)


def _take_frames(spread: Spread, dim: int, x: Tensor) -> Tensor:
    return x.narrow(dim, spread.first, spread.count)


def _gather_frames(spread: Spread, dim: int, x: Tensor) -> Tensor:
    shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in spread.counts]
    return torch.cat(spread.ranks.exchange("gather", [x] * spread.ranks.size, shapes), dim)


def share(x: Tensor, spread: Spread) -> Tensor:
    """Returns a tensor that all processes have; its gradient is the sum of theirs."""
    return _linear(x, lambda same: same.view_as(same), functools.partial(_sum, spread.ranks))


def sum_alike(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns the sum over processes, of which all compute the same then."""
    return _linear(x, functools.partial(_sum, ranks), lambda gradient: gradient)


def stack_all(x: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """Returns the tensors of all processes, ``(ranks, …)``."""

    def own(gradient: Tensor) -> Tensor:
        return _sum(ranks, gradient)[ranks.rank]

    return _linear(x, functools.partial(_stack, ranks, purpose), own)


def _stack(ranks: Ranks, purpose: str, x: Tensor) -> Tensor:
    return torch.stack(ranks.exchange(purpose, [x] * ranks.size, [x.shape] * ranks.size))


def _sum(ranks: Ranks, x: Tensor) -> Tensor:
    # In the order of the ranks, so that all of them have the same bits.
    return _stack(ranks, "sum", x).sum(0)


def with_neighbours(x: Tensor, halo: int, spread: Spread) -> Tensor:
    """Returns frames with those before and after them, which other processes have.

    Args:
        x: ``(batch, channels, frames here, …)``.
        halo: How many on each side; zeros stand for those before the first and after the last.
        spread: How the frames are spread; each process has at least ``halo``.
    """
    widen = functools.partial(_with_neighbours, spread, halo)
    return _linear(x, widen, functools.partial(_from_neighbours, spread, halo))


def _swap(spread: Spread, before: Tensor, after: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gives tensors of equal shape to the neighbours, and returns theirs where there are any."""
    rank, size = spread.ranks.rank, spread.ranks.size
    nothing = before.new_empty(0)
    parts, shapes = [nothing] * size, [nothing.shape] * size
    if rank > 0:
        parts[rank - 1], shapes[rank - 1] = before, before.shape
    if rank < size - 1:
        parts[rank + 1], shapes[rank + 1] = after, after.shape
    came = spread.ranks.exchange("halo", parts, shapes)
    return came[rank - 1] if rank > 0 else None, came[rank + 1] if rank < size - 1 else None


def _with_neighbours(spread: Spread, halo: int, x: Tensor) -> Tensor:
    before, after = x.narrow(2, 0, halo), x.narrow(2, x.shape[2] - halo, halo)
    came = _swap(spread, before, after)
    zeros = x.new_zeros(before.shape)
    first, last = (zeros if frames is None else frames for frames in came)
    return torch.cat([first, x, last], 2)


def _from_neighbours(spread: Spread, halo: int, gradient: Tensor) -> Tensor:
    length = gradient.shape[2] - 2 * halo
    before, after = gradient.narrow(2, 0, halo), gradient.narrow(2, length + halo, halo)
    first, last = _swap(spread, before, after)
    own = gradient.narrow(2, halo, length).clone()
    if first is not None:
        own.narrow(2, 0, halo).add_(first)
    if last is not None:
        own.narrow(2, length - halo, halo).add_(last)
    return own


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, adjoint: Any) -> Tensor:
        ctx.adjoint = adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(gradient), None, None


def _linear(x: Tensor, forward: _Map, adjoint: _Map) -> Tensor:
    """Returns ``forward(x)``, a linear function, with ``adjoint`` for its gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, forward, adjoint)
    return forward(x)
