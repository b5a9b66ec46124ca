"""What :func:`vstar_kernels.optimize_noise` minimises: the distance of maps, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import AttentionMap, Level, map_penalty
from vstar_kernels.methods.gradients import checkpointed, frozen
from vstar_kernels.methods.vstar.denoising import Denoising, Maps
from vstar_kernels.methods.vstar.noising import Noising, check_noising, noising_of
from vstar_kernels.methods.vstar.real_videos import RealVideoMaps, temporal_model
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.layers import TemporalLayer
from vstar_kernels.models.map_capture import MapCapture

References = Tensor | Mapping[Level, Tensor] | RealVideoMaps | MapCapture | Iterable[AttentionMap]


class MapObjective:
    """‖A_t^ref − A_t‖ at one denoising step t or several (VSTAR, arXiv 2403.13501, eq. 6).

    Args:
        pipe_or_model, reference_maps, inputs, at_step, negative_inputs, guidance_scale, scheduler,
        noising, max_rows, checkpointing: See :func:`vstar_kernels.optimize_noise`.
        batch, num_frames: The batch size and the number of frames of the noise.

    Raises:
        TypeError, ValueError: See :func:`vstar_kernels.optimize_noise`.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        reference_maps: References,
        inputs: Mapping[str, Any],
        *,
        batch: int,
        num_frames: int,
        at_step: int | Sequence[int] = 0,
        negative_inputs: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        scheduler: Any,
        noising: Noising | None = None,
        max_rows: int,
        checkpointing: bool,
    ) -> None:
        self.model = temporal_model(pipe_or_model)
        steps = _steps(at_step)
        own_noising = noising_of(pipe_or_model, noising)
        if max(steps) > 0:
            check_noising(self.model, own_noising)
        self._denoising = Denoising(
            pipe_or_model,
            self.model,
            inputs,
            negative_inputs=negative_inputs,
            guidance_scale=guidance_scale,
            steps=steps,
            scheduler=scheduler,
            noising=own_noising,
            checkpointing=checkpointing,
        )
        self._steps = steps
        self._max_rows = max_rows
        self._checkpointing = checkpointing
        found = _targets(reference_maps, temporal_layers(self.model), steps)
        self._targets = {
            step: {name: self._target(name, x, batch, num_frames) for name, x in targets.items()}
            for step, targets in found.items()
        }

    def _target(self, layer: str, found: Tensor, batch: int, num_frames: int) -> Tensor:
        allowed = [(num_frames, num_frames), (1, num_frames, num_frames)]
        allowed += [(batch, num_frames, num_frames)] if batch > 1 else []
        if tuple(found.shape) not in allowed:
            raise ValueError(
                f"the reference map of {layer} must have shape "
                f"{' or '.join(map(str, allowed))}, got {tuple(found.shape)}"
            )
        device = next(self.model.parameters()).device
        return found.detach().to(device=device, dtype=torch.float32)

    @torch.enable_grad()
    def distance(self, noise: Tensor) -> Tensor:
        """Returns the mean over steps, layers and batch of the Frobenius norms of A_ref − A.

        The backward pass through the model happens here already, so that neither the layers' hooks,
        which it needs, nor the model's activations outlive this call.
        """
        leaf = noise.detach().requires_grad_()
        recomputing = checkpointed(self.model) if self._checkpointing else contextlib.nullcontext()
        with self._capture(differentiable=True) as capture, frozen(self.model), recomputing:
            value = self._mean_distance(self._run(leaf, capture))
            (gradient,) = torch.autograd.grad(value, leaf)
        return _WithGradient.apply(noise, value.detach(), gradient)

    @torch.no_grad()
    def maps(self, noises: Iterable[Tensor]) -> list[AttentionMap]:
        """Returns the maps that some noises give, averaged over them."""
        means: dict[tuple[str, int], AttentionMap] = {}
        with self._capture(differentiable=False) as capture:
            for noise in noises:
                for step, maps in self._run(noise, capture).items():
                    for item in maps:
                        if (item.layer, step) in means:
                            means[item.layer, step].add(item)
                        else:
                            means[item.layer, step] = item
        return list(means.values())

    def _capture(self, *, differentiable: bool) -> MapCapture:
        names = {name for targets in self._targets.values() for name in targets}
        return capture_maps(
            self.model,
            steps=self._steps,
            layers=lambda layer: layer.name in names,
            max_rows=self._max_rows,
            differentiable=differentiable,
        )

    def _run(self, noise: Tensor, capture: MapCapture) -> Maps:
        return self._denoising.run(noise, capture)

    def _mean_distance(self, maps: Maps) -> Tensor:
        return torch.stack(
            [
                torch.stack(
                    [
                        map_penalty(item.map, self._targets[step][item.layer])
                        for item in found
                        if item.layer in self._targets[step]
                    ]
                ).mean()
                for step, found in maps.items()
            ]
        ).mean()


class _WithGradient(torch.autograd.Function):
    """Attaches a gradient that is known already to a number."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].to(gradient) * gradient, None, None


def _steps(at_step: int | Sequence[int]) -> list[int]:
    """Returns the steps of which maps are compared, in order.

    Raises:
        TypeError, ValueError: They are not indices, or there is none.
    """
    steps = [at_step] if isinstance(at_step, int) else at_step
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise TypeError(f"at_step must be a step or a list of steps, got {type(at_step).__name__}")
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"at_step must be of step indices, got {step!r}")
        if step < 0:
            raise ValueError(f"at_step must be at least 0, got {step}")
    if not steps:
        raise ValueError("at_step must name at least one step, got none")
    return sorted(set(steps))


def _targets(
    references: References, layers: list[TemporalLayer], steps: list[int]
) -> dict[int, dict[str, Tensor]]:
    """Returns the reference map of each layer that has one, by step and by the layer's name."""
    if isinstance(references, Tensor):
        # Not the block before the UNet's own, which VSTAR leaves alone.
        everywhere = {layer.name: references for layer in layers if layer.level != "init"}
        return dict.fromkeys(steps, everywhere)
    if isinstance(references, Mapping):
        levels = {layer.level for layer in layers}
        for level in references:
            if level not in levels:
                there = ", ".join(sorted(map(str, levels)))
                raise ValueError(f"reference_maps: no layer has level {level!r}, only {there}")
        by_level = {x.name: references[x.level] for x in layers if x.level in references}
        if not by_level:
            raise ValueError("reference_maps must have a level at least, got none")
        return dict.fromkeys(steps, by_level)
    found: dict[int, dict[str, Tensor]] = {step: {} for step in steps}
    names = {layer.name for layer in layers}
    for item in (
        references.maps if isinstance(references, MapCapture | RealVideoMaps) else references
    ):
        if item.layer not in names:
            raise ValueError(
                "reference_maps must be maps of this model's layers: the model has no layer "
                f"{item.layer}"
            )
        if item.step is not None and item.step not in found:
            raise ValueError(
                f"reference_maps has maps of step {item.step}, and at_step is "
                f"{', '.join(map(str, steps))}: maps are compared at the same step"
            )
        for step in steps if item.step is None else [item.step]:
            if item.layer in found[step]:
                raise ValueError(
                    f"reference_maps has several maps of {item.layer} at step {step}: keep one"
                )
            found[step][item.layer] = item.map
    for step, targets in found.items():
        if not targets:
            raise ValueError(f"reference_maps must be maps of at_step: there is no map of {step}")
    return found
