"""The denoising loop: three variants of attention, in turn, each with latents of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import Bias, DenseBias, GaussianBias
from vstar_kernels.cli.demo.models import VideoModel
from vstar_kernels.cli.measure import CoreTimer, now, read_peak_memory, reset_peak_memory
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.layers import TemporalLayer
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.testing import eager

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

REGULARIZED_STEPS = 14  # step indices 0 to 13, as in the official code
MAP_ROWS = 32  # few, so that the step with the maps takes no longer than the others
GUIDANCE_SCALE = 9.0  # TextToVideoSDPipeline's default


class EagerTARAttnProcessor:
    """A diffusers attention processor with TAR's formula in eager PyTorch, all maps held.

    Args:
        bias: Δ and its weight. Δ is made once, at the first call.
    """

    def __init__(self, bias: Bias) -> None:
        self._bias = bias
        self._dense: DenseBias | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends over the frames of ``(rows, frames, channels)``, projections included."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self._dense is None:
            delta = self._bias.matrix(hidden_states.shape[1]).to(query)
            self._dense = DenseBias(
                delta,
                strength=self._bias.strength,
                stat=self._bias.stat,
                clamp_negative=self._bias.clamp_negative,
                detach_stat=self._bias.detach_stat,
            )
        out = eager(query, key, value, self._dense, scale=attn.scale).flatten(-2)
        for layer in attn.to_out:
            out = layer(out)
        return out


@dataclass(frozen=True)
class Variant:
    """A way of computing the regularized layers' attention.

    Attributes:
        name, label: For files, and for people.
        processor: Makes the attention processor of a layer; None leaves the layers as they are.
    """

    name: str
    label: str
    processor: Callable[[GaussianBias], Any] | None = None


STOCK = Variant("stock", "stock attention, no TAR")
EAGER = Variant("eager_tar", "eager TAR", EagerTARAttnProcessor)
KERNELS = Variant("vstar_kernels", "vstar_kernels TAR", TARAttnProcessor)
VARIANTS = (STOCK, EAGER, KERNELS)


@dataclass(frozen=True)
class StepFigures:
    """What one step took.

    Attributes:
        seconds: Of the whole step.
        core_seconds: Of each regularized layer without its projections, by the layer's name.
        peak_bytes: None where it cannot be measured.
    """

    seconds: float
    core_seconds: dict[str, float]
    peak_bytes: int | None


@dataclass
class Denoising:
    """One variant's video in progress; ``figures`` has the regularized steps only."""

    variant: Variant
    processors: dict[str, Any]
    scheduler: Any
    latents: Tensor
    generator: torch.Generator
    figures: list[StepFigures] = field(default_factory=list)
    capture: MapCapture | None = None


@dataclass(frozen=True)
class Panel:
    """A map that the report shows, without TAR and with it.

    Attributes:
        name: Of a level, or of a block.
        level: Its number.
        height, width: Of the feature maps there.
        layers: Of how many layers it is the mean.
        sigma: In frames; None where there is no TAR.
        select: Returns the map from what was captured, ``(frames, frames)``.
    """

    name: str
    level: Level
    height: int
    width: int
    layers: int
    sigma: float | None
    select: Callable[[MapCapture], Tensor]


