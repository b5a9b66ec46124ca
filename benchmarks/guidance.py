"""``python -m benchmarks.guidance``: what an update of the latents costs beside a denoising step.

A step of ModelScope's UNet, narrowed and with random weights, under classifier-free guidance, by
itself and with one update of the latents by a plan (``guide_latents``): with the layers of all
levels but the finest, after which the forward pass ends, and with those of all; each with and
without gradient checkpointing. Timed in turn; medians. Memory is the peak of a step beyond what it
begins with. Prints a Markdown table; the last column is what sampling takes as long as, by these
figures, with the updates of ``GuidanceConfig()`` in 50 steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.machine import peak_bytes
from benchmarks.record import write_record
from benchmarks.report.tables import Table
from benchmarks.unet import TEXT_TOKENS, unet3d
from vstar_kernels.cli.options import parsed, read_options, size
from vstar_kernels.methods.starvid.guidance import GuidanceHandle
from vstar_kernels.methods.starvid.words import PlanWords
from vstar_kernels.models.front_end import cross_layers

PIXELS_PER_LATENT = 8
STEPS = 50
PLAIN = "no guidance"
BOXES = [(0.0, 0.2, 0.4, 0.8)], [(0.6, 0.2, 1.0, 0.8)]
PLAN = vk.Trajectory(
    "cat runs dog sits",
    [vk.Subject("cat", "runs", boxes=BOXES[0]), vk.Subject("dog", "sits", boxes=BOXES[1])],
)
WORDS = PlanWords(("cat", "dog", "runs", "sits"), ((1,), (3,), (2,), (4,)), (0, 1), (2, 3))


@dataclass(frozen=True)
class Options:
    """Measure what guidance of the latents costs."""

    width: int = 64
    """Channels of the finest level; the real model has 320."""
    frames: int = 8
    size: Annotated[tuple[int, int], parsed(size(64), "HEIGHTxWIDTH")] = field(
        default_factory=lambda: (64, 96)
    )
    """In pixels."""
    device: str = "cpu"
    rounds: int = 3
    json: Path | None = None
    """A file for the figures."""


class Sampler:
    """A denoising step of a UNet as a pipeline makes it, guided or not."""

    def __init__(self, options: Options) -> None:
        from diffusers import DDIMScheduler

        torch.manual_seed(0)
        self.unet = unet3d(options.width).eval().to(options.device)
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(STEPS)
        height, width = (side // PIXELS_PER_LATENT for side in options.size)
        shape = (1, self.unet.config.in_channels, options.frames, height, width)
        self._latents = torch.randn(shape, device=options.device)
        channels = self.unet.config.cross_attention_dim
        self._text = torch.randn(2, TEXT_TOKENS, channels, device=options.device)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Makes the first denoising step."""
        timestep, latents = self.scheduler.timesteps[0], self._latents
        sample = self.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        output = self.unet(sample, timestep, encoder_hidden_states=self._text).sample
        negative, positive = output.chunk(2)
        output = negative + 9 * (positive - negative)
        moved: Tensor = self.scheduler.step(output, timestep, latents).prev_sample
        return moved

    def guided(self, levels: Sequence[int] | None, checkpointing: bool) -> Callable[[], Tensor]:
        """Returns the same step with one update of the latents before it."""
        config = vk.GuidanceConfig(updates=1, levels=levels, syntax=(0.0, 0.5))

        def step() -> Tensor:
            with GuidanceHandle(
                self.unet,
                self.scheduler,
                [PLAN],
                [WORDS],
                config,
                guidance=True,
                checkpointing=checkpointing,
                backend=None,
            ):
                return self.step()

        return step


def measure(options: Options) -> list[dict[str, Any]]:
    """Returns the seconds and the peak bytes of each way to make a step."""
    sampler = Sampler(options)
    every = sorted({layer.level for layer in cross_layers(sampler.unet)})
    ways = {
        PLAIN: sampler.step,
        "all levels but the finest, checkpointing": sampler.guided(None, True),
        "all levels but the finest": sampler.guided(None, False),
        "all levels, checkpointing": sampler.guided(every, True),
        "all levels": sampler.guided(every, False),
    }
    clock = clock_for(options.device)
    calls = [clock.warm_up(TimedCall(name, way), [()]) for name, way in ways.items()]
    times = time_in_turn(clock, calls, 1, rounds=options.rounds, seconds=60.0)
    return [
        {
            "way": name,
            "seconds": statistics.median(times[name]),
            "peak_bytes": peak_bytes(options.device, way),
        }
        for name, way in ways.items()
    ]


def table(results: Sequence[dict[str, Any]], options: Options) -> Table:
    """Returns the results as a table."""
    config = vk.GuidanceConfig()
    guided = [step for step in range(STEPS) if any(config.weights(step, STEPS))]
    updates = config.updates * len(guided)
    plain = results[0]["seconds"]
    rows = []
    for result in results:
        update = result["seconds"] - plain
        peak = result["peak_bytes"]
        rows.append(
            [
                result["way"],
                f"{result['seconds']:.2f} s",
                "" if result["way"] == PLAIN else f"{update / plain:.2f}",
                "unknown" if peak is None else f"{peak / 2**20:.0f} MiB",
                f"{(STEPS * plain + updates * update) / (STEPS * plain):.2f}",
            ]
        )
    head = [
        "maps of",
        "a step",
        "an update, in steps",
        "peak memory",
        f"{STEPS} steps, {updates} updates",
    ]
    height, width = options.size
    title = f"{options.width} channels, {options.frames} frames of {height} × {width}"
    return Table(title, head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the file."""
    options = read_options(Options, arguments, prog="python -m benchmarks.guidance")
    results = measure(options)
    print(table(results, options).markdown())
    write_record(options, results)


if __name__ == "__main__":
    main()
