"""The noise prior: Gaussian noise that is correlated over frames (VSTAR, App. B, eqs. 5 and 7)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...] | torch.Size


@dataclass(frozen=True, eq=False)
class NoisePrior:
    """N(μ, Σ) for a video's initial latents: each pixel's frames are drawn with the covariance

        Σᵢⱼ = γ^|i−j|, and β on the diagonal   (VSTAR, arXiv 2403.13501, eq. 5)

    >>> prior = vk.NoisePrior(gamma=0.3)
    >>> video = pipe(prompt, num_frames=16, latents=prior.sample((1, 4, 16, 40, 64))).frames

    Args:
        beta: β, the variance; 1 by default.
        gamma: γ, the correlation of neighbouring frames where β is 1; 0 by default, white noise.
        mean: μ, a number or a tensor that broadcasts to a video's latents.

    Raises:
        ValueError: β or γ is not finite. Where they are used: Σ is not positive definite for that
            many frames.
    """

    beta: float = 1.0
    gamma: float = 0.0
    mean: float | Tensor = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")

    def covariance(self, num_frames: int) -> Tensor:
        """Returns Σ, ``(frames, frames)`` in float64.

        Raises:
            ValueError: It is not positive definite.
        """
        _cholesky(num_frames, self.beta, self.gamma)
        return _covariance(num_frames, self.beta, self.gamma)

    def sample(
        self,
        shape: Shape,
        *,
        generator: torch.Generator | None = None,
        frame_dim: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draws latents, in time linear in the frames where β ≥ 1 and \\|γ\\| ≤ 1.

        There, the noise is an autoregressive process, plus white noise of variance β − 1. Elsewhere
        it is white noise times Σ's Cholesky factor, which is kept.

        Args:
            shape: Of the latents; ``(batch, channels, frames, height, width)`` in diffusers.
            generator: Random numbers are drawn on its device, then moved.
            frame_dim: Which dimension the frames are; 1 for Stable Video Diffusion.
            device, dtype: Of the result. It is computed in at least float32.

        Raises:
            ValueError: Σ is not positive definite.
        """
        like = torch.empty(0, device=device, dtype=torch.promote_types(dtype, torch.float32))
        noise = standard_normal(shape, generator, like)
        if abs(self.gamma) <= 1 < self.beta or (self.beta == 1 and abs(self.gamma) < 1):
            _autoregress(noise.movedim(frame_dim, 0), self.gamma)
            if self.beta > 1:
                noise += math.sqrt(self.beta - 1) * standard_normal(shape, generator, like)
        else:
            factor = _cholesky(shape[frame_dim], self.beta, self.gamma)
            noise = _mix_frames(factor, noise, frame_dim)
        return (self._mean_like(noise) + noise).to(dtype)

    def kl(self, num_frames: int) -> float:
        """Returns KL(N(μ, Σ) ‖ N(0, I)); see :func:`kl_to_standard_normal`.

        Raises:
            ValueError: Σ is not positive definite.
        """
        mean, beta, gamma = (
            torch.as_tensor(value, dtype=torch.float64, device="cpu")
            for value in (self.mean, self.beta, self.gamma)
        )
        return float(kl_to_standard_normal(mean, beta, gamma, num_frames))

    def _mean_like(self, noise: Tensor) -> Tensor | float:
        return self.mean.to(noise) if isinstance(self.mean, Tensor) else self.mean


def correlate(
    standard: Tensor, mean: Tensor, beta: Tensor, gamma: Tensor, *, frame_dim: int = 2
) -> Tensor:
    """Returns μ + L·standard with L·Lᵀ = Σ, a sample of N(μ, Σ) with gradients to μ, β and γ.

    Args:
        standard: Standard normal latents.
        mean: μ; broadcasts to the latents.
        beta, gamma: Of eq. 5; tensors of one number, best in float64.
        frame_dim: Which dimension of ``standard`` the frames are.

    Raises:
        ValueError: Σ is not positive definite.
    """
    factor = _checked_cholesky(_covariance(standard.shape[frame_dim], beta, gamma), beta, gamma)
    return mean.to(standard) + _mix_frames(factor, standard, frame_dim)


def kl_to_standard_normal(mean: Tensor, beta: Tensor, gamma: Tensor, num_frames: int) -> Tensor:
    """Returns KL(N(μ, Σ) ‖ N(0, I)) over the frames of one pixel of one channel, in nats (eq. 7)::

        ½ (tr Σ + μᵀμ − N − ln det Σ)

    averaged over the pixels and channels of μ, so that it does not grow with the resolution.

    Args:
        mean: μ, of any shape whose every element stands for equally many latents.
        beta, gamma: Of eq. 5; tensors of one number.
        num_frames: N.

    Raises:
        ValueError: Σ is not positive definite.
    """
    factor = _checked_cholesky(_covariance(num_frames, beta, gamma), beta, gamma)
    log_determinant = 2 * factor.diagonal().log().sum()
    trace = num_frames * beta
    square = num_frames * mean.square().mean().to(factor)
    return (trace + square - num_frames - log_determinant) / 2


def min_stable_beta(gamma: float) -> float:
    """Returns the β from which on Σ is positive definite for any number of frames, if \\|γ\\| < 1.

    The eigenvalues of an autoregressive process's covariance are above its least spectral density,
    (1 − |γ|)/(1 + |γ|); Σ adds β − 1.
    """
    return 2 * abs(gamma) / (1 + abs(gamma))


def standard_normal(shape: Shape, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Draws standard normal numbers in float32 where the generator is, like ``like`` in the end."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return drawn.to(like)


def _autoregress(frames: Tensor, gamma: float) -> None:
    """Turns white noise, frames first, into x₀ = e₀, xₜ = γ xₜ₋₁ + √(1−γ²) eₜ in its place."""
    innovation = math.sqrt(1 - gamma * gamma)
    for frame in range(1, len(frames)):
        frames[frame].mul_(innovation).add_(frames[frame - 1], alpha=gamma)


def _mix_frames(factor: Tensor, noise: Tensor, frame_dim: int) -> Tensor:
    mixed = torch.tensordot(factor.to(noise), noise, dims=([1], [frame_dim]))
    return mixed.movedim(0, frame_dim)


def _covariance(num_frames: int, beta: float | Tensor, gamma: float | Tensor) -> Tensor:
    variance, correlation = (torch.as_tensor(x, dtype=torch.float64) for x in (beta, gamma))
    frame = torch.arange(num_frames, dtype=torch.float64, device=correlation.device)
    distance = (frame[:, None] - frame).abs()
    return torch.where(distance == 0, variance, correlation**distance)


@functools.lru_cache(maxsize=16)
def _cholesky(num_frames: int, beta: float, gamma: float) -> Tensor:
    """Returns Σ's Cholesky factor, which is kept: it is to be read only."""
    return _checked_cholesky(_covariance(num_frames, beta, gamma), beta, gamma)


def _checked_cholesky(covariance: Tensor, beta: float | Tensor, gamma: float | Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info == 0 and factor.isfinite().all():
        return factor
    beta, gamma = float(beta), float(gamma)
    message = (
        f"beta={beta:g} and gamma={gamma:g} give no positive definite covariance over "
        f"{len(covariance)} frames"
    )
    if covariance.isfinite().all():
        smallest = float(torch.linalg.eigvalsh(covariance.detach())[0])
        message += (
            f": its smallest eigenvalue is {smallest:.3g}; with this gamma, beta must be above "
            f"{beta - smallest:.6g}"
        )
    raise ValueError(message)
