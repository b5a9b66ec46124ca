"""The peers without temporal attention regularization: lower bounds."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.peer import Attention, Inputs, Peer, reason
from benchmarks.peers.tar import NO_BIAS, kernels

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TRIALS = 3
# Of logits. The math backend holds all of them, several times, and is slow where they are many.
MOST_MATH_BYTES = 2**30


class Sdpa:
    """PyTorch's fused attention, by the backend that is the fastest for these inputs."""

    def __init__(self, inputs: Inputs) -> None:
        found: dict[str, float] = {}
        errors = []
        for name, backend in SDPA_BACKENDS.items():
            if name == "math" and found and _logits_bytes(inputs[0]) > MOST_MATH_BYTES:
                continue
            self._backend = backend
            try:
                found[name] = min(self._seconds(inputs) for _ in range(TRIALS))
            except RuntimeError as error:
                errors.append(f"{name}: {reason(error)}")
        if not found:
            raise RuntimeError("; ".join(errors))
        self.note = min(found, key=lambda name: found[name])
        self._backend = SDPA_BACKENDS[self.note]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(self._backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def _seconds(self, inputs: Inputs) -> float:
        start = time.perf_counter()
        self(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _logits_bytes(query: Tensor) -> int:
    batch, frames, heads, _ = query.shape
    return batch * heads * frames**2 * query.element_size()


def strength_0(inputs: Inputs) -> Attention:
    """This package's kernels without the bias: what TAR adds to them is the difference."""
    return kernels(inputs, NO_BIAS)


def xformers(inputs: Inputs) -> Attention:
    """xformers' attention, by the operator that it chooses."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def flash_attention(inputs: Inputs) -> Attention:
    """The flash-attn package's attention."""
    from flash_attn import flash_attn_func

    return flash_attn_func


def own_processor(bias: Any) -> None:
    """None: diffusers' own processor stays."""


STRENGTH_0 = Peer("strength-0", "vstar_kernels at strength 0", False, strength_0, own=True)
SDPA = Peer("sdpa", "SDPA without TAR", False, Sdpa, processor=own_processor)
XFORMERS = Peer("xformers", "xformers without TAR", False, xformers)
FLASH_ATTENTION = Peer("flash-attn", "FlashAttention without TAR", False, flash_attention)
