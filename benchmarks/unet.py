"""Video UNets with random weights in their real architectures; a step of one as an operation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from benchmarks.adapters import BIAS
from benchmarks.cases import Case
from benchmarks.clock import Tensors, TimedCall
from benchmarks.peers import Peer
from vstar_kernels.cli.options import parsed, size
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import temporal_layers

PIXELS_PER_LATENT = 8
SAMPLES = 2  # of classifier-free guidance
TEXT_TOKENS = 77
TIMESTEP = 500
# Of the type's eps: how far from the reference's the latents may be, over their norm.
TOLERANCE = 64


@dataclass(frozen=True)
class UNetOptions:
    """A forward pass of a video UNet, and where its figures go."""

    width: int = 320
    """Channels of the finest level."""
    frames: int = 16
    size: Annotated[tuple[int, int], parsed(size(64), "HEIGHTxWIDTH")] = (320, 512)
    """In pixels."""
    batch: int = 2
    """2 is one video under classifier-free guidance."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    json: Path | None = None
    """A file for the figures."""

    @property
    def tensors(self) -> dict[str, Any]:
        """Returns where tensors are made, and in what type."""
        return {"device": self.device, "dtype": getattr(torch, self.dtype)}


def unet3d(width: int) -> Any:
    """Returns ModelScope's UNet, which VideoCrafter2 and ZeroScope share, ``width`` wide."""
    from diffusers import UNet3DConditionModel

    head = 64 if width % 64 == 0 else 32
    return UNet3DConditionModel(block_out_channels=_channels(width), attention_head_dim=head)


def motion(width: int) -> Any:
    """Returns AnimateDiff's UNet, ``width`` channels at its finest level."""
    from diffusers import UNetMotionModel

    return UNetMotionModel(block_out_channels=_channels(width), cross_attention_dim=768)


def _channels(width: int) -> tuple[int, ...]:
    return (width, 2 * width, 4 * width, 4 * width)


class Step:
    """One evaluation of ModelScope's UNet with TAR on every level, σ = 1, by a peer's processors.

    The first temporal block keeps its own attention, as in VSTAR.
    """

    def __init__(self, case: Case, device: str, width: int) -> None:
        torch.manual_seed(0)
        self.case = case
        options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
        self._model = unet3d(width).eval().to(**options)
        self._layers = [x for x in temporal_layers(self._model) if x.level != "init"]
        self._original = {layer.name: layer.module.processor for layer in self._layers}
        channels = self._model.config.in_channels
        latents = torch.randn(SAMPLES, channels, case.frames, *case.latents, **options)
        self.inputs: list[Tensors] = [(latents,)]
        text = self._model.config.cross_attention_dim
        self._prompt = torch.randn(SAMPLES, TEXT_TOKENS, text, **options)
        # Of a number the model makes a tensor, by a copy that waits for the GPU.
        self._timestep = torch.tensor(TIMESTEP, device=device)
        self._expected: dict[Any, Tensor] = {}

    def offers(self, peer: Peer) -> bool:
        """Returns whether diffusers' modules can be given this peer."""
        return peer.processor is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        """Returns a call of the model; the peer's processors are installed before each."""
        processors = {layer: peer.processor(BIAS) or x for layer, x in self._original.items()}
        install = functools.partial(self._install, processors)
        return TimedCall(name, self._predict, prepare=install), ""

    def check(self, peer: Peer, result: Tensor) -> float:
        """Returns the distance from this package's reference in the same model, over its norm.

        Raises AssertionError if it is too large.
        """
        if peer.bias not in self._expected:
            make = functools.partial(TARAttnProcessor, peer.bias, backend="reference")
            self._install({layer: make() for layer in self._original})
            self._expected[peer.bias] = self._predict(*self.inputs[0]).double()
        expected = self._expected[peer.bias]
        error = ((result.double() - expected).norm() / expected.norm()).item()
        allowed = TOLERANCE * torch.finfo(result.dtype).eps
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
        return error

    def _predict(self, latents: Tensor) -> Tensor:
        return self._model(latents, self._timestep, encoder_hidden_states=self._prompt).sample

    def _install(self, processors: dict[str, Any]) -> None:
        for layer in self._layers:
            layer.module.set_processor(processors[layer.name])
