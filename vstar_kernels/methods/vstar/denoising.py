"""From pure noise to a later denoising step, with gradients: what the noise search runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vstar_kernels.analysis.maps import AttentionMap
from vstar_kernels.methods.vstar.noising import Noising, NoisingSchedule, prediction_type
from vstar_kernels.methods.vstar.real_videos import restarted_copy, scheduler_of, step_places
from vstar_kernels.models.map_capture import MapCapture

Maps = dict[int, list[AttentionMap]]  # by step


class Denoising:
    """The denoising steps from pure noise to the last one of which maps are wanted.

    Args:
        pipe_or_model: What the caller gave; it may hold the scheduler, and know what it predicts.
        model: The model itself.
        inputs, negative_inputs: What it takes beside latents and timestep, with the prompt and,
            for classifier-free guidance, without.
        guidance_scale: How much the prompt counts; 1 is no guidance.
        steps: Of which maps are wanted.
        scheduler, noising: See :func:`vstar_kernels.optimize_noise`.
        checkpointing: Whether to compute each step before the last again in the backward pass.

    Raises:
        ValueError: The schedule has no such step, or cannot be begun anew.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        negative_inputs: Mapping[str, Any] | None,
        guidance_scale: float,
        steps: Collection[int],
        scheduler: Any,
        noising: Noising | None,
        checkpointing: bool,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._negative_inputs = negative_inputs
        self._guidance_scale = guidance_scale
        self._checkpointing = checkpointing
        found = scheduler_of(pipe_or_model, scheduler)
        try:
            places = step_places(found, sorted(steps))
        except ValueError as error:
            raise ValueError(f"at_step: {error}") from None
        if noising is not None:
            timesteps = torch.as_tensor(found.timesteps)
            kind = prediction_type(pipe_or_model, found) if max(steps) else "epsilon"
            found = NoisingSchedule(noising, timesteps, kind)
        self._schedule = _begun_anew(found) if max(steps) else restarted_copy(found)
        self._step_at = {place: step for step, place in places.items()}

    def run(self, noise: Tensor, capture: MapCapture) -> Maps:
        """Denoises pure noise, and returns the maps of the wanted steps as they are captured.

        With gradients, the maps are in the graph as long as the capture is on the model.
        """
        schedule = copy.deepcopy(self._schedule)
        timesteps = torch.as_tensor(schedule.timesteps)
        latents = noise * schedule.init_noise_sigma
        maps: Maps = {}
        last = max(self._step_at)
        for place in range(last + 1):
            timestep = timesteps[place]
            evaluation = _Evaluation(self, schedule, place, capture)
            sample = schedule.scale_model_input(latents, timestep)
            if place == last:
                evaluation.predict(sample, self._inputs)
            else:
                prediction = self._predict(evaluation, sample)
                more = _step_options(schedule.step)
                latents = schedule.step(prediction, timestep, latents, **more).prev_sample
            if place in self._step_at:
                maps[self._step_at[place]] = evaluation.maps
        return maps

    def _predict(self, evaluation: _Evaluation, sample: Tensor) -> Tensor:
        def predict(given: Tensor) -> Tensor:
            output = evaluation.predict(given, self._inputs)
            if self._negative_inputs is None or self._guidance_scale == 1:
                return output
            negative = evaluation.predict(given, self._negative_inputs)
            return negative + self._guidance_scale * (output - negative)

        if not (self._checkpointing and torch.is_grad_enabled()):
            return predict(sample)
        result: Tensor = checkpoint(predict, sample, use_reentrant=False)
        return result

    def call(self, sample: Tensor, timestep: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the model's prediction, without the variance that some models predict, too."""
        times = timestep.to(sample.device).expand(len(sample))
        output = self._model(sample, times, **inputs)
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        has_variance = output.shape[1] == 2 * sample.shape[1]
        prediction: Tensor = output.chunk(2, dim=1)[0] if has_variance else output
        return prediction

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model


class _Evaluation:
    """The model's calls at one place of the schedule, when checkpointing repeats them, too.

    TAR and captures find the step in :attr:`scheduler`, as they do while a pipeline samples (see
    :func:`vstar_kernels.models.schedule.running_scheduler`).

    Attributes:
        maps: What the first call gave.
    """

    def __init__(self, owner: Denoising, schedule: Any, place: int, capture: MapCapture) -> None:
        timesteps = torch.as_tensor(schedule.timesteps)
        self.scheduler = SimpleNamespace(
            timesteps=timesteps, order=getattr(schedule, "order", 1), step_index=place
        )
        self.components = {"model": owner.model}
        self.maps: list[AttentionMap] = []
        self._owner = owner
        self._timestep = timesteps[place]
        self._capture = capture

    def predict(self, sample: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        output = self._owner.call(sample, self._timestep, inputs)
        # Later calls, without the prompt or again, are not what the maps are wanted of.
        self.maps = self.maps or self._capture.maps
        self._capture.clear()
        return output


def _begun_anew(scheduler: Any) -> Any:
    """Returns a copy of a scheduler that has not begun to sample, whatever it has sampled before.

    Multistep schedulers keep the predictions of earlier steps until ``set_timesteps``.

    Raises:
        ValueError: It cannot step, or its timesteps are not those of a number of steps.
    """
    if isinstance(scheduler, NoisingSchedule):
        return scheduler
    fresh = restarted_copy(scheduler)
    name = type(scheduler).__name__
    if not hasattr(fresh, "step") or not hasattr(fresh, "set_timesteps"):
        raise ValueError(
            f"scheduler must be one of diffusers' for at_step above 0, got {name}, which has no "
            "step() and set_timesteps(): give such a scheduler, or noising="
        )
    before = torch.as_tensor(fresh.timesteps)
    fresh.set_timesteps(fresh.num_inference_steps)
    after = torch.as_tensor(fresh.timesteps)
    if before.shape != after.shape or not torch.equal(before.cpu(), after.cpu()):
        raise ValueError(
            f"scheduler: the timesteps of this {name} are not those that "
            f"set_timesteps({fresh.num_inference_steps}) gives, and at_step above 0 begins it anew"
        )
    return fresh


def _step_options(step: Callable[..., Any]) -> dict[str, Any]:
    """Returns a generator that is always the same for schedulers that draw noise at each step."""
    if "generator" not in inspect.signature(step).parameters:
        return {}
    return {"generator": torch.Generator().manual_seed(0)}
