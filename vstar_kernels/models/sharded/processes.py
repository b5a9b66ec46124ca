"""The processes of a process group that share a video.

It is imported when frames are first sharded: a build of PyTorch may have no ``torch.distributed``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vstar_kernels.models.sharded.liveness import Heartbeat
from vstar_kernels.models.sharded.ranks import Ranks


class ProcessRanks(Ranks):
    """The processes of a process group.

    Args:
        group: The process group.
        timeout: How many seconds an exchange may last (gloo); None leaves it to the process group.
    """

    def __init__(self, group: Any, timeout: float | None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        is_gloo = dist.get_backend(group) == "gloo"
        self._timeout = timedelta(seconds=timeout) if timeout is not None and is_gloo else None
        self._heartbeat = Heartbeat(dist.get_process_group_ranks(group), self.rank)

    def _move(
        self, purpose: str, came: Tensor, sent: Tensor, counts: list[int], sent_counts: list[int]
    ) -> None:
        size = sent.element_size()
        number = self._heartbeat.next_exchange()
        try:
            # As bytes, which every backend moves.
            work = dist.all_to_all_single(
                came.view(torch.uint8),
                sent.view(torch.uint8),
                [count * size for count in counts],
                [count * size for count in sent_counts],
                group=self._group,
                async_op=self._timeout is not None,
            )
            if self._timeout is not None:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise self._heartbeat.diagnose(purpose, number, error) from error

    def close(self) -> None:
        """Ends the heartbeat."""
        self._heartbeat.stop()
