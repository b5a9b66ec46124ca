"""Who is compared: adapters of a few lines each, all on ``(batch, frames, heads, head_dim)``.

Those with ``tar`` compute temporal attention regularization, with σ = 1. Those without are what
plain attention costs: lower bounds for whoever builds TAR on them.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
AttentionWithMap = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
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

    @cache  # noqa: B019 (the peers live as long as the process)
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


VSTAR_KERNELS, EAGER, SDPA = "vstar_kernels", "eager", "sdpa"
PEERS = {
    VSTAR_KERNELS: Peer(
        "vstar_kernels",
        True,
        kernels,
        partial(kernels, return_map=True),
        TARAttnProcessor,
        ours=True,
    ),
    EAGER: Peer(
        "eager formula",
        True,
        eager,
        partial(eager, return_map=True),
        EagerTARAttnProcessor,
        logits_held=4,
    ),
    "eager-compiled": Peer(
        "eager formula, compiled", True, lambda x: compiled(eager(x)), trial=eager, logits_held=4
    ),
    "sdpa-bias": Peer("SDPA with the bias", True, partial(with_bias, sdpa), logits_held=3),
    "flex": Peer(
        "FlexAttention, two passes",
        True,
        lambda _: compiled(flex_passes),
        trial=lambda _: flex_passes,
    ),
    "xformers-bias": Peer(
        "xformers with the bias", True, lambda x: with_bias(xformers(x), x), logits_held=3
    ),
    # What the map adds to the kernels is the difference.
    "without-map": Peer("vstar_kernels without the map", True, None, kernels, ours=True),
    "reference": Peer(
        "vstar_kernels' reference",
        True,
        partial(kernels, backend="reference"),
        logits_held=6,
        ours=True,
        on_request=True,
    ),
    # What TAR adds to the kernels is the difference.
    "strength-0": Peer(
        "vstar_kernels at strength 0", False, partial(kernels, bias=NO_BIAS), ours=True
    ),
    # diffusers' own processor stays.
    SDPA: Peer("SDPA without TAR", False, Sdpa, processor=lambda _: None),
    "xformers": Peer("xformers without TAR", False, xformers),
    "flash-attn": Peer("FlashAttention without TAR", False, flash_attention),
}
