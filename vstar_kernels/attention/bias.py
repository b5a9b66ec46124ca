"""The regularization matrix Δ in its three forms, and how it enters the logits.

A bias says what is added to the scaled logits φ (VSTAR, arXiv 2403.13501, eq. 3)::

    φᵢⱼ + strength · statᵢ · Δᵢⱼ

All three forms give the same result where they describe the same matrix.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STATS = ("row_max", "map_max", "none")


@dataclass(frozen=True, eq=False)
class _Bias(ABC):
    """What the three forms share: the weight of Δ.

    ``stat`` is the row statistic:

    - ``"row_max"``: each row's largest scaled logit, as in the official code;
    - ``"map_max"``: the largest of the N × N map of each batch element, position and head, which is
      eq. 3 read literally;
    - ``"none"``: 1, an ordinary additive bias;
    - a float32 tensor of query's shape without head_dim, in units of the scaled logits.

    A negative statistic turns the regularization upside down, as in the official code;
    ``clamp_negative`` uses max(stat, 0) instead. ``detach_stat`` stops the gradient through it.
    """

    _: KW_ONLY
    strength: float = 1.0
    stat: str | Tensor = "row_max"
    clamp_negative: bool = False
    detach_stat: bool = False

    def __post_init__(self) -> None:
        _check_real(self.strength, "strength")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")
        if isinstance(self.stat, Tensor):
            if self.stat.dtype != torch.float32:
                raise ValueError(f"a stat tensor must be float32, got {self.stat.dtype}")
        elif not isinstance(self.stat, str):
            raise TypeError(f"stat must be a string or a tensor, got {type(self.stat).__name__}")
        elif self.stat not in STATS:
            raise ValueError(
                f"stat must be one of {', '.join(map(repr, STATS))} or a tensor, got {self.stat!r}"
            )

    @abstractmethod
    def matrix(self, num_frames: int) -> Tensor:
        """Δ, ``(N, N)`` or ``(heads, N, N)``: row i, the query's frame; column j, the key's."""

    def values_gradient(self, matrix_gradient: Tensor) -> Tensor:
        """The gradient of ``values`` for one of ``.matrix()``, of that one's shape."""
        raise TypeError(f"{type(self).__name__} has no values that a gradient could be for")

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors in it: Δ's ``values``, if it has them, and ``stat``, if that is one."""
        return {"stat": self.stat} if isinstance(self.stat, Tensor) else {}

    @abstractmethod
    def check(self, num_frames: int, num_heads: int) -> None:
        """Raise ValueError if Δ cannot serve this many frames and heads."""


@dataclass(frozen=True, eq=False)
class GaussianBias(_Bias):
    """Δᵢⱼ = exp(−(j−i)²/2σ²), VSTAR's (eq. 2).

    Args:
        sigma: Standard deviation σ ≥ 0 in frames; 0 gives the identity.
        strength, stat, clamp_negative, detach_stat: How Δ is weighted; see the module.
    """

    sigma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_real(self.sigma, "sigma")
        if not self.sigma >= 0:
            raise ValueError(f"sigma must be at least 0 (frames), got {self.sigma}")

    def matrix(self, num_frames: int) -> Tensor:
        return _from_table(gaussian_table(float(self.sigma), num_frames), num_frames)

    def check(self, num_frames: int, num_heads: int) -> None:
        """It serves any number of both."""


