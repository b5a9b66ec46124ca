"""Who is compared: adapters of a few lines each, all on ``(batch, frames, heads, head_dim)``.

Those with ``tar`` compute temporal attention regularization, with σ = 1. Those without are what
plain attention costs: lower bounds for whoever builds TAR on them.
"""

from __future__ import annotations

from benchmarks.peers.peer import Inputs, Peer
from benchmarks.peers.plain import FLASH_ATTENTION, SDPA, STRENGTH_0, XFORMERS
from benchmarks.peers.tar import (
    EAGER,
    EAGER_COMPILED,
    FLEX,
    REFERENCE,
    SDPA_BIAS,
    VSTAR_KERNELS,
    WITHOUT_MAP,
    XFORMERS_BIAS,
)

__all__ = ["EAGER", "PEERS", "SDPA", "VSTAR_KERNELS", "Inputs", "Peer", "by_name"]

PEERS = (
    VSTAR_KERNELS,
    EAGER,
    EAGER_COMPILED,
    SDPA_BIAS,
    FLEX,
    XFORMERS_BIAS,
    WITHOUT_MAP,
    REFERENCE,
    STRENGTH_0,
    SDPA,
    XFORMERS,
    FLASH_ATTENTION,
)


def by_name(name: str) -> Peer:
    """The peer called so."""
    return next(peer for peer in PEERS if peer.name == name)
