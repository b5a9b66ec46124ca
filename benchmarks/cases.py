"""What is measured: one operation at one size, and the bytes and operations that it must take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from pydantic import Field

BYTES_OF_MAP_ELEMENT = 4  # maps are float32


class Cost(NamedTuple):
    """How many tensors like the query an operation reads and writes, and its N×N×D products."""

    tensors: int
    products: int


# A whole model and a call whose time is Python's are not held against a floor.
COSTS = {
    "forward": Cost(tensors=4, products=2),
    "map": Cost(tensors=4, products=2),
    # Forward, then 3 inputs and grad_out read and 3 gradients written; QKᵀ is computed again.
    "backward": Cost(tensors=11, products=7),
    "call": None,
    "step": None,
    "block": None,
    "model": None,
    "frames": Cost(tensors=4, products=2),
    # A query read and an output written; for the gradient of the query, three more products.
    "cross": Cost(tensors=2, products=2),
    "cross-backward": Cost(tensors=5, products=5),
}


@dataclass(frozen=True)
class Use:
    """Where a model makes a call: its level, its batch at full size, and its calls in one step.

    ``measured`` is the share of the call's operations that the case has, where its shape was
    scaled down in more than the batch.
    """

    model: str
    level: str
    full_batch: Annotated[int, Field(alias="rows")]  # as workloads.json and the results call it
    calls: int
    measured: float = 1.0


@dataclass(frozen=True)
class Case:
    """An operation on query, key and value of ``(batch, frames, heads, head_dim)``.

    ``batch`` may be less than the models in ``uses`` have: time and bytes grow with it in
    proportion. ``latents`` is the height and width of a ``unet`` case's latents. In the ``frames``
    suite, what attends to each other are tokens: ``frames`` counts all of them, and ``layout``
    says how many are text, frames, tokens of each frame, and text after them. ``rule`` is one of
    its rules, which shows the share ``visible`` of all pairs. So it is in ``dit-model``, whose
    ``uses`` name the model. In the ``cross`` suites ``frames`` counts the queries, which attend
    to ``keys`` of a text, of which ``columns`` words have maps.
    """

    suite: str
    operation: str  # a key of COSTS
    dtype: str
    batch: int
    frames: int
    heads: int
    head_dim: int
    threads: int | None = None  # None: as many as the run has
    latents: tuple[int, int] | None = None
    layout: tuple[int, int, int, int] | None = None
    rule: str = ""
    keys: int | None = None  # None: as many as frames
    columns: int = 0
    visible: float = field(default=1.0, compare=False)
    uses: tuple[Use, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """Returns this case's name in results, in progress bars and in comparisons."""
        size = "x".join(map(str, self.shape))
        threads = f"/{self.threads}-threads" if self.threads else ""
        latents = f"/latents-{self.latents[0]}x{self.latents[1]}" if self.latents else ""
        layout = f"/layout-{'-'.join(map(str, self.layout))}/{self.rule}" if self.layout else ""
        text = f"/keys-{self.keys}-columns-{self.columns}" if self.keys else ""
        return f"{self.suite}/{self.dtype}/{size}{text}{latents}{layout}{threads}"

    @property
    def size(self) -> str:
        """Returns the shape, and what else tells the case apart in its suite."""
        text = " × ".join(map(str, self.shape))
        if self.keys:
            return f"{text}, {self.keys} keys, {self.columns} columns"
        if self.layout:
            before, frames, tokens, after = self.layout
            words = f" + {before + after} of text" if before + after else ""
            return f"{text}: {frames} frames of {tokens}{words}, {self.rule}"
        if self.latents:
            return f"{text}, latents {self.latents[0]} × {self.latents[1]}"
        plural = "s" if self.threads and self.threads > 1 else ""
        return f"{text}, {self.threads} thread{plural}" if self.threads else text

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Returns ``(batch, frames, heads, head_dim)``."""
        return self.batch, self.frames, self.heads, self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        """Returns the type of query, key and value."""
        return getattr(torch, self.dtype)

    @property
    def elements(self) -> int:
        """Returns the number of elements of one tensor."""
        return self.batch * self.frames * self.heads * self.head_dim

    @property
    def bytes(self) -> int | None:
        """Returns what must be read and written at least; None where no floor applies."""
        if (cost := COSTS[self.operation]) is None:
            return None
        tensors = cost.tensors * self.elements * self.torch_dtype.itemsize
        maps = self.batch * self.frames**2 if self.operation == "map" else 0
        if self.keys:
            passes = 2 if self.operation == "cross-backward" else 1
            text = 2 * self.batch * self.keys * self.heads * self.head_dim
            tensors += passes * text * self.torch_dtype.itemsize
            maps = passes * self.batch * self.frames * self.columns
        return tensors + maps * BYTES_OF_MAP_ELEMENT

    @property
    def flops(self) -> int | None:
        """Returns the operations of the matrix products; None where no floor applies."""
        cost = COSTS[self.operation]
        if cost is None:
            return None
        keys = self.keys or self.frames
        return round(2 * cost.products * self.elements * keys * self.visible)

    @property
    def logits_bytes(self) -> int:
        """Returns the size of all logits, of which some peers hold several tensors."""
        pairs = self.frames * (self.keys or self.frames)
        return self.batch * self.heads * pairs * self.torch_dtype.itemsize
