"""Who is compared: the kernels, the official formula, FlexAttention, SDPA without TAR, a copy.

All take query, key and value as ``(batch, frames, heads, head_dim)``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vstar_kernels as vk
from benchmarks.cpu import eager_tar
from benchmarks.gpu.timing import Call

SIGMA = 1.0
EAGER_BYTES = 16 * 2**30  # of its logits; above, it is not tried
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def ours(strength: float = 1.0) -> Call:
    """The Triton kernels."""
    bias = vk.GaussianBias(SIGMA, strength=strength)
    return functools.partial(vk.tar_attention, bias=bias, backend="triton")


def eager(query: Tensor) -> Call:
    """The official code's formula, in the inputs' type."""
    delta = vk.GaussianBias(SIGMA).matrix(query.shape[1]).to(query)
    return lambda q, k, v: eager_tar(q, k, v, delta)


def flex() -> Call:
    """TAR in two passes, compiled as one: one for the row maxima, one with the bias."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def two_passes(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        _, found = flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True))
        row_max = found.max_scores
        assert row_max is not None

        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            x = (j - i).to(torch.float32)
            return score + row_max[b, h, i] * torch.exp(x * x * (-0.5 / SIGMA**2))

        return flex_attention(q, k, v, score_mod=biased).transpose(1, 2)

    return torch.compile(two_passes, dynamic=False)


def sdpa(backend: SDPBackend) -> Call:
    """PyTorch's fused attention, without TAR."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return call


def copy(query: Tensor) -> Call:
    """A copy that reads and writes as many bytes as a call reads and writes."""
    source, target = (query.new_empty(2 * query.numel()).zero_() for _ in range(2))
    return lambda *_: target.copy_(source)


def everyone(query: Tensor, with_flex: bool) -> dict[str, Call]:
    """All contestants that can be expected to finish."""
    batch, frames, heads, _ = query.shape
    found = {
        "vstar_kernels": ours(),
        "strength 0": ours(strength=0.0),
        "copy": copy(query),
        **{name: sdpa(backend) for name, backend in SDPA.items()},
    }
    if batch * heads * frames**2 * query.element_size() <= EAGER_BYTES:
        found["eager"] = eager(query)
    else:
        del found["sdpa math"]
    if with_flex:
        found["flex"] = flex()
    return found
