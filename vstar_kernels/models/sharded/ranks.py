"""The processes that share a video, and the one thing that they do together: an exchange.

Everything that is said between processes is an exchange of bytes, in which each sends a part to
each: an all-to-all turns frames into positions, neighbours swap frames at their common edge, and
what all are to know goes to all. Hence what is counted, timed and diagnosed is in one place.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def shares(total: int, size: int) -> list[int]:
    """Returns how many of ``total`` each of ``size`` processes has: in order, the first ones more.

    >>> shares(7, 3)
    [3, 2, 2]
    """
    return [total // size + (rank < total % size) for rank in range(size)]


class RankFailure(RuntimeError):  # noqa: N818 - what has happened to ranks
    """Processes that share a video cannot go on, because one of them has died or does not come.

    Attributes:
        ranks: The ranks of those in the whole job; empty where it could not be found out.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Ranks:
    """Some processes, of which this is one; this class itself only counts what they would say.

    Args:
        rank: Which of them this is.
        size: How many there are.

    Attributes:
        sent: The bytes that this process has sent to others, by what for.
        exchanges: How many there have been, by what for.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()
        self.exchanges: Counter[str] = Counter()

    def exchange(
        self, purpose: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Sends a part to each process, and returns what each has sent to this one.

        Args:
            purpose: What for.
            parts: One for each process, all of the same type.
            shapes: Of what comes from each.
        """
        others = (part for rank, part in enumerate(parts) if rank != self.rank)
        self.sent[purpose] += sum(part.numel() * part.element_size() for part in others)
        self.exchanges[purpose] += 1
        counts = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([part.reshape(-1) for part in parts])
        came = flat.new_empty(sum(counts))
        self._move(purpose, came, flat, counts, [part.numel() for part in parts])
        return [
            piece.view(tuple(shape))
            for piece, shape in zip(came.split(counts), shapes, strict=True)
        ]

    def _move(
        self, purpose: str, came: Tensor, sent: Tensor, counts: list[int], sent_counts: list[int]
    ) -> None:
        """Fills ``came``; nothing, of tensors without numbers (meta)."""

    def close(self) -> None:
        """Ends what watches over the processes."""


def starts(counts: Sequence[int]) -> list[int]:
    """Returns where each process's share begins."""
    return list(itertools.accumulate(counts[:-1], initial=0))
