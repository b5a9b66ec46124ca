"""The peers that compute temporal attention regularization."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import vstar_kernels as vk
from benchmarks.peers.peer import Attention, AttentionWithMap, Inputs, Peer
from vstar_kernels.cli.demo.eager import EagerTARAttnProcessor
from vstar_kernels.models.attention_processor import TARAttnProcessor

SIGMA = 1.0
BIAS = vk.GaussianBias(SIGMA)
NO_BIAS = vk.GaussianBias(SIGMA, strength=0.0)


def own_backend(device: torch.device) -> str:
    """The package's kernels for a device."""
    return "triton" if device.type == "cuda" else "cpu"


def kernels(inputs: Inputs, bias: vk.GaussianBias = BIAS) -> Attention:
    """This package's kernels, as users call them."""
    return functools.partial(vk.tar_attention, bias=bias, backend=own_backend(inputs[0].device))


def reference(inputs: Inputs) -> Attention:
    """This package's plain PyTorch backend."""
    return functools.partial(vk.tar_attention, bias=BIAS, backend="reference")


def kernels_with_map(inputs: Inputs) -> AttentionWithMap:
    """The same, returning the mean map."""
    return functools.partial(kernels(inputs), return_map=True)


def kernels_without_map(inputs: Inputs) -> AttentionWithMap:
    """The same without it: what it adds is the difference."""
    attention = kernels(inputs)
    return lambda query, key, value: (attention(query, key, value), None)


def delta_for(inputs: Inputs) -> Tensor:
    """Δ, ``(frames, frames)``, in the inputs' type and where they are."""
    return BIAS.matrix(inputs[0].shape[1]).to(inputs[0])


def eager_weights(query: Tensor, key: Tensor, delta: Tensor) -> Tensor:
    """A′ as VSTAR users compute it: one operation after the other, in the inputs' type."""
    q, k = (x.transpose(1, 2) for x in (query, key))
    logits = (q @ k.mT) * query.shape[-1] ** -0.5
    logits = logits + logits.amax(dim=-1, keepdim=True) * delta
    return logits.softmax(dim=-1)


def eager(inputs: Inputs) -> Attention:
    """The formula with every map held in memory."""
    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (eager_weights(query, key, delta) @ value.transpose(1, 2)).transpose(1, 2)

    return call


def eager_with_map(inputs: Inputs) -> AttentionWithMap:
    """The same, with the mean of the maps over the heads."""
    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = eager_weights(query, key, delta)
        out = (weights @ value.transpose(1, 2)).transpose(1, 2)
        return out, weights.mean(1, dtype=torch.float32)

    return call


def eager_compiled(inputs: Inputs) -> Attention:
    """The same formula under ``torch.compile``, compiled for the very size."""
    torch._dynamo.reset()
    return torch.compile(eager(inputs), dynamic=False)


def row_max_bias(query: Tensor, key: Tensor, delta: Tensor) -> Tensor:
    """rowmax(φ) · Δ, ``(batch, heads, frames, frames)``, which attention with a bias is given."""
    q, k = (x.transpose(1, 2) for x in (query, key))
    row_max = (q @ k.mT).amax(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
    return row_max * delta


def sdpa_with_bias(inputs: Inputs) -> Attention:
    """A pass for the row maxima, then PyTorch's fused attention with the bias as its mask."""
    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = row_max_bias(query, key, delta)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return call


def xformers_with_bias(inputs: Inputs) -> Attention:
    """The same with xformers' attention."""
    from xformers.ops import memory_efficient_attention

    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = row_max_bias(query, key, delta)
        return memory_efficient_attention(query, key, value, attn_bias=bias)

    return call


def flex_passes(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention twice: for the row maxima, which come after the pass, then with the bias."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    _, found = flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True))
    row_max = found.max_scores
    assert row_max is not None

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x = (j - i).to(torch.float32)
        return score + row_max[b, h, i] * torch.exp(x * x * (-0.5 / SIGMA**2))

    return flex_attention(q, k, v, score_mod=biased).transpose(1, 2)


def flex(inputs: Inputs) -> Attention:
    """Both passes, compiled as one function."""
    torch._dynamo.reset()
    return torch.compile(flex_passes, dynamic=False)


VSTAR_KERNELS = Peer(
    "vstar_kernels",
    "vstar_kernels",
    True,
    kernels,
    build_with_map=kernels_with_map,
    processor=TARAttnProcessor,
    own=True,
)
REFERENCE = Peer(
    "reference", "vstar_kernels' reference", True, reference, logits=6, own=True, extra=True
)
WITHOUT_MAP = Peer(
    "without-map",
    "vstar_kernels without the map",
    True,
    None,
    build_with_map=kernels_without_map,
    own=True,
)
EAGER = Peer(
    "eager",
    "eager formula",
    True,
    eager,
    build_with_map=eager_with_map,
    processor=EagerTARAttnProcessor,
    logits=4,
)
EAGER_COMPILED = Peer(
    "eager-compiled", "eager formula, compiled", True, eager_compiled, trial=eager, logits=4
)
SDPA_BIAS = Peer("sdpa-bias", "SDPA with the bias", True, sdpa_with_bias, logits=3)
FLEX = Peer("flex", "FlexAttention, two passes", True, flex, trial=lambda _: flex_passes)
XFORMERS_BIAS = Peer("xformers-bias", "xformers with the bias", True, xformers_with_bias, logits=3)
