"""How clean latents become noisy, where that is not the scheduler's way, and sampling in that way.

VideoCrafter2, for one, weakens the signal the more, the noisier it is: its ``scale_arr`` falls from
1 to 0.7, so that a scheduler's ``add_noise`` would make the signal up to 1.43 times too strong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.models.front_end import find_front_end, unwrap
from vstar_kernels.models.lvdm import LvdmFrontEnd

Noising = Callable[[Tensor, Tensor, Tensor], Tensor]
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "sample": "sample", "x0": "sample"}


def noising_of(pipe_or_model: Any, given: Noising | None) -> Noising | None:
    """Returns the noising that was given, or else the model's own; None is the scheduler's.

    The ``LatentDiffusion`` of ``lvdm`` has its own, ``q_sample``.

    Raises:
        TypeError: What was given cannot be called.
    """
    if given is not None:
        if not callable(given):
            raise TypeError(
                "noising must be a function of latents, noise and timesteps, or None, got "
                f"{type(given).__name__}"
            )
        return given
    q_sample = getattr(pipe_or_model, "q_sample", None)
    if not isinstance(pipe_or_model, nn.Module) or q_sample is None:
        return None

    def own(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noised: Tensor = q_sample(latents, timesteps.long(), noise=noise)
        return noised.to(latents.dtype)

    return own


def check_noising(model: nn.Module, noising: Noising | None) -> None:
    """Raises where a model's noising is known to be its own and nobody has told it.

    Raises:
        ValueError: It is the UNet of ``lvdm`` by itself.
    """
    if noising is None and isinstance(find_front_end(unwrap(model)), LvdmFrontEnd):
        raise ValueError(
            f"noising must be given for {type(model).__name__} by itself, as models of lvdm have "
            "noisings of their own (VideoCrafter2 scales the signal): give the LatentDiffusion "
            "that holds it as pipe_or_model, or noising=, a function of latents, noise and "
            "timesteps such as a scheduler's add_noise"
        )


class NoisingSchedule:
    """Deterministic DDIM between the levels of a noising, for use as a scheduler.

    The noising is x_t = a(t)·x₀ + b(t)·ε, with a(t) and b(t) asked of it. A step from t to s takes
    the model's prediction for ε or x₀, solves for the other, and returns a(s)·x₀ + b(s)·ε (Song et
    al. 2021, arXiv 2010.02502, with η = 0); in VideoCrafter2 that is its own sampler's.

    Args:
        noising: See above.
        timesteps: Of the schedule, the noisiest first.
        prediction: What the model predicts: ``"epsilon"`` or ``"sample"``, or as lvdm calls them
            ``"eps"`` and ``"x0"``.

    Raises:
        ValueError: The model predicts something else.
    """

    init_noise_sigma = 1.0
    order = 1

    def __init__(self, noising: Noising, timesteps: Tensor, prediction: str) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(
                "steps by a noising need a model that predicts epsilon or sample, got "
                f"prediction_type {prediction!r}: use at_step=0"
            )
        self.timesteps = timesteps
        self._noising = noising
        self._predicts_noise = PREDICTIONS[prediction] == "epsilon"

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the sample as it is."""
        return sample

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor) -> SimpleNamespace:
        """Returns the sample at the next timestep as ``prev_sample``."""
        values = self.timesteps.tolist()
        following = self.timesteps[values.index(timestep.item()) + 1]
        signal, noise = self._coefficients(timestep, sample)
        next_signal, next_noise = self._coefficients(following, sample)
        if self._predicts_noise:
            clean, noisy = (sample - noise * output) / signal, output
        else:
            clean, noisy = output, (sample - signal * output) / noise
        return SimpleNamespace(prev_sample=next_signal * clean + next_noise * noisy)

    def _coefficients(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            one = torch.ones([1] * like.ndim, dtype=like.dtype, device=like.device)
            time = timestep.to(like.device).expand(1)
            signal = self._noising(one, 0 * one, time)
            return signal, self._noising(0 * one, one, time)


def prediction_type(pipe_or_model: Any, scheduler: Any) -> str:
    """Returns what a model predicts, as lvdm's model or the scheduler's configuration says it."""
    own = getattr(pipe_or_model, "parameterization", None)
    config = getattr(scheduler, "config", None)
    found = own if isinstance(own, str) else getattr(config, "prediction_type", None)
    return found or "epsilon"
