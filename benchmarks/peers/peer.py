"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.bias import Bias

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWithMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
REASON_CHARACTERS = 600


@dataclass(frozen=True)
class Peer:
    """A way of computing attention.

    ``build`` gets query, key and value and returns the attention for inputs like them; what it has
    to tell is that function's ``note``. ``trial`` replaces ``build`` where it would take long to
    find out whether the peer can run at all. ``logits`` is how many tensors of all logits are held
    at once. An ``own`` peer is this package's too, asked for something else. An ``extra`` one runs
    only where it is asked for by name.
    """

    name: str
    title: str
    tar: bool
    build: Callable[[Inputs], Attention] | None
    build_with_map: Callable[[Inputs], AttentionWithMap] | None = None
    processor: Callable[[Bias], Any] | None = None  # of diffusers' attention modules
    trial: Callable[[Inputs], Attention] | None = None
    logits: int = 0
    own: bool = False
    extra: bool = False

    def unavailable(self, device: str, dtype: torch.dtype) -> str:
        """Why it cannot run on this device in this type; empty if it can."""
        return _unavailable(self, device, dtype)


@cache
def _unavailable(peer: Peer, device: str, dtype: torch.dtype) -> str:
    build = peer.trial or peer.build or peer.build_with_map
    assert build is not None
    query, key, value = torch.randn(3, 2, 16, 2, 64, device=device).to(dtype).unbind()
    try:
        build((query, key, value))(query, key, value)
        if device == "cuda":
            torch.cuda.synchronize()
    # Whatever a peer raises is its own reason.
    except Exception as error:
        return reason(error)
    return ""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    if len(text) > REASON_CHARACTERS:
        text = text[:REASON_CHARACTERS] + " …"
    return f"{type(error).__name__}: {text}"
