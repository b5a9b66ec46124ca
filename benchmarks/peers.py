"""Who is compared: adapters of a few lines each, all on ``(batch, frames, heads, head_dim)``.

Those with ``tar`` compute temporal attention regularization, with σ = 1. Those without are what
plain attention costs: lower bounds for whoever builds TAR on them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vstar_kernels as vk
from vstar_kernels import testing
from vstar_kernels.attention.bias import Bias
from vstar_kernels.cli.demo.denoise import EagerTARAttnProcessor
from vstar_kernels.models.attention_processor import TARAttnProcessor

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWithMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
SIGMA = 1.0
BIAS = vk.GaussianBias(SIGMA)
NO_BIAS = vk.GaussianBias(SIGMA, strength=0.0)
REASON_CHARACTERS = 600


@dataclass(frozen=True)
class Peer:
    """A way of computing attention.

    ``build`` gets query, key and value and returns the attention for inputs like them, whose
    ``note``, if it has one, is shown with the figures. ``trial`` replaces ``build`` where it would
    take long to find out whether the peer can run at all. ``logits_held`` says how many tensors of
    all logits are held at once. ``ours`` marks this package, asked for something else;
    ``on_request`` a peer that runs only where it is named.
    """

    title: str
    tar: bool
    build: Callable[[Inputs], Attention] | None
    build_with_map: Callable[[Inputs], AttentionWithMap] | None = None
    processor: Callable[[Bias], Any] | None = None  # of diffusers' attention modules
    trial: Callable[[Inputs], Attention] | None = None
    logits_held: int = 0
    ours: bool = False
    on_request: bool = False

    @property
    def bias(self) -> vk.GaussianBias:
        """Returns the bias that its results must have."""
        return BIAS if self.tar else NO_BIAS

    @functools.cache  # noqa: B019 (the peers live as long as the process)
    def unavailable(self, device: str, dtype: torch.dtype) -> str:
        """Returns why it cannot run on this device in this type; nothing if it can."""
        build = self.trial or self.build or self.build_with_map
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
    """Returns an exception in one line."""
    text = " ".join(str(error).split())
    if len(text) > REASON_CHARACTERS:
        text = text[:REASON_CHARACTERS] + " …"
    return f"{type(error).__name__}: {text}"


def kernels(inputs: Inputs, bias: vk.GaussianBias = BIAS) -> Attention:
    """Returns this package's kernels, as users call them."""
    backend = "triton" if inputs[0].is_cuda else "cpu"
    return functools.partial(vk.tar_attention, bias=bias, backend=backend)


def kernels_at_strength_0(inputs: Inputs) -> Attention:
    """Returns this package's kernels without the bias: what TAR adds to them is the difference."""
    return kernels(inputs, NO_BIAS)


def kernels_with_map(inputs: Inputs) -> AttentionWithMap:
    """Returns this package's kernels, returning the mean map too."""
    return functools.partial(kernels(inputs), return_map=True)


def kernels_without_map(inputs: Inputs) -> AttentionWithMap:
    """Returns the same without a map: what the map adds is the difference."""
    attention = kernels(inputs)
    return lambda query, key, value: (attention(query, key, value), None)


def reference(inputs: Inputs) -> Attention:
    """Returns this package's plain PyTorch backend."""
    return functools.partial(vk.tar_attention, bias=BIAS, backend="reference")


def delta_for(inputs: Inputs) -> Tensor:
    """Returns Δ in the inputs' type and where they are, ``(frames, frames)``."""
    return BIAS.matrix(inputs[0].shape[1]).to(inputs[0])


def eager(inputs: Inputs) -> Attention:
    """Returns the formula with every map held in memory, as VSTAR's users compute it."""
    return functools.partial(testing.eager, bias=vk.DenseBias(delta_for(inputs)))


def eager_with_map(inputs: Inputs) -> AttentionWithMap:
    """Returns the same with the mean of the maps."""
    return functools.partial(eager(inputs), return_map=True)


def eager_compiled(inputs: Inputs) -> Attention:
    """Returns the same formula under ``torch.compile``, compiled for the very size."""
    torch._dynamo.reset()
    return torch.compile(eager(inputs), dynamic=False)


def row_max_bias(query: Tensor, key: Tensor, delta: Tensor) -> Tensor:
    """Returns rowmax(φ) · Δ for attention that takes a bias, ``(batch, heads, frames, frames)``."""
    q, k = (x.transpose(1, 2) for x in (query, key))
    row_max = (q @ k.mT).amax(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
    return row_max * delta


def sdpa_with_bias(inputs: Inputs) -> Attention:
    """Returns a pass for the row maxima, then PyTorch's attention with the bias as its mask."""
    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = row_max_bias(query, key, delta)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return call


def xformers_with_bias(inputs: Inputs) -> Attention:
    """Returns the same with xformers' attention."""
    from xformers.ops import memory_efficient_attention

    delta = delta_for(inputs)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = row_max_bias(query, key, delta)
        return memory_efficient_attention(query, key, value, attn_bias=bias)

    return call


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


def flex(inputs: Inputs) -> Attention:
    """Returns both passes, compiled as one function."""
    torch._dynamo.reset()
    return torch.compile(flex_passes, dynamic=False)


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
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(SDPA_BACKENDS[self.note]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def _seconds(self, inputs: Inputs) -> float:
        start = time.perf_counter()
        self(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def xformers(inputs: Inputs) -> Attention:
    """Returns xformers' attention, by the operator that it chooses."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def flash_attention(inputs: Inputs) -> Attention:
    """Returns the flash-attn package's attention."""
    from flash_attn import flash_attn_func

    return flash_attn_func


def diffusers_processor(bias: Bias) -> None:
    """Returns None: diffusers' own processor stays."""


VSTAR_KERNELS, EAGER, SDPA = "vstar_kernels", "eager", "sdpa"
PEERS = {
    VSTAR_KERNELS: Peer(
        "vstar_kernels", True, kernels, kernels_with_map, TARAttnProcessor, ours=True
    ),
    EAGER: Peer("eager formula", True, eager, eager_with_map, EagerTARAttnProcessor, logits_held=4),
    "eager-compiled": Peer(
        "eager formula, compiled", True, eager_compiled, trial=eager, logits_held=4
    ),
    "sdpa-bias": Peer("SDPA with the bias", True, sdpa_with_bias, logits_held=3),
    "flex": Peer("FlexAttention, two passes", True, flex, trial=lambda _: flex_passes),
    "xformers-bias": Peer("xformers with the bias", True, xformers_with_bias, logits_held=3),
    "without-map": Peer(
        "vstar_kernels without the map", True, None, kernels_without_map, ours=True
    ),
    "reference": Peer(
        "vstar_kernels' reference", True, reference, logits_held=6, ours=True, on_request=True
    ),
    "strength-0": Peer("vstar_kernels at strength 0", False, kernels_at_strength_0, ours=True),
    SDPA: Peer("SDPA without TAR", False, Sdpa, processor=diffusers_processor),
    "xformers": Peer("xformers without TAR", False, xformers),
    "flash-attn": Peer("FlashAttention without TAR", False, flash_attention),
}
