"""What temporal attention makes of real videos (VSTAR, arXiv 2403.13501, Fig. 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.frames import as_frames
from vstar_kernels.analysis.maps import AttentionMap
from vstar_kernels.methods.vstar.noise import standard_normal
from vstar_kernels.methods.vstar.noising import Noising, check_noising, noising_of
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.front_end import models_with_temporal_attention
from vstar_kernels.models.layers import TemporalLayer
from vstar_kernels.models.lvdm import inner_model


@dataclass(frozen=True, eq=False)
class RealVideoMaps:
    """The attention maps of a real video at some noise levels.

    Attributes:
        maps: As :func:`vstar_kernels.capture_maps` gives them; for
            :func:`vstar_kernels.analysis.mean_maps` and
            :func:`vstar_kernels.optimize_noise`.
        noised: The latents that the model was given, by step, before the scheduler's input scaling.
    """

    maps: list[AttentionMap]
    noised: dict[int, Tensor]


@torch.no_grad()
def capture_real_maps(
    pipe_or_model: Any,
    latents: Tensor,
    inputs: Mapping[str, Any],
    *,
    steps: Sequence[int],
    scheduler: Any = None,
    noising: Noising | None = None,
    generator: torch.Generator | None = None,
    layers: Callable[[TemporalLayer], bool] | None = None,
    max_rows: int = 256,
) -> RealVideoMaps:
    """Captures the maps of a real video: its latents are noised and then denoised once.

    At each of the steps, the latents are noised afresh to the level at which sampling would begin
    that step, all with the same noise, and the model is called once. TAR and per-frame prompts that
    are applied to the model are seen.

    >>> latents = vk.encode_frames(pipe.vae, frames)
    >>> text = pipe.encode_prompt(prompt, pipe.device, 1, False)[0]
    >>> real = vk.capture_real_maps(
    ...     pipe, latents, {"encoder_hidden_states": text}, steps=[0, 13]
    ... )

    Args:
        pipe_or_model: A pipeline with one model that has temporal attention, or that model; of
            ``lvdm`` the ``LatentDiffusion``, whose own noising (``q_sample``) is then taken.
        latents: ``(batch, channels, frames, height, width)``, or in the order that the model takes.
        inputs: Whatever else the model takes, by name: its text embeddings, for one.
        steps: Indices into the scheduler's schedule, 0 the noisiest.
        scheduler: The noise levels, with its ``set_timesteps`` called; None is the pipeline's own.
            It is copied and not changed. With a noising of the model's own or of yours, anything
            with ``timesteps``, the noisiest first.
        noising: A function of latents, noise and timesteps ``(batch,)`` that returns the noised
            latents as the model takes them; None is the model's own (``lvdm``), or else the
            scheduler's.
        generator: Draws the noise; the same seed gives the same maps.
        layers, max_rows: See :func:`vstar_kernels.capture_maps`.

    Raises:
        TypeError: ``pipe_or_model`` or ``noising`` is of the wrong kind.
        ValueError: It holds several models with temporal attention or none, there is no scheduler,
            or it has no such step; or it is the UNet of ``lvdm`` alone, and there is no
            ``noising``.
    """
    model = temporal_model(pipe_or_model)
    noise_to = noising_of(pipe_or_model, noising)
    check_noising(model, noise_to)
    schedule = scheduler_of(pipe_or_model, scheduler)
    timesteps = step_timesteps(schedule, steps)
    noise = standard_normal(latents.shape, generator, latents)
    noised: dict[int, Tensor] = {}
    with capture_maps(model, layers=layers, max_rows=max_rows) as capture:
        for step, timestep in timesteps.items():
            capture.step = step
            times = timestep.to(latents.device).expand(len(latents))
            if noise_to is not None:
                sample = noised[step] = noise_to(latents, noise, times)
            else:
                fresh = restarted_copy(schedule)
                noised[step] = fresh.add_noise(latents, noise, times)
                sample = fresh.scale_model_input(noised[step], timestep)
            model(sample, times, **inputs)
    return RealVideoMaps(capture.maps, noised)


@torch.no_grad()
def encode_frames(vae: Any, frames: Any) -> Tensor:
    """Encodes a video frame by frame into clean latents, the mode of the VAE's distribution.

    Args:
        vae: diffusers' ``AutoencoderKL`` or ``AutoencoderKLTemporalDecoder``.
        frames: As for :func:`vstar_kernels.analysis.as_frames`.

    Returns:
        ``(1, channels, frames, height, width)``, scaled as the denoising model expects.
    """
    video = 2 * as_frames(frames).to(device=vae.device, dtype=vae.dtype) - 1
    latents = [vae.encode(frame[None]).latent_dist.mode() for frame in video]
    return torch.stack(latents, dim=2) * vae.config.scaling_factor


def temporal_model(pipe_or_model: Any) -> Any:
    """Returns the one model with temporal attention, unwrapped.

    Raises:
        TypeError, ValueError: There is none, or several.
    """
    models = models_with_temporal_attention(inner_model(pipe_or_model))
    if len(models) > 1:
        raise ValueError(
            f"{type(pipe_or_model).__name__} holds several models with temporal attention "
            f"({', '.join(models)}): give one of them, with the scheduler"
        )
    return next(iter(models.values()))


def scheduler_of(pipe_or_model: Any, scheduler: Any) -> Any:
    """Returns the scheduler that was given, or the pipeline's.

    Raises:
        ValueError: There is none.
    """
    found = scheduler if scheduler is not None else getattr(pipe_or_model, "scheduler", None)
    if found is None:
        raise ValueError("a model by itself needs scheduler=, which tells its noise levels")
    return found


def restarted_copy(scheduler: Any) -> Any:
    """Returns a copy of a scheduler that has not begun to sample, and finds steps by timesteps."""
    fresh = copy.deepcopy(scheduler)
    for name in ("_begin_index", "_step_index"):
        if hasattr(fresh, name):
            setattr(fresh, name, None)
    return fresh


def step_timesteps(scheduler: Any, steps: Sequence[int]) -> dict[int, Tensor]:
    """Returns the timestep at which each of these steps begins.

    Raises:
        ValueError: The schedule has no such step, or none is asked for.
    """
    timesteps = torch.as_tensor(scheduler.timesteps)
    return {step: timesteps[place] for step, place in step_places(scheduler, steps).items()}


def step_places(scheduler: Any, steps: Sequence[int]) -> dict[int, int]:
    """Returns at which place of the scheduler's timesteps each of these steps begins.

    Raises:
        ValueError: The schedule has no such step, or none is asked for.
    """
    values = torch.as_tensor(scheduler.timesteps).tolist()
    order = getattr(scheduler, "order", 1)
    if order > 1:
        starts = list(range(0, len(values), order))
    else:  # PNDM visits one twice
        starts = [place for place, value in enumerate(values) if value not in values[:place]]
    for step in steps:
        if not 0 <= step < len(starts):
            raise ValueError(f"steps of this schedule are 0 to {len(starts) - 1}, got {step}")
    if not steps:
        raise ValueError("steps must name at least one step, got none")
    return {step: starts[step] for step in steps}
