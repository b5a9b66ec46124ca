"""Initial noise whose attention maps are like a real video's (VSTAR, App. B, eqs. 6 to 8)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import AttentionMap
from vstar_kernels.methods.gradients import exclusive
from vstar_kernels.methods.vstar.noise import (
    NoisePrior,
    Shape,
    correlate,
    kl_to_standard_normal,
    min_stable_beta,
    standard_normal,
)
from vstar_kernels.methods.vstar.noising import Noising
from vstar_kernels.methods.vstar.objective import MapObjective, References

MARGIN = 1e-3  # of β above its least, and of |γ| below 1


@dataclass(frozen=True)
class NoiseLoss:
    """The loss of one iteration, ``total`` = ``distance`` + λ · ``kl``.

    Attributes:
        distance: ‖A_ref − A‖, the mean of the Frobenius norms over steps, layers, batch and draws.
        kl: In nats, per pixel of each channel.
    """

    total: float
    distance: float
    kl: float


@dataclass(frozen=True, eq=False)
class OptimizedNoise:
    """What :func:`optimize_noise` found.

    Attributes:
        prior: The best μ, β and γ; ``prior.sample(shape)`` draws more.
        noise: The noise that they make of the draws that were optimised with, standardised as
            pipelines take ``latents``: ``(draws × batch, …)``.
        maps: The attention maps of that noise at ``at_step``, averaged over the draws.
        losses: The loss of each iteration; the first one is before any change.
        best: The iteration that has the lowest loss, which all this is of.
        stopped_early: Whether the loss had ceased to fall.
    """

    prior: NoisePrior
    noise: Tensor
    maps: list[AttentionMap]
    losses: list[NoiseLoss]
    best: int
    stopped_early: bool


@torch.enable_grad()
def optimize_noise(
    pipe_or_model: Any,
    reference_maps: References,
    shape: Shape,
    inputs: Mapping[str, Any],
    *,
    at_step: int | Sequence[int] = 0,
    negative_inputs: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    kl_weight: float = 0.01,
    mean: Literal["element", "frame"] = "element",
    initial: NoisePrior | None = None,
    iterations: int = 100,
    learning_rate: float = 0.01,
    patience: int | None = 10,
    tolerance: float = 1e-3,
    draws: int = 1,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
    noising: Noising | None = None,
    frame_dim: int = 2,
    max_rows: int = 256,
    checkpointing: bool = True,
    progress: bool = True,
) -> OptimizedNoise:
    """Finds a noise distribution from which the model attends over frames as it is shown to.

    Minimises (VSTAR, arXiv 2403.13501, App. B, eq. 8) over μ, β and γ, by Adam::

        ‖A_t^ref − A_t(x)‖ + λ · KL(N(μ, Σ(β, γ)) ‖ N(0, I)),   x ~ N(μ, Σ(β, γ))

    A_t are the model's mean temporal attention maps at the denoising step t, ``at_step``, which
    sampling reaches from the noise x, through TAR and per-frame prompts where they are applied. The
    gradient goes through all steps from there back to x. The model's parameters are left alone.

    >>> real = vk.capture_real_maps(pipe, latents, inputs, steps=[2])
    >>> with vk.apply_tar(pipe, "64D1"):
    ...     found = vk.optimize_noise(pipe, real, (1, 4, 16, 40, 64), inputs, at_step=2)
    ...     video = pipe(prompt, num_frames=16, latents=found.noise).frames

    Memory: the model's activations between its blocks and those within one block, whatever the
    number of draws; each step before adds its latents, a few times. Time: an iteration runs step t
    twice forward and once backward, and each step before it three times forward and once backward,
    twice that under guidance.

    Args:
        pipe_or_model: A pipeline with one model that has temporal attention, or that model; of
            ``lvdm`` the ``LatentDiffusion``, which knows its noising and what it predicts.
        reference_maps: A_t^ref: maps captured from this model at the steps ``at_step``, one of each
            layer and step (those layers count); or ``(frames, frames)`` or
            ``(batch, frames, frames)`` for all layers of the UNet's levels, or by level.
        shape: Of the latents, as the model takes them; ``(batch, channels, frames, height, width)``
            in diffusers.
        inputs: Whatever else the model takes, by name: its text embeddings, for one.
        at_step: t, an index into the scheduler's schedule, 0 the noisiest; or several, over which
            the distance is averaged. Schedulers that draw noise draw the same each time.
        negative_inputs: As ``inputs``, without the prompt, for classifier-free guidance in the
            steps before t. The maps that are compared are those with the prompt.
        guidance_scale: How much the prompt counts there; 1 is no guidance.
        kl_weight: λ.
        mean: Whether μ has a value for each element of a video's latents or for each frame only.
        initial: Where to begin; N(0, I) if None.
        iterations: At most.
        learning_rate: Adam's.
        patience: Stop after so many iterations in a row in which the loss has not fallen by
            ``tolerance`` of its lowest value; None never stops early.
        tolerance: See ``patience``.
        draws: Over how many draws the distance is averaged. They stay the same, so that the loss
            is a smooth function of μ, β and γ.
        generator: Of the draws.
        scheduler: Gives the timesteps, the noise levels and the steps between them; None is the
            pipeline's own. With a noising of the model's own or of yours, anything with
            ``timesteps``, the noisiest first.
        noising: As for :func:`vstar_kernels.capture_real_maps`, and linear: steps before t are then
            deterministic DDIM's between its levels, from N(0, I), and the model must predict the
            noise or the clean latents. None is the model's own (``lvdm``), or else the scheduler's.
        frame_dim: Which dimension of ``shape`` the frames are; 1 for Stable Video Diffusion.
        max_rows: See :func:`vstar_kernels.capture_maps`.
        checkpointing: Compute each block of the model, and each step before t, again in the
            backward pass to save memory.
        progress: Show a bar; needs ``tqdm``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range, the maps do not fit the model or the shape, or
            they are of another step.
        FloatingPointError: The loss is not finite.
        RuntimeError: Another thread takes gradients through the model.
        ImportError: ``progress`` without ``tqdm``.
    """
    _check(mean, kl_weight, iterations, learning_rate, patience, draws)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if (negative_inputs is None) != (guidance_scale == 1):
        raise ValueError(
            "negative_inputs and a guidance_scale other than 1 must be given together, got "
            f"guidance_scale {guidance_scale} and "
            + ("no negative_inputs" if negative_inputs is None else "negative_inputs")
        )
    objective = MapObjective(
        pipe_or_model,
        reference_maps,
        inputs,
        batch=shape[0],
        num_frames=shape[frame_dim],
        at_step=at_step,
        negative_inputs=negative_inputs,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        noising=noising,
        max_rows=max_rows,
        checkpointing=checkpointing,
    )
    like = next(objective.model.parameters())
    standard = [standard_normal(shape, generator, like.detach()) for _ in range(draws)]
    distribution = Distribution(initial or NoisePrior(), shape, frame_dim, mean, like)
    adam = torch.optim.Adam(distribution.parameters, lr=learning_rate)
    descent = Descent(patience, tolerance)
    with exclusive(objective.model):
        for _ in _progress(iterations, descent, progress):
            adam.zero_grad()
            loss = _backward(objective, distribution, standard, kl_weight)
            if descent.record(loss, distribution):
                break
            adam.step()
            distribution.project()
        assert descent.prior is not None  # there is at least one iteration
        distribution = Distribution(descent.prior, shape, frame_dim, mean, like)
        with torch.no_grad():
            noises = [distribution.transform(x) for x in standard]
        maps = objective.maps(noises)
    return OptimizedNoise(
        descent.prior,
        torch.cat(noises),
        maps,
        descent.losses,
        descent.best,
        descent.stopped,
    )


def _backward(
    objective: MapObjective, distribution: Distribution, standard: list[Tensor], weight: float
) -> NoiseLoss:
    """Computes the loss and its gradients, one draw after the other so that memory is for one."""
    distance = 0.0
    for numbers in standard:
        scaled = objective.distance(distribution.transform(numbers)) / len(standard)
        scaled.backward()
        distance += float(scaled.detach())
    divergence = distribution.kl()
    (weight * divergence).backward()
    kl = float(divergence.detach())
    return NoiseLoss(distance + weight * kl, distance, kl)


class Distribution:
    """The parameters that are optimised: μ, β and γ.

    β and γ are in float64 on the CPU, as Σ is small.
    """

    def __init__(
        self, initial: NoisePrior, shape: Shape, frame_dim: int, mean: str, like: Tensor
    ) -> None:
        mean_shape = [1, *shape[1:]]
        if mean == "frame":
            mean_shape = [size if dim == frame_dim else 1 for dim, size in enumerate(shape)]
        start = torch.as_tensor(initial.mean, dtype=torch.float32, device=like.device)
        try:
            expanded = start.expand(mean_shape)
        except RuntimeError:
            raise ValueError(
                f"initial's mean must broadcast to {tuple(mean_shape)} (mean={mean!r}), got shape "
                f"{tuple(start.shape)}"
            ) from None
        self.mean = expanded.clone().requires_grad_()
        self.beta, self.gamma = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for value in (initial.beta, initial.gamma)
        )
        self._num_frames, self._frame_dim = shape[frame_dim], frame_dim

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser changes."""
        return [self.mean, self.beta, self.gamma]

    def transform(self, standard: Tensor) -> Tensor:
        """Returns the sample that standard normal numbers become under these parameters."""
        return correlate(standard, self.mean, self.beta, self.gamma, frame_dim=self._frame_dim)

    def kl(self) -> Tensor:
        """Returns the divergence from N(0, I); see :func:`kl_to_standard_normal`."""
        return kl_to_standard_normal(self.mean, self.beta, self.gamma, self._num_frames)

    @torch.no_grad()
    def project(self) -> None:
        """Moves β and γ to where Σ is positive definite for any number of frames."""
        self.gamma.clamp_(MARGIN - 1, 1 - MARGIN)
        self.beta.clamp_(min=min_stable_beta(float(self.gamma)) + MARGIN)

    def prior(self) -> NoisePrior:
        """Returns a copy of the parameters as they are now."""
        return NoisePrior(self.beta.item(), self.gamma.item(), self.mean.detach().clone())


