"""How :func:`vstar_kernels.optimize_noise` keeps its parameters, and when it stops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vstar_kernels.methods.vstar.noise import (
    NoisePrior,
    Shape,
    correlate,
    kl_to_standard_normal,
    least_beta,
)

MARGIN = 1e-3  # of β above its least, and of |γ| below 1


@dataclass(frozen=True)
class NoiseLoss:
    """The loss of one iteration: ``total`` = ``distance`` + λ · ``kl``.

    Attributes:
        distance: ‖A_ref − A‖, the mean of the Frobenius norms over layers, batch and draws.
        kl: In nats, per pixel of each channel.
    """

    total: float
    distance: float
    kl: float


class Distribution:
    """μ, β and γ as they are optimised; β and γ in float64 on the CPU, as small as Σ is."""

    def __init__(
        self, initial: NoisePrior, shape: Shape, frame_dim: int, mean: str, like: Tensor
    ) -> None:
        own_shape = [1, *shape[1:]]
        if mean == "frame":
            own_shape = [n if dim == frame_dim else 1 for dim, n in enumerate(shape)]
        start = torch.as_tensor(initial.mean, dtype=torch.float32, device=like.device)
        if start.ndim > len(own_shape) or any(
            n not in (1, own)
            for n, own in zip(reversed(start.shape), reversed(own_shape), strict=False)
        ):
            raise ValueError(
                f"initial's mean must broadcast to {tuple(own_shape)} (mean={mean!r}), got shape "
                f"{tuple(start.shape)}"
            )
        self.mean = start.expand(own_shape).clone().requires_grad_()
        self.beta, self.gamma = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for value in (initial.beta, initial.gamma)
        )
        self._num_frames, self._frame_dim = shape[frame_dim], frame_dim

    @property
    def parameters(self) -> list[Tensor]:
        return [self.mean, self.beta, self.gamma]

    def transform(self, standard: Tensor) -> Tensor:
        return correlate(standard, self.mean, self.beta, self.gamma, frame_dim=self._frame_dim)

    def kl(self) -> Tensor:
        return kl_to_standard_normal(self.mean, self.beta, self.gamma, self._num_frames)

    @torch.no_grad()
    def project(self) -> None:
        """Back to where Σ is positive definite for any number of frames."""
        self.gamma.clamp_(MARGIN - 1, 1 - MARGIN)
        self.beta.clamp_(min=least_beta(float(self.gamma)) + MARGIN)

    def prior(self) -> NoisePrior:
        return NoisePrior(self.beta.item(), self.gamma.item(), self.mean.detach().clone())


class Descent:
    """The losses so far, the best parameters, and whether it goes on."""

    def __init__(self, patience: int | None, tolerance: float) -> None:
        self.losses: list[NoiseLoss] = []
        self.best = 0
        self.prior: NoisePrior | None = None
        self.stopped = False
        self._patience, self._tolerance = patience, tolerance
        self._mark: float | None = None  # the last loss that was a real improvement
        self._since = 0

    def record(self, loss: NoiseLoss, distribution: Distribution) -> bool:
        """Take in an iteration's loss; whether to stop."""
        self.losses.append(loss)
        if not math.isfinite(loss.total):
            raise FloatingPointError(
                f"the loss of iteration {len(self.losses) - 1} is {loss.total}: try a lower "
                "learning_rate, or float32 instead of a 16-bit type"
            )
        if self.prior is None or loss.total < self.losses[self.best].total:
            self.best, self.prior = len(self.losses) - 1, distribution.prior()
        if self._mark is None or loss.total < self._mark - self._tolerance * abs(self._mark):
            self._mark, self._since = loss.total, 0
        else:
            self._since += 1
        self.stopped = self._patience is not None and self._since >= self._patience
        return self.stopped
