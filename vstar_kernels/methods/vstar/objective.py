"""What :func:`vstar_kernels.optimize_noise` minimises: the distance of maps, with gradients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vstar_kernels.analysis.maps import AttentionMap, Level
from vstar_kernels.methods.vstar.real_videos import (
    RealVideoMaps,
    restarted_copy,
    scheduler_of,
    step_timesteps,
    temporal_model,
)
from vstar_kernels.models.capture import MapCapture, capture_maps
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.hooks import put_back
from vstar_kernels.models.layers import TemporalLayer

References = Tensor | Mapping[Level, Tensor] | RealVideoMaps | MapCapture | Iterable[AttentionMap]


class MapObjective:
    """‖A_ref − A‖ at the first denoising step (VSTAR, arXiv 2403.13501, eq. 6).

    Args:
        pipe_or_model, reference_maps, inputs, scheduler, max_rows, checkpointing: See
            :func:`vstar_kernels.optimize_noise`.
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
        scheduler: Any,
        max_rows: int,
        checkpointing: bool,
    ) -> None:
        self.model = temporal_model(pipe_or_model)
        self._schedule = scheduler_of(pipe_or_model, scheduler)
        self._timestep = step_timesteps(self._schedule, [0])[0]
        self._inputs = inputs
        self._max_rows = max_rows
        self._checkpointing = checkpointing
        self._targets = {
            name: self._target(name, found, batch, num_frames)
            for name, found in _targets(reference_maps, temporal_layers(self.model)).items()
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
        """Returns the mean over layers and batch of the Frobenius norms of A_ref − A.

        The backward pass through the model happens here already, so that neither the layers' hooks,
        which it needs, nor the model's activations outlive this call.
        """
        leaf = noise.detach().requires_grad_()
        recomputing = checkpointed(self.model) if self._checkpointing else contextlib.nullcontext()
        with self._capture(differentiable=True) as capture, frozen(self.model), recomputing:
            self._run(leaf)
            value = self._mean_distance(capture.maps)
            (gradient,) = torch.autograd.grad(value, leaf)
        return _WithGradient.apply(noise, value.detach(), gradient)

    @torch.no_grad()
    def maps(self, noises: Iterable[Tensor]) -> list[AttentionMap]:
        """Returns the maps that some noises give, averaged over them."""
        with self._capture(differentiable=False) as capture:
            for noise in noises:
                self._run(noise)
        return capture.maps

    def _capture(self, *, differentiable: bool) -> MapCapture:
        capture = capture_maps(
            self.model,
            layers=lambda layer: layer.name in self._targets,
            max_rows=self._max_rows,
            differentiable=differentiable,
        )
        capture.step = 0
        return capture

    def _run(self, noise: Tensor) -> None:
        schedule = restarted_copy(self._schedule)
        latents = schedule.scale_model_input(noise * schedule.init_noise_sigma, self._timestep)
        times = self._timestep.to(noise.device).expand(len(noise))
        self.model(latents, times, **self._inputs)

    def _mean_distance(self, maps: list[AttentionMap]) -> Tensor:
        distances = [
            torch.linalg.matrix_norm(self._targets[item.layer] - item.map).mean() for item in maps
        ]
        return torch.stack(distances).mean()


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


def _targets(references: References, layers: list[TemporalLayer]) -> dict[str, Tensor]:
    """Returns the reference map of each layer that has one, by the layer's name."""
    if isinstance(references, Tensor):
        # Not the block before the UNet's own, which VSTAR leaves alone.
        return {layer.name: references for layer in layers if layer.level != "init"}
    if isinstance(references, Mapping):
        levels = {layer.level for layer in layers}
        for level in references:
            if level not in levels:
                there = ", ".join(sorted(map(str, levels)))
                raise ValueError(f"reference_maps: no layer has level {level!r}, only {there}")
        return {x.name: references[x.level] for x in layers if x.level in references}
    found: dict[str, Tensor] = {}
    for item in (
        references.maps if isinstance(references, MapCapture | RealVideoMaps) else references
    ):
        if item.layer in found:
            raise ValueError(f"reference_maps has several maps of {item.layer}: keep one step")
        found[item.layer] = item.map
    unknown = found.keys() - {layer.name for layer in layers}
    if unknown or not found:
        what = f"the model has no layer {min(unknown)}" if unknown else "there is no map"
        raise ValueError(f"reference_maps must be maps of this model's layers: {what}")
    return found


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Keeps others from optimising noise for the model at the same time.

    What that changes in the model (its parameters' gradients, its blocks' ``forward``) can only be
    put back in the reverse order.

    Raises:
        RuntimeError: Somebody else does so already.
    """
    lock = _LOCKS.setdefault(model, threading.Lock())
    is_ours = False
    try:
        is_ours = lock.acquire(blocking=False)
        if not is_ours:
            raise RuntimeError(
                f"noise is being optimised for this {type(model).__name__} already, in another "
                "thread: wait for that, or give each thread a model of its own"
            )
        yield
    finally:
        if is_ours:
            lock.release()


_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keeps no gradients of the model's own parameters, nor what they would need, meanwhile."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def thaw() -> None:
        for parameter in trainable:
            parameter.requires_grad_(True)

    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        put_back(thaw)


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Lets the model's blocks compute their insides again in the backward pass, to save memory.

    Few of diffusers' video models can do so by themselves (``UNet3DConditionModel`` cannot).
    """
    # What an offloading hook has put in the place of the class's own, else None.
    replaced = {block: block.__dict__.get("forward") for block in _blocks(model)}

    def restore() -> None:
        for block, before in replaced.items():
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = before

    try:
        for block in replaced:
            block.forward = _checkpointing(block.forward)
        yield
    finally:
        put_back(restore)


def _checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda: forward(*args, **kwargs), use_reentrant=False)

    return run


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields what a model runs in sequence: a UNet's resolutions, a transformer's blocks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name in ("mid_block", "middle_block"):
            yield child
