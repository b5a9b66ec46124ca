"""The denoising loop: three ways, step by step in turn, each with latents of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import GaussianBias
from vstar_kernels.cli.demo.eager import EagerTARAttnProcessor
from vstar_kernels.cli.demo.measure import CoreTimer, now, read_peak_memory, reset_peak_memory
from vstar_kernels.cli.demo.models import VideoModel
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.capture import MapCapture, capture_maps
from vstar_kernels.models.layers import TemporalLayer

REGULARIZED_STEPS = 14  # step indices 0 to 13, as in the paper
MAP_ROWS = 32  # few, so that the step with the maps takes no longer than the others
GUIDANCE_SCALE = 9.0  # TextToVideoSDPipeline's default


@dataclass(frozen=True)
class Way:
    """A way of computing the regularized layers; ``processor`` None leaves them as they are."""

    name: str
    label: str
    processor: Callable[[GaussianBias], Any] | None = None


STOCK = Way("stock", "stock attention, no TAR")
EAGER = Way("eager_tar", "eager TAR", EagerTARAttnProcessor)
KERNELS = Way("vstar_kernels", "vstar_kernels TAR", TARAttnProcessor)
WAYS = (STOCK, EAGER, KERNELS)


@dataclass(frozen=True)
class StepFigures:
    """What one step took; ``core_seconds`` by the name of the layer, without its projections.

    ``peak_bytes`` is None where it cannot be measured.
    """

    seconds: float
    core_seconds: dict[str, float]
    peak_bytes: int | None


@dataclass
class Denoising:
    """One way's video in progress. ``figures`` has the regularized steps only."""

    way: Way
    processors: dict[str, Any]
    scheduler: Any
    latents: Tensor
    generator: torch.Generator
    figures: list[StepFigures] = field(default_factory=list)
    capture: MapCapture | None = None


class Demo:
    """The model, and its temporal attention layers with the bias of each regularized level."""

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
        self._own_processors = {layer.name: layer.module.processor for layer in layers}
        self.runs = [self._start(way, steps, seed) for way in WAYS]
        self.timesteps = self.runs[0].scheduler.timesteps
        # Some schedulers evaluate the model several times in a step.
        calls_per_step = self.runs[0].scheduler.order
        self.regularized_calls = min(len(self.timesteps), REGULARIZED_STEPS * calls_per_step)

    def _start(self, way: Way, steps: int, seed: int) -> Denoising:
        scheduler = self.model.scheduler
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        processors = dict(self._own_processors)
        if way.processor is not None:
            processors |= {
                layer.name: way.processor(self.biases[layer.level]) for layer in self.regularized
            }
        latents = self.model.latents * scheduler.init_noise_sigma
        generator = torch.Generator(self.device).manual_seed(seed)
        return Denoising(way, processors, scheduler, latents, generator)

    @property
    def num_forwards(self) -> int:
        """How often ``progress`` is called by :meth:`run`."""
        return 1 + len(self.timesteps) * len(self.runs)

    @torch.no_grad()
    def run(self, progress: Callable[[str], None]) -> None:
        """Denoise to the end; ``progress`` gets the name of what has just been done."""
        self._warm_up()
        progress("warm-up")
        with CoreTimer(self.regularized, self.device) as timer:
            for index in range(len(self.timesteps)):
                # Each way goes first in turn, so that none always follows the same neighbour.
                first = index % len(self.runs)
                for run in self.runs[first:] + self.runs[:first]:
                    self._step(run, index, timer)
                    progress(run.way.label)
        self._install(self._own_processors)

    def _warm_up(self) -> None:
        """One stock forward at the real size, which sets up memory and the convolutions, and a
        small one for each other way, which loads its kernels."""
        size = self.model.latents.shape[-2:]
        for run in self.runs:
            self._install(run.processors)
            height, width = size if run.way is STOCK else (min(8, extent) for extent in size)
            self._predict(run, self.model.latents[..., :height, :width], self.timesteps[0])

    def _step(self, run: Denoising, index: int, timer: CoreTimer) -> None:
        regularize = index < self.regularized_calls
        self._install(run.processors if regularize else self._own_processors)
        if index == self.regularized_calls - 1 and run.way is not EAGER:
            run.capture = capture_maps(
                self.model.unet, layers=lambda layer: layer in self.layers, max_rows=MAP_ROWS
            )
            with run.capture:
                figures = self._measured_step(run, index, timer)
        else:
            figures = self._measured_step(run, index, timer)
        if regularize:
            run.figures.append(figures)

    def _measured_step(self, run: Denoising, index: int, timer: CoreTimer) -> StepFigures:
        can_measure_peak = reset_peak_memory(self.device)
        timer.take()
        start = now(self.device)
        self._advance(run, self.timesteps[index])
        seconds = now(self.device) - start
        peak_bytes = read_peak_memory(self.device) if can_measure_peak else None
        return StepFigures(seconds, timer.take(), peak_bytes)

    def _advance(self, run: Denoising, timestep: Tensor) -> None:
        latents = run.scheduler.scale_model_input(run.latents, timestep)
        unconditional, conditional = self._predict(run, latents, timestep)
        noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        extra = {}
        if "generator" in inspect.signature(run.scheduler.step).parameters:
            extra["generator"] = run.generator
        # Schedulers are made for images: (frames, channels, height, width).
        frames = run.latents[0].transpose(0, 1)
        stepped = run.scheduler.step(noise.transpose(0, 1), timestep, frames, **extra).prev_sample
        run.latents = stepped.transpose(0, 1)[None]

    def _predict(self, run: Denoising, latents: Tensor, timestep: Tensor) -> Tensor:
        """The noise without and with the prompt, ``(2, channels, frames, height, width)``."""
        return self.model.unet(
            latents.expand(2, -1, -1, -1, -1),
            timestep,
            encoder_hidden_states=self.model.prompt_embeds,
        ).sample

    def _install(self, processors: dict[str, Any]) -> None:
        for layer in self.layers:
            layer.module.set_processor(processors[layer.name])