class Demo:
    """A model that is denoised by every variant, with the bias of each regularized level.

    Attributes:
        denoisings: The variants' videos, in the order of :data:`VARIANTS`.
        regularized: Those of ``layers`` whose level has a bias.
        regularized_calls: In how many calls of the model they are regularized.
    """

    attention = "temporal attention"

    def __init__(
        self,
        model: VideoModel,
        layers: list[TemporalLayer],
        biases: Mapping[Level, GaussianBias],
        *,
        steps: int,
        seed: int,
    ) -> None:
        self.model = model
        self.layers = layers
        self.regularized = [layer for layer in layers if layer.level in biases]
        self.biases = biases
        self.device = model.latents.device
        self._stock_processors = {layer.name: layer.module.processor for layer in layers}
        self.denoisings = [self._start(variant, steps, seed) for variant in VARIANTS]
        self.timesteps = self.denoisings[0].scheduler.timesteps
        # Some schedulers evaluate the model several times in a step.
        calls_per_step = self.denoisings[0].scheduler.order
        self.regularized_calls = min(len(self.timesteps), REGULARIZED_STEPS * calls_per_step)

    def _start(self, variant: Variant, steps: int, seed: int) -> Denoising:
        scheduler = self.model.scheduler
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        processors = dict(self._stock_processors)
        if variant.processor is not None:
            processors |= {
                layer.name: variant.processor(self.biases[layer.level])
                for layer in self.regularized
            }
        latents = self.model.latents * scheduler.init_noise_sigma
        generator = torch.Generator(self.device).manual_seed(seed)
        return Denoising(variant, processors, scheduler, latents, generator)

    @property
    def num_forwards(self) -> int:
        """How often ``progress`` is called by :meth:`run`."""
        return 1 + len(self.timesteps) * len(self.denoisings)

    @torch.no_grad()
    def run(self, progress: Callable[[str], None]) -> None:
        """Denoises to the end; ``progress`` gets the name of what has just been done."""
        self._warm_up()
        progress("warm-up")
        with CoreTimer(self.regularized, self.device) as timer:
            for index in range(len(self.timesteps)):
                # Each goes before the others in turn, so that none always follows the same one.
                begin = index % len(self.denoisings)
                for denoising in self.denoisings[begin:] + self.denoisings[:begin]:
                    self._step(denoising, index, timer)
                    progress(denoising.variant.label)
        self._install(self._stock_processors)

    def panels(self) -> list[Panel]:
        """Returns what maps the report shows: each level's."""
        found = []
        for level in sorted({layer.level for layer in self.layers if layer.level != "init"}):
            bias = self.biases.get(level)
            # Each level halves the resolution, rounding up.
            height, width = (-(-extent // 2**level) for extent in self.model.latents.shape[-2:])
            count = sum(layer.level == level for layer in self.layers)
            name, sigma = f"level {level} ({height} × {width})", bias.sigma if bias else None

            def select(capture: MapCapture, level: Level = level) -> Tensor:
                return capture.mean(level=level).mean(dim=0)

            found.append(Panel(name, level, height, width, count, sigma, select))
        return found

    def _warm_up(self) -> None:
        """Runs the model once for each variant.

        Stock attention runs at the real size, which sets up memory and the convolutions; the others
        run at a small one, which loads their kernels.
        """
        size = self.model.latents.shape[-2:]
        for denoising in self.denoisings:
            self._install(denoising.processors)
            height, width = (
                size if denoising.variant is STOCK else (min(8, extent) for extent in size)
            )
            self._predict(denoising, self.model.latents[..., :height, :width], self.timesteps[0])

    def _step(self, denoising: Denoising, index: int, timer: CoreTimer) -> None:
        regularize = index < self.regularized_calls
        self._install(denoising.processors if regularize else self._stock_processors)
        if index == self.regularized_calls - 1 and denoising.variant is not EAGER:
            denoising.capture = capture_maps(
                self.model.unet, layers=lambda layer: layer in self.layers, max_rows=MAP_ROWS
            )
            with denoising.capture:
                figures = self._measured_step(denoising, index, timer)
        else:
            figures = self._measured_step(denoising, index, timer)
        if regularize:
            denoising.figures.append(figures)

    def _measured_step(self, denoising: Denoising, index: int, timer: CoreTimer) -> StepFigures:
        can_measure_peak = reset_peak_memory(self.device)
        timer.take()
        start = now(self.device)
        self._advance(denoising, self.timesteps[index])
        seconds = now(self.device) - start
        peak_bytes = read_peak_memory(self.device) if can_measure_peak else None
        return StepFigures(seconds, timer.take(), peak_bytes)

    def _advance(self, denoising: Denoising, timestep: Tensor) -> None:
        latents = denoising.scheduler.scale_model_input(denoising.latents, timestep)
        unconditional, conditional = self._predict(denoising, latents, timestep)
        noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        extra = {}
        if "generator" in inspect.signature(denoising.scheduler.step).parameters:
            extra["generator"] = denoising.generator
        # Schedulers are made for images: (frames, channels, height, width).
        frames = denoising.latents[0].transpose(0, 1)
        stepped = denoising.scheduler.step(
            noise.transpose(0, 1), timestep, frames, **extra
        ).prev_sample
        denoising.latents = stepped.transpose(0, 1)[None]

    def _predict(self, denoising: Denoising, latents: Tensor, timestep: Tensor) -> Tensor:
        """Returns the noise without and with the prompt, shaped as two latents."""
        return self.model.unet(
            latents.expand(2, -1, -1, -1, -1),
            timestep,
            encoder_hidden_states=self.model.prompt_embeds,
        ).sample

    def _install(self, processors: dict[str, Any]) -> None:
        for layer in self.layers:
            layer.module.set_processor(processors[layer.name])
