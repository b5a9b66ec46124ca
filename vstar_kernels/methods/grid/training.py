"""The loss that a grid is trained by: an image model's own, on the grid (ETC)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_kernels.analysis.grids import to_grid
from vstar_kernels.models.grid.apply import check_speed, grid_model_of


def grid_loss(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    fps: float | Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Returns the denoising loss of some videos as grids: ‖target − unet(z_t, t, text)‖², the mean.

    >>> with vk.apply_grid(unet, 16, embedding=embedding):
    ...     loss = vk.grid_loss(unet, scheduler, latents, text, fps)

    Noise and timesteps are drawn for each video; the target is the scheduler's ``prediction_type``.
    What :func:`vstar_kernels.apply_grid` put on the model says how the frames are laid out and adds
    the embeddings, to whose parameters gradients flow too.

    Args:
        unet: Under ``apply_grid``; a wrapper of it, such as DDP's, will do.
        scheduler: Has ``add_noise`` and a ``config``, as diffusers' have.
        latents: ``(batch, frames, channels, h, w)``.
        text: ``(batch, tokens, channels)`` embeddings.
        fps: Of each video, for an embedding with an :class:`FPSEmbedding`; None leaves what
            ``apply_grid`` was given.
        generator: Draws noise and timesteps.
        options: More arguments of the model, such as SDXL's ``added_cond_kwargs``.

    Raises:
        ValueError: The model is not under ``apply_grid``, it has no embedding of ``fps``, the
            frames are not the grid's, or the scheduler predicts something else than noise, v or the
            sample.
        TypeError: The scheduler, the latents or the text are of the wrong kind.
    """
    model = grid_model_of(unet)
    if model is None:
        raise ValueError("unet is not under apply_grid, which lays out the frames")
    told = nullcontext() if fps is None else model.fps.during(check_speed(fps, [model]))
    _check_inputs(scheduler, latents, text)
    rows, cols, order = model.grid
    config, device = scheduler.config, latents.device
    drawn_on = device if generator is None else generator.device
    noise = torch.randn(latents.shape, generator=generator, device=drawn_on, dtype=latents.dtype)
    times = torch.randint(
        config.num_train_timesteps, latents.shape[:1], generator=generator, device=drawn_on
    )
    noise, times = noise.to(device), times.to(device)
    kind = config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, times)
    elif kind == "sample":
        target = latents
    else:
        raise ValueError(
            f"the scheduler's prediction_type must be 'epsilon', 'v_prediction' or 'sample', got "
            f"{kind!r}"
        )
    noisy = to_grid(scheduler.add_noise(latents, noise, times), rows, cols, order)
    with told:
        predicted = unet(noisy, times, encoder_hidden_states=text, **options).sample
    return F.mse_loss(predicted.float(), to_grid(target, rows, cols, order).float())


def _check_inputs(scheduler: Any, latents: Any, text: Any) -> None:
    if not hasattr(scheduler, "add_noise") or not hasattr(scheduler, "config"):
        raise TypeError(
            "scheduler must have add_noise and a config, as diffusers' have, got "
            f"{type(scheduler).__name__}"
        )
    shapes = {
        "latents": (latents, 5, "(batch, frames, channels, h, w)"),
        "text": (text, 3, "(batch, tokens, channels)"),
    }
    for name, (tensor, ndim, shape) in shapes.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of floats, got {kind}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if len(text) != len(latents):
        raise ValueError(
            f"text must be of the same batch as the latents, {len(latents)}, got {len(text)}"
        )
