"""A whole text-to-video UNet whose temporal attention can be exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.models import TEXT_TOKENS, unet3d
from benchmarks.peers.tar import BIAS
from vstar_kernels.attention.bias import Bias
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import temporal_layers

SAMPLES = 2  # of classifier-free guidance
TIMESTEP = 500
# Of the type's eps: how far from the reference's the latents may be, over their norm.
TOLERANCE = 64

Processors = dict[str, Any]


class RegularizedUnet:
    """ModelScope's UNet, random weights, TAR with σ = 1 on every level."""

    def __init__(self, case: Case, device: str, width: int) -> None:
        assert case.latents is not None
        torch.manual_seed(0)
        self._model = unet3d(width).eval().to(device, case.torch_dtype)
        self._layers = [x for x in temporal_layers(self._model) if x.level != "init"]
        self._own = {layer.name: layer.module.processor for layer in self._layers}
        options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
        channels = self._model.config.in_channels
        self.latents = torch.randn(SAMPLES, channels, case.frames, *case.latents, **options)
        text = self._model.config.cross_attention_dim
        self._prompt = torch.randn(SAMPLES, TEXT_TOKENS, text, **options)
        self._expected: dict[float, Tensor] = {}

    def __call__(self, latents: Tensor) -> Tensor:
        """The noise that the model predicts."""
        return self._model(latents, TIMESTEP, encoder_hidden_states=self._prompt).sample

    def processors(self, make: Callable[[Bias], Any]) -> Processors:
        """A processor for each regularized layer; its own where ``make`` gives None."""
        return {name: make(BIAS) or own for name, own in self._own.items()}

    def install(self, processors: Processors) -> None:
        """Exchange the attention."""
        for layer in self._layers:
            layer.module.set_processor(processors[layer.name])

    def check(self, result: Tensor, bias: Bias) -> float:
        """The distance from the same model with this package's reference, over its norm."""
        if bias.strength not in self._expected:
            self.install(self.processors(lambda _: TARAttnProcessor(bias, backend="reference")))
            self._expected[bias.strength] = self(self.latents).double()
        expected = self._expected[bias.strength]
        error = ((result.double() - expected).norm() / expected.norm()).item()
        allowed = TOLERANCE * torch.finfo(result.dtype).eps
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
        return error