@dataclass(frozen=True, eq=False)
class ToeplitzBias(_Bias):
    """Δᵢⱼ from a table over the distance of two frames.

    Args:
        values: ``(L,)`` or ``(heads, L)`` over |j−i| = 0 … L−1, for up to L frames; with
            ``signed``, an odd length 2L−1 over j−i = −(L−1) … L−1. Floating point.
        signed: Whether the table tells j−i from i−j.
        strength, stat, clamp_negative, detach_stat: How Δ is weighted; see the module.
    """

    values: Tensor
    _: KW_ONLY
    signed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor(self.values, "values", dims=(1, 2), shape="(L,) or (heads, L)")
        if self.values.shape[-1] == 0:
            raise ValueError("values must hold at least one distance, got an empty table")
        if self.signed and self.values.shape[-1] % 2 == 0:
            raise ValueError(
                "a signed table has an odd length, -(L-1) to L-1, "
                f"got values of length {self.values.shape[-1]}"
            )

    @property
    def max_frames(self) -> int:
        """L: how many frames the table reaches."""
        length = self.values.shape[-1]
        return (length + 1) // 2 if self.signed else length

    def named_tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, **super().named_tensors()}

    def signed_table(self) -> Tensor:
        """The table over j−i = −(L−1) … L−1, ``(2L−1,)`` or ``(heads, 2L−1)``."""
        if self.signed:
            return self.values
        return torch.cat([self.values[..., 1:].flip(-1), self.values], dim=-1)

    def matrix(self, num_frames: int) -> Tensor:
        return _from_table(self.signed_table(), num_frames)

    def values_gradient(self, matrix_gradient: Tensor) -> Tensor:
        return self.table_gradient(_diagonal_sums(matrix_gradient))

    def table_gradient(self, signed_gradient: Tensor) -> Tensor:
        """The gradient of ``values`` for one of a signed table that may reach fewer frames."""
        missing = self.max_frames - (signed_gradient.shape[-1] + 1) // 2
        gradient = F.pad(signed_gradient, (missing, missing))
        if not self.signed:
            centre = self.max_frames - 1
            mirrored = F.pad(gradient[..., :centre].flip(-1), (1, 0))
            gradient = gradient[..., centre:] + mirrored
        return gradient.to(self.values)

    def check(self, num_frames: int, num_heads: int) -> None:
        _check_heads(self.values, 1, num_heads, "values")
        if num_frames > self.max_frames:
            raise ValueError(
                f"the table of ToeplitzBias reaches {self.max_frames} frames "
                f"(values of shape {tuple(self.values.shape)}, signed={self.signed}), "
                f"query has {num_frames}"
            )


@dataclass(frozen=True, eq=False)
class DenseBias(_Bias):
    """Any Δ, such as the inter-frame similarity of a reference video (dynamics transfer, Fig. 8).

    Args:
        values: ``(N, N)`` or ``(heads, N, N)``, floating point: row i, the query's frame;
            column j, the key's.
        strength, stat, clamp_negative, detach_stat: How Δ is weighted; see the module.
    """

    values: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor(self.values, "values", dims=(2, 3), shape="(N, N) or (heads, N, N)")
        rows, columns = self.values.shape[-2:]
        if rows != columns:
            raise ValueError(f"values must be square, got shape {tuple(self.values.shape)}")

    def named_tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, **super().named_tensors()}

    def matrix(self, num_frames: int) -> Tensor:
        self._check_frames(num_frames)
        return self.values

    def values_gradient(self, matrix_gradient: Tensor) -> Tensor:
        return matrix_gradient.to(self.values)

    def check(self, num_frames: int, num_heads: int) -> None:
        _check_heads(self.values, 2, num_heads, "values")
        self._check_frames(num_frames)

    def _check_frames(self, num_frames: int) -> None:
        if self.values.shape[-1] != num_frames:
            raise ValueError(
                f"the matrix of DenseBias is for {self.values.shape[-1]} frames, "
                f"asked for {num_frames}"
            )


Bias = GaussianBias | ToeplitzBias | DenseBias


@functools.lru_cache(maxsize=64)
def gaussian_table(sigma: float, num_frames: int) -> Tensor:
    """Δ over j−i = −(N−1) … N−1 in float32, on the CPU, to be read only.

    Values below float32's normal range are zero: a subnormal operand can cost a hundred cycles.
    """
    distance = torch.arange(num_frames, dtype=torch.float64)
    half = torch.ones(num_frames, dtype=torch.float64)
    # Divided before it is squared: σ² leaves the range of floating point long before σ does.
    half[1:] = torch.exp(-0.5 * (distance[1:] / sigma) ** 2) if sigma > 0 else 0.0
    half[half < torch.finfo(torch.float32).tiny] = 0.0
    return torch.cat([half[1:].flip(0), half]).float()


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """Sums over j−i = −(N−1) … N−1, ``(…, 2N−1)``, always in the same order."""
    frames = matrix.shape[-1]
    # Rows of 2N numbers read as rows of 2N − 1: each begins one column further to the right.
    skewed = F.pad(matrix.flip(-1), (0, frames)).flatten(-2)[..., :-frames]
    return skewed.unflatten(-1, (frames, 2 * frames - 1)).sum(-2).flip(-1)


def _from_table(signed_table: Tensor, num_frames: int) -> Tensor:
    frame = torch.arange(num_frames, device=signed_table.device)
    centre = signed_table.shape[-1] // 2
    return signed_table[..., centre + frame[None, :] - frame[:, None]]


def _check_real(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_tensor(value: Tensor, name: str, dims: tuple[int, ...], shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def _check_heads(value: Tensor, dims_per_head: int, num_heads: int, name: str) -> None:
    if value.ndim > dims_per_head and value.shape[0] != num_heads:
        raise ValueError(
            f"{name} has {value.shape[0]} heads (shape {tuple(value.shape)}), query has {num_heads}"
        )
