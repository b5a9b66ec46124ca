"""The demo on a full-3D transformer: Wan, tiny and random, denoises the same three ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import GaussianBias
from vstar_kernels.attention.frames.layout import Frames, Layout
from vstar_kernels.cli.demo.denoise import (
    EAGER,
    KERNELS,
    MAP_ROWS,
    REGULARIZED_STEPS,
    STOCK,
    VARIANTS,
    Denoising,
    Panel,
    StepFigures,
)
from vstar_kernels.cli.demo.models import VideoModel
from vstar_kernels.cli.measure import CoreTimer, now, read_peak_memory, reset_peak_memory
from vstar_kernels.models.apply import apply_tar
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.full3d.apply import full3d_models
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.models.full3d.function_mode import AttentionCall, ExchangedAttention
from vstar_kernels.models.map_capture import MapCapture

NAME = "wan"
SIZE = (192, 320)  # pixels
PIXELS_PER_TOKEN, PIXELS_PER_LATENT = 16, 8
FRAMES_OF_A_LATENT = 4
BLOCKS, HEADS, HEAD_DIM, TEXT_CHANNELS = 3, 4, 32, 64
TEXT_TOKENS = 31  # a prime: no video, of 4 × 4 tokens a frame at least, has as many
GUIDANCE_SCALE = 5.0  # WanPipeline's default


@dataclass(frozen=True)
class Block:
    """A block's self-attention; its number stands where a UNet's layers have a level."""

    name: str
    level: Level
    module: Any


def random_wan(*, frames: int, size: tuple[int, int] | None, seed: int, device: str) -> VideoModel:
    """Returns Wan's transformer, narrow and with untrained weights.

    Args:
        frames: Of the video; four are a latent one.
        size: Of the video, in pixels; what is no multiple of 16 is cut off. None is ``SIZE``.
        seed: Decides weights and noise.
        device: Where the model and the noise are put.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=TEXT_CHANNELS,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=BLOCKS,
    )
    latent_frames = (frames - 1) // FRAMES_OF_A_LATENT + 1
    height, width = (
        n // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN // PIXELS_PER_LATENT for n in size or SIZE
    )
    noise = torch.randn(
        (1, model.config.in_channels, latent_frames, height, width),
        generator=torch.Generator().manual_seed(seed),
    )
    embeds = torch.randn(2, TEXT_TOKENS, TEXT_CHANNELS)
    return VideoModel(
        f"WanTransformer3DModel, random weights, {BLOCKS} blocks of {HEADS} × {HEAD_DIM} channels",
        model.eval().to(device),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        embeds.to(device),
        noise.to(device),
    )