class Descent:
    """Keeps the losses and the best parameters, and says when the loss has ceased to fall."""

    def __init__(self, patience: int | None, tolerance: float) -> None:
        self.losses: list[NoiseLoss] = []
        self.best = 0
        self.prior: NoisePrior | None = None
        self.stopped = False
        self._patience, self._tolerance = patience, tolerance
        self._last_improvement: float | None = None  # the loss then
        self._iterations_since = 0

    def record(self, loss: NoiseLoss, distribution: Distribution) -> bool:
        """Records the loss of an iteration and returns whether to stop.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        self.losses.append(loss)
        if not math.isfinite(loss.total):
            raise FloatingPointError(
                f"the loss of iteration {len(self.losses) - 1} is {loss.total}: try a lower "
                "learning_rate, or float32 instead of a 16-bit type"
            )
        if self.prior is None or loss.total < self.losses[self.best].total:
            self.best, self.prior = len(self.losses) - 1, distribution.prior()
        last = self._last_improvement
        if last is None or loss.total < last - self._tolerance * abs(last):
            self._last_improvement, self._iterations_since = loss.total, 0
        else:
            self._iterations_since += 1
        self.stopped = self._patience is not None and self._iterations_since >= self._patience
        return self.stopped


def _progress(iterations: int, descent: Descent, show: bool) -> Iterator[int]:
    """Yields the iterations' numbers, with a bar that shows the last loss."""
    if not show:
        yield from range(iterations)
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: install it, or give progress=False") from error
    with tqdm(total=iterations, desc="optimize_noise", unit="iteration") as bar:
        for iteration in range(iterations):
            yield iteration
            bar.update()
            bar.set_postfix(loss=f"{descent.losses[-1].total:.4g}")


def _check(
    mean: str,
    kl_weight: float,
    iterations: int,
    learning_rate: float,
    patience: int | None,
    draws: int,
) -> None:
    if mean not in ("element", "frame"):
        raise ValueError(f'mean must be "element" or "frame", got {mean!r}')
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be at least 0, got {kl_weight}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    for name, value in (("iterations", iterations), ("draws", draws), ("patience", patience)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
