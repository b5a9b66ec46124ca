"""Which frames of a forward pass this process has, for all that must know.

Handles see the call of a model as its caller made it, with all frames; what runs inside of the
model has this process's frames. Where a handle looks inside, it asks here.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vstar_kernels.models.forwards import ForwardPass, ForwardPasses
from vstar_kernels.models.sharded.moves import Spread, sum_alike
from vstar_kernels.models.sharded.ranks import Ranks, shares, starts


class SpreadPass(ForwardPass, Spread):
    """One forward pass of a model, of whose frames each process has some.

    Args:
        ranks: The processes.
        batch: How many videos there are.
        frames: N, of each.

    Attributes:
        positions: How many there are in all, by the block that has some of them.
        is_idle: Whether this process computes a position that is another's, as there is none for
            it in the block that runs, or has just run.
        first_image: The first frame of the image latents that all processes need (I2VGen-XL).
    """

    def __init__(self, ranks: Ranks, batch: int, frames: int) -> None:
        ForwardPass.__init__(self)
        Spread.__init__(self, ranks, frames)
        self.batch = batch
        self.positions: dict[str, int] = {}
        self.is_idle = False
        self.first_image: Tensor | None = None

    def is_like(self, other: object) -> bool:
        """Returns whether the frames of another pass are spread in the same way."""
        return (
            isinstance(other, SpreadPass)
            and other.ranks is self.ranks
            and (other.batch, other.frames) == (self.batch, self.frames)
        )

    def of_frames(self, rows: Tensor) -> Tensor:
        """Returns this process's rows of a tensor with a row for each frame of each video."""
        return rows.unflatten(0, (self.batch, self.frames))[
            :, self.first : self.first + self.count
        ].flatten(0, 1)

    def of_positions(self, rows: Tensor) -> Tensor:
        """Returns this process's rows of a tensor with one for each position of each video."""
        by_video = rows.unflatten(0, (self.batch, len(rows) // self.batch))
        counts = shares(by_video.shape[1], self.ranks.size)
        start, count = starts(counts)[self.ranks.rank], counts[self.ranks.rank]
        start, count = (start, count) if count else (0, 1)  # see to_positions
        return by_video.narrow(1, start, count).flatten(0, 1)

    def mean(self, mean: Tensor, positions: int) -> tuple[Tensor, int]:
        """Returns the mean over the positions of all processes, and how many they are."""
        positions = 0 if self.is_idle else positions
        count = torch.tensor([positions], dtype=mean.dtype, device=mean.device)
        total = int(sum_alike(count, self.ranks))
        return sum_alike(mean * (positions / max(total, 1)), self.ranks), total


_SPREAD: WeakKeyDictionary[nn.Module, ForwardPasses[SpreadPass]] = WeakKeyDictionary()


def keep_passes(model: nn.Module, passes: ForwardPasses[SpreadPass] | None) -> None:
    """Keeps where :func:`running_part` finds a model's forward passes; None: nowhere any more."""
    if passes is None:
        _SPREAD.pop(model, None)
    else:
        _SPREAD[model] = passes


def running_part(model: nn.Module) -> SpreadPass | None:
    """Returns the part of the forward pass that a model is in; None where it has all frames."""
    passes = _SPREAD.get(model)
    return None if passes is None else passes.current()