class TransformerDemo:
    """A full-3D transformer that is denoised by every variant, under TAR in all of its blocks.

    It has what :class:`vstar_kernels.cli.demo.denoise.Demo` has for the report.
    """

    attention = "self-attention over space and time"

    def __init__(self, model: VideoModel, config: FrameTAR, *, steps: int) -> None:
        self.model = model
        self._config = config
        family = full3d_models(model.unet)[""][1]
        self.layers = [Block(x.name, x.index, x.module) for x in family.find_layers(model.unet)]
        self.regularized = self.layers
        bias = GaussianBias(config.sigma, strength=config.strength)
        self.biases: dict[Level, GaussianBias] = {layer.level: bias for layer in self.layers}
        self.device = model.latents.device
        self.denoisings = [self._start(variant, steps) for variant in VARIANTS]
        self.timesteps = self.denoisings[0].scheduler.timesteps
        self.regularized_calls = min(len(self.timesteps), REGULARIZED_STEPS)
        _, _, frames, height, width = model.latents.shape
        self._layout = Layout(Frames(frames, height * width // 4))
        self._delta = config.strength * bias.matrix(frames).to(self.device)

    def _start(self, variant: Any, steps: int) -> Denoising:
        scheduler = type(self.model.scheduler).from_config(self.model.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return Denoising(variant, {}, scheduler, self.model.latents, torch.Generator())

    @property
    def num_forwards(self) -> int:
        """How often ``progress`` is called by :meth:`run`."""
        return 1 + len(self.timesteps) * len(self.denoisings)

    @torch.no_grad()
    def run(self, progress: Callable[[str], None]) -> None:
        """Denoises to the end; ``progress`` gets the name of what has just been done."""
        for denoising in self.denoisings:
            with self._attention(denoising):
                self._predict(self.model.latents, self.timesteps[0], 0)
        progress("warm-up")
        with CoreTimer(self.layers, self.device) as timer:
            for index in range(len(self.timesteps)):
                begin = index % len(self.denoisings)  # as in the other demo
                for denoising in self.denoisings[begin:] + self.denoisings[:begin]:
                    self._step(denoising, index, timer)
                    progress(denoising.variant.label)

    def panels(self) -> list[Panel]:
        """Returns what maps the report shows: each block's."""
        height, width = self.model.latents.shape[-2:]
        sigma = self._config.sigma
        return [
            Panel(f"block {x.level}", x.level, height, width, 1, sigma, _mean_of(x.name))
            for x in self.layers
        ]

    def _attention(self, denoising: Denoising) -> AbstractContextManager[object]:
        if denoising.variant is STOCK:
            return nullcontext()
        if denoising.variant is KERNELS:
            return apply_tar(
                self.model.unet,
                FrameTAR(self._config.sigma, self._config.strength, steps=None),
            )
        return ExchangedAttention(self._eager)

    def _eager(self, call: AttentionCall) -> Tensor:
        """Answers self-attention by TAR's formula over all pairs of tokens.

        The text's attention has another number of keys, see ``TEXT_TOKENS``.
        """
        if call.key.shape[-2] != self._layout.tokens:
            return call.stock()
        logits = call.query @ call.key.mT * call.query.shape[-1] ** -0.5
        by_frame = logits.unflatten(-1, (self._layout.frames, -1))
        means = by_frame.logsumexp(-1) - math.log(by_frame.shape[-1])
        delta = self._delta.repeat_interleave(by_frame.shape[-1], dim=0)
        bias = means.amax(-1, keepdim=True) * delta
        return (by_frame + bias[..., None]).flatten(-2).softmax(-1) @ call.value

    def _step(self, denoising: Denoising, index: int, timer: CoreTimer) -> None:
        regularize = index < self.regularized_calls
        attention = self._attention(denoising) if regularize else nullcontext()
        watched: AbstractContextManager[Any] = nullcontext()
        if index == self.regularized_calls - 1 and denoising.variant is not EAGER:
            denoising.capture = capture_maps(
                self.model.unet, scheduler=denoising.scheduler, max_rows=MAP_ROWS
            )
            watched = denoising.capture
        with attention, watched:
            can_measure_peak = reset_peak_memory(self.device)
            timer.take()
            start = now(self.device)
            self._advance(denoising, self.timesteps[index])
            seconds = now(self.device) - start
            peak_bytes = read_peak_memory(self.device) if can_measure_peak else None
        if regularize:
            denoising.figures.append(StepFigures(seconds, timer.take(), peak_bytes))

    def _advance(self, denoising: Denoising, timestep: Tensor) -> None:
        conditional, unconditional = (
            self._predict(denoising.latents, timestep, side) for side in (1, 0)
        )
        noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        stepped = denoising.scheduler.step(noise, timestep, denoising.latents)
        denoising.latents = stepped.prev_sample

    def _predict(self, latents: Tensor, timestep: Tensor, side: int) -> Tensor:
        """Returns the prediction without the prompt (side 0) or with it (1)."""
        text = self.model.prompt_embeds[side : side + 1]
        out: Tensor = self.model.unet(
            latents, timestep.expand(1), encoder_hidden_states=text, return_dict=False
        )[0]
        return out


def _mean_of(layer: str) -> Callable[[MapCapture], Tensor]:
    """Returns what gives the mean of a layer's maps, of both sides of guidance."""

    def mean(capture: MapCapture) -> Tensor:
        found = [item.map.mean(dim=0) for item in capture.maps if item.layer == layer]
        return torch.stack(found).mean(dim=0)

    return mean
