"""How a peer is called: adapters of a few lines each, on ``(batch, frames, heads, head_dim)``."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vstar_kernels as vk
from vstar_kernels import testing

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWithMap = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
SIGMA = 1.0
BIAS = vk.GaussianBias(SIGMA)
NO_BIAS = vk.GaussianBias(SIGMA, strength=0.0)
REASON_CHARACTERS = 600


def reason(error: BaseException) -> str:
    """Returns an exception in one line."""
    text = textwrap.shorten(str(error), REASON_CHARACTERS, placeholder=" …")
    return f"{type(error).__name__}: {text}"


def kernels(inputs: Inputs, **options: Any) -> Attention:
    """Returns this package's kernels, as users call them but for ``options``."""
    backend = "triton" if inputs[0].is_cuda else "cpu"
    return partial(vk.tar_attention, **({"bias": BIAS, "backend": backend} | options))


def delta_for(inputs: Inputs) -> Tensor:
    """Returns Δ in the inputs' type and where they are, ``(frames, frames)``."""
    return BIAS.matrix(inputs[0].shape[1]).to(inputs[0])


def eager(inputs: Inputs, **options: Any) -> Attention:
    """Returns the formula with every map held in memory, as VSTAR's users compute it."""
    return partial(testing.eager, bias=vk.DenseBias(delta_for(inputs)), **options)


def compiled(function: Attention) -> Attention:
    """Returns a function under ``torch.compile``, compiled for the very size."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns PyTorch's fused attention."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def xformers(inputs: Inputs) -> Callable[..., Tensor]:
    """Returns xformers' attention, by the operator that it chooses."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def flash_attention(inputs: Inputs) -> Attention:
    """Returns the flash-attn package's attention."""
    from flash_attn import flash_attn_func

    return flash_attn_func


def with_bias(attend: Callable[..., Tensor], inputs: Inputs) -> Attention:
    """Returns a pass for the row maxima, then ``attend`` with the bias as its mask."""
    delta = delta_for(inputs)
    return lambda query, key, value: attend(query, key, value, row_max_bias(query, key, delta))


def row_max_bias(query: Tensor, key: Tensor, delta: Tensor) -> Tensor:
    """Returns rowmax(φ) · Δ for attention that takes a bias, ``(batch, heads, frames, frames)``."""
    q, k = (x.transpose(1, 2) for x in (query, key))
    row_max = (q @ k.mT).amax(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
    return row_max * delta


def flex_passes(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Runs FlexAttention twice: for the row maxima, known after the pass, then with the bias."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    _, found = flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True))
    row_max = found.max_scores

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x = (j - i).to(torch.float32)
        return score + row_max[b, h, i] * torch.exp(x * x * (-0.5 / SIGMA**2))

    return flex_attention(q, k, v, score_mod=biased).transpose(1, 2)


SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
SDPA_TRIALS = 3
# Of logits. The math backend holds all of them, several times, and is slow where they are many.
MOST_MATH_BYTES = 2**30


class Sdpa:
    """PyTorch's fused attention, by the backend that is the fastest for these inputs."""

    def __init__(self, inputs: Inputs) -> None:
        batch, frames, heads, _ = inputs[0].shape
        logits_bytes = batch * heads * frames**2 * inputs[0].element_size()
        found: dict[str, float] = {}
        errors = []
        for name in SDPA_BACKENDS:
            if name == "math" and found and logits_bytes > MOST_MATH_BYTES:
                continue
            self.note = name
            try:
                found[name] = min(self._seconds(inputs) for _ in range(SDPA_TRIALS))
            except RuntimeError as error:
                errors.append(f"{name}: {reason(error)}")
        if not found:
            raise RuntimeError("; ".join(errors))
        self.note = min(found, key=lambda name: found[name])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPA_BACKENDS[self.note]):
            return sdpa(query, key, value)

    def _seconds(self, inputs: Inputs) -> float:
        start = time.perf_counter()
        self(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
