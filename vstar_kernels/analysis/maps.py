"""Mean attention maps: of queries and keys, and as records of where and when they were."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vstar_kernels.attention import reference
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import Problem
from vstar_kernels.attention.dispatch import BACKENDS
from vstar_kernels.attention.temporal import tar_attention

Level = int | Literal["init"]
Place = Literal["down", "mid", "up", "init", "blocks"]

MAP_ELEMENTS = 2**24  # of the attention maps that the reference holds at a time: 64 MiB


@dataclass
class AttentionMap:
    """The mean attention map A′ of one layer at one step.

    Attributes:
        model: The model's name in its pipeline; empty for a model by itself.
        layer, level, place: The layer's name and where it is, as of :class:`TemporalLayer`.
        step: The index of the denoising step; None where it is not known.
        timestep: What the model was given.
        map: ``(batch, frames, frames)``, float32, on the CPU unless the capture is differentiable:
            the mean over heads and positions. A row is a query's frame and adds up to 1. Under
            classifier-free guidance the batch's first half is the unconditional one.
        positions: Of how many positions (of height × width) the mean is.
        calls: Of how many forward passes it is: FreeInit, for one, repeats its steps.
    """

    model: str
    layer: str
    level: Level
    place: Place
    step: int | None
    timestep: float
    map: Tensor
    positions: int
    calls: int = 1

    def add(self, other: Tensor) -> None:
        """Take the map of one more forward pass into the mean.

        Raises:
            ValueError: It is of another size.
        """
        if other.shape != self.map.shape:
            raise ValueError(
                f"the map of {self.layer} has been {tuple(self.map.shape)} (batch, frames, frames) "
                f"and is now {tuple(other.shape)}: clear() the capture between videos of other "
                "sizes"
            )
        self.calls += 1
        self.map = self.map + (other - self.map) / self.calls


def mean_map(
    query: Tensor, key: Tensor, bias: Bias | None, scale: float, *, max_rows: int
) -> tuple[Tensor, int]:
    """A′ averaged over positions and heads, ``(batch, frames, frames)``, and of how many positions.

    All of them where a kernel gives maps; else some at equal distances, by the reference.

    Args:
        query, key: ``(batch, positions, frames, heads, head_dim)``.
        bias, scale: As for :func:`vstar_kernels.tar_attention`.
        max_rows: How many rows (batch × positions) the reference takes at most, but at least one
            position of each batch element.
    """
    batch, positions, frames, heads, _ = query.shape
    if _has_kernel(query, key, bias, scale):
        _, weights = tar_attention(query, key, key, bias, scale=scale, return_map=True)
        return weights, positions
    count = min(positions, max(1, max_rows // batch))
    chosen = (2 * torch.arange(count) + 1) * positions // (2 * count)
    total = query.new_zeros(batch, frames, frames, dtype=torch.float32)
    for part in chosen.split(max(1, MAP_ELEMENTS // (batch * heads * frames**2))):
        index = part.to(query.device)
        q, k = query[:, index], key[:, index]
        _, weights = tar_attention(
            q, k, k, _at(bias, index), scale=scale, return_map=True, backend="reference"
        )
        total += weights * (len(part) / count)
    return total, count


def _at(bias: Bias | None, index: Tensor) -> Bias | None:
    """The bias for some positions only."""
    if bias is None or not isinstance(bias.stat, Tensor):
        return bias
    return replace(bias, stat=bias.stat[:, index])


def _has_kernel(query: Tensor, key: Tensor, bias: Bias | None, scale: float) -> bool:
    """Whether a backend that is not the reference gives the map."""
    if bias is not None and bias.strength == 0:
        bias = None
    tensors = {"query": query, "key": key, "value": key}
    if bias is not None:
        tensors |= bias.named_tensors()
    shape = tuple(query.shape)
    problem = Problem(shape, query.dtype, query.device, tensors, bias, scale, return_map=True)
    kernels = (backend for backend in BACKENDS.values() if backend is not reference)
    return any(not kernel.why_not(problem) for kernel in kernels)
