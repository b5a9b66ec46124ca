"""How many pairs of a query and a key a call's tables keep: what its time should follow."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_kernels.attention.frames.call import FrameCall
from vstar_kernels.attention.frames.layout import TEXT


def kept_pairs(call: FrameCall) -> int:
    """Returns the pairs of a query and a key of one sequence that are visible, over all heads.

    Those that ``key_lengths`` hides count as well, as it stands on the device; where the tables
    have no numbers, as in a trace, everything does.
    """
    tables = (call.query_runs, call.key_runs, call.offset, call.band)
    if any(type(x) is not Tensor or x.is_meta for x in tables if x is not None):
        return call.heads * call.tokens * call.keys
    queries, keys = (
        _frame_tokens(runs, frames)
        for runs, frames in ((call.query_runs, call.frames), (call.key_runs, call.key_frames))
    )
    pairs = queries[:, None] * keys  # (F_q, F_k)
    if call.band is not None:
        low, high = call.band.long()
        pairs = _pairs_up_to(high, queries, keys) - _pairs_up_to(low - 1, queries, keys)
    if call.offset is not None:
        pairs = pairs * (call.offset > float("-inf"))  # ([heads,] F_q, F_k)
    of_frames = int(pairs.sum()) * (1 if pairs.ndim == 3 else call.heads)
    video, key_video = int(queries.sum()), int(keys.sum())
    with_text = call.tokens * call.keys - video * key_video
    return of_frames + call.heads * with_text


def _frame_tokens(runs: Tensor, frames: int) -> Tensor:
    """Returns the tokens of each frame, ``(frames,)``."""
    video = runs[runs[:, 2] != TEXT].long()
    found = torch.zeros(frames, dtype=torch.int64, device="cpu")
    return found.index_add_(0, video[:, 2], video[:, 1] - video[:, 0])


def _pairs_up_to(most: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns for how many places pᵢ < ``queries`` and pⱼ < ``keys`` of frames pⱼ − pᵢ ≤ ``most``.

    That is the sum over pᵢ of pᵢ + most + 1, clamped to 0 … keys. All are ``(F_q, F_k)``.
    """
    queries = queries[:, None]
    most = torch.minimum(torch.maximum(most, -queries), keys)  # beyond, nothing changes

    def sum_to(n: Tensor) -> Tensor:
        """Returns the sum of the numbers 0 … n, each at most ``keys``; 0 where n is below 0."""
        n = n.clamp(min=0)
        below = torch.minimum(n, keys.expand_as(n))
        return below * (below + 1) // 2 + (n - below) * keys

    return sum_to(queries + most) - sum_to(most)
