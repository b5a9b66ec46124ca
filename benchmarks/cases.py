"""What is measured: one operation at one size, and the bytes and operations that it must take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

BYTES_OF_MAP_ELEMENT = 4  # maps are float32


@dataclass(frozen=True)
class Use:
    """Where a model makes a call: its level, its rows at full size, and how often in one step."""

    model: str
    level: str
    rows: int
    calls: int


@dataclass(frozen=True)
class Case:
    """An operation on query, key and value of ``(batch, frames, heads, head_dim)``.

    ``batch`` may be less than the rows of the models in ``uses``: time and bytes grow with it in
    proportion. ``latents`` is the height and width of a ``unet`` case's latents.
    """

    suite: str
    operation: str  # a key of OPERATIONS
    dtype: str
    batch: int
    frames: int
    heads: int
    head_dim: int
    threads: int | None = None  # None: as many as the run has
    latents: tuple[int, int] | None = None
    uses: tuple[Use, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """What this case is called in results, in progress bars and in comparisons."""
        size = "x".join(map(str, self.shape))
        threads = f"/{self.threads}-threads" if self.threads else ""
        latents = f"/latents-{self.latents[0]}x{self.latents[1]}" if self.latents else ""
        return f"{self.suite}/{self.dtype}/{size}{latents}{threads}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, frames, heads, head_dim)``."""
        return self.batch, self.frames, self.heads, self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of query, key and value."""
        return getattr(torch, self.dtype)

    @property
    def elements(self) -> int:
        """Of one tensor."""
        return self.batch * self.frames * self.heads * self.head_dim

    @property
    def bytes(self) -> int | None:
        """What must be read and written at least; None of a whole model."""
        tensors = OPERATIONS[self.operation].tensors
        if tensors is None:
            return None
        maps = self.batch * self.frames**2 if self.operation == "map" else 0
        return tensors * self.elements * self.torch_dtype.itemsize + maps * BYTES_OF_MAP_ELEMENT

    @property
    def flops(self) -> int | None:
        """Of the matrix products; None of a whole model."""
        products = OPERATIONS[self.operation].products
        return None if products is None else 2 * products * self.elements * self.frames

    @property
    def logits_bytes(self) -> int:
        """One tensor of all logits, which peers that materialise them hold several of."""
        return self.batch * self.heads * self.frames**2 * self.torch_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """The case that :meth:`to_json` described."""
        latents = data["latents"] and tuple(data["latents"])
        uses = tuple(Use(**use) for use in data["uses"])
        return cls(**{**data, "latents": latents, "uses": uses})


@dataclass(frozen=True)
class Operation:
    """How many tensors like the query an operation reads and writes, and its N×N×D products."""

    tensors: int | None
    products: int | None


OPERATIONS = {
    "forward": Operation(tensors=4, products=2),
    # Forward, then 3 inputs and grad_out read and 3 gradients written; QKᵀ is computed again.
    "backward": Operation(tensors=11, products=7),
    "map": Operation(tensors=4, products=2),
    "call": Operation(tensors=None, products=None),
    "step": Operation(tensors=None, products=None),
}
