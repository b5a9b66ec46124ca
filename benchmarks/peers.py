"""Who is compared: a table of peers.

Those with ``tar`` compute what this package computes, temporal attention regularization with σ = 1
or a rule between frames. Those without are what plain attention costs: lower bounds for whoever
builds the others on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks import column_adapters as columns
from benchmarks import frame_adapters as frames
from benchmarks.adapters import (
    BIAS,
    NO_BIAS,
    Attention,
    AttentionWithMap,
    Inputs,
    Sdpa,
    compiled,
    eager,
    flash_attention,
    flex_passes,
    kernels,
    reason,
    sdpa,
    with_bias,
    xformers,
)
from benchmarks.frame_adapters import Problem
from vstar_kernels.attention.bias import Bias
from vstar_kernels.cli.demo.denoise import EagerTARAttnProcessor
from vstar_kernels.models.attention_processor import TARAttnProcessor


@dataclass(frozen=True)
class Peer:
    """A way of computing attention.

    ``build`` gets query, key and value and returns the attention for inputs like them, whose
    ``note``, if it has one, is shown with the figures; ``build_frames`` does so for attention over
    frames of tokens, and ``build_cross``, which gets columns, for attention to a text. ``trial``
    replaces them where it would take long to find out whether the peer can run at all, or needs
    more. ``logits_held`` says how many tensors of all logits are held at once. ``ours`` marks this
    package, asked for something else; ``on_request`` a peer that runs only where it is named;
    ``quantised`` one whose errors are those of 8-bit integers.
    """

    title: str
    tar: bool
    build: Callable[[Inputs], Attention] | None
    build_with_map: Callable[[Inputs], AttentionWithMap] | None = None
    build_frames: Callable[[Problem], AttentionWithMap] | None = None
    build_cross: Callable[[Tensor], AttentionWithMap] | None = None
    processor: Callable[[Bias], Any] | None = None  # of diffusers' attention modules
    trial: Callable[[Inputs], Attention] | None = None
    logits_held: int = 0
    ours: bool = False
    on_request: bool = False
    quantised: bool = False

    @property
    def bias(self) -> vk.GaussianBias:
        """Returns the bias that its results must have."""
        return BIAS if self.tar else NO_BIAS

    @cache  # noqa: B019 (the peers live as long as the process)
    def unavailable(self, device: str, dtype: torch.dtype) -> str:
        """Returns why it cannot run on this device in this type; nothing if it can."""
        build = self.trial or self.build or self.build_with_map
        query, key, value = torch.randn(3, 2, 16, 2, 64, device=device).to(dtype).unbind()
        inputs = (query, key, value)
        try:
            attend = build(inputs) if build else self.build_frames(frames.trial(inputs))
            attend(query, key, value)
            if device == "cuda":
                torch.cuda.synchronize()
        # Whatever a peer raises is its own reason.
        except Exception as error:
            return reason(error)
        return ""


VSTAR_KERNELS, EAGER, SDPA = "vstar_kernels", "eager", "sdpa"
WITHOUT_RULE, COMPOSED = "strength-0", "composed"
PEERS = {
    VSTAR_KERNELS: Peer(
        "vstar_kernels",
        True,
        kernels,
        partial(kernels, return_map=True),
        frames.Kernels,
        columns.kernels,
        TARAttnProcessor,
        ours=True,
    ),
    EAGER: Peer(
        "eager formula",
        True,
        eager,
        partial(eager, return_map=True),
        build_cross=columns.bound(columns.eager),
        processor=EagerTARAttnProcessor,
        logits_held=4,
    ),
    "eager-compiled": Peer(
        "eager formula, compiled", True, lambda x: compiled(eager(x)), trial=eager, logits_held=4
    ),
    COMPOSED: Peer(
        "composed of others' attention", True, None, build_frames=frames.Composed, ours=True
    ),
    "sdpa-bias": Peer(
        "SDPA with the bias",
        True,
        partial(with_bias, sdpa),
        build_frames=frames.sdpa_with_bias,
        logits_held=3,
    ),
    "flex": Peer(
        "FlexAttention, two passes",
        True,
        lambda _: compiled(flex_passes),
        trial=lambda _: flex_passes,
    ),
    "flex-frames": Peer(
        "FlexAttention",
        True,
        None,
        build_frames=frames.flex,
        trial=lambda x: frames.flex_passes(frames.trial(x)),
    ),
    "ultravico": Peer(
        "UltraViCo's kernel", True, None, build_frames=frames.ultravico, quantised=True
    ),
    "sdpa-weights": Peer(
        "SDPA, and all weights again",
        True,
        None,
        build_cross=columns.bound(columns.sdpa_and_maps),
        trial=columns.trial(columns.sdpa_and_maps),
        logits_held=4,
    ),
    "sdpa-values": Peer(
        "SDPA with columns as values",
        True,
        None,
        build_cross=columns.bound(columns.sdpa_with_columns),
        trial=columns.trial(columns.sdpa_with_columns),
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
    WITHOUT_RULE: Peer(
        "vstar_kernels at strength 0",
        False,
        partial(kernels, bias=NO_BIAS),
        build_frames=partial(frames.Kernels, rule=None, with_map=False),
        ours=True,
    ),
    # diffusers' own processor stays.
    SDPA: Peer(
        "SDPA without TAR",
        False,
        Sdpa,
        build_frames=lambda problem: Sdpa(problem.inputs),
        processor=lambda _: None,
    ),
    "xformers": Peer("xformers without TAR", False, xformers),
    "flash-attn": Peer(
        "FlashAttention without TAR",
        False,
        flash_attention,
        build_frames=lambda problem: flash_attention(problem.inputs),
    ),
    "sage": Peer(
        "SageAttention without TAR", False, None, build_frames=frames.sage, quantised=True
    ),
}
