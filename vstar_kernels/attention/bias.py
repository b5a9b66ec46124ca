"""The regularization matrix Δ in its three forms, and how it enters the logits.

A bias says what is added to the scaled logits φ (VSTAR, arXiv 2403.13501, eq. 3)::

    φᵢⱼ + strength · statᵢ · Δᵢⱼ

All three forms give the same result where they describe the same matrix. The backend "cpu" takes
entries below float32's normal range as zero: each would cost a hundred cycles.
"""

from __future__ import annotations

import array
import functools
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_FRAMES = 2**31 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max
STATS = ("row_max", "map_max", "none")
# How Δ's entries are held: not at all, by σ, in a table over |j−i| or over j−i, in a matrix.
FORMS = ("none", "gaussian", "symmetric", "signed", "dense")
MANY_SIGMAS = 1e3  # a distance at which a Gaussian is zero, and whose square is a number


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
        check_finite(self.strength, "strength")
        check_flag(self.clamp_negative, "clamp_negative")
        check_flag(self.detach_stat, "detach_stat")
        if isinstance(self.stat, Tensor):
            check_strided(self.stat, "a stat tensor")
            if self.stat.dtype != torch.float32:
                raise ValueError(f"a stat tensor must be float32, got {self.stat.dtype}")
        elif not isinstance(self.stat, str):
            raise TypeError(f"stat must be a string or a tensor, got {type(self.stat).__name__}")
        elif self.stat not in STATS:
            raise ValueError(
                f"stat must be one of {', '.join(map(repr, STATS))} or a tensor, got {self.stat!r}"
            )

    @property
    def fixed(self) -> tuple[str, float, float, str, bool, bool]:
        """All that it says but its tensors: the first fields of ``call.Options``."""
        stat = "tensor" if isinstance(self.stat, Tensor) else self.stat
        weight = float(self.strength), stat, self.clamp_negative, self.detach_stat
        return self.form, self._sigma, *weight

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, float, float, str, bool, bool], tuple[Tensor, ...]]:
        """``fixed`` and the tensors, Δ's entries first; torch.compile could not trace this."""
        return self.fixed, tuple(x for x in (self.entries, self.stat) if isinstance(x, Tensor))

    @property
    def _sigma(self) -> float:
        """The Gaussian's; 0 for the other forms."""
        return 0.0

    @property
    @abstractmethod
    def form(self) -> str:
        """Which of ``FORMS`` Δ is held in."""

    @property
    @abstractmethod
    def entries(self) -> Tensor | None:
        """Δ's entries, a table or a matrix; None of a Gaussian."""

    @abstractmethod
    def matrix(self, num_frames: int) -> Tensor:
        """Returns Δ, ``(N, N)`` or ``(heads, N, N)``; rows are queries' frames, columns keys'."""

    @abstractmethod
    def check(self, num_frames: int, num_heads: int) -> None:
        """Raises ValueError if Δ cannot serve this many frames and heads."""


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
            raise ValueError(f"sigma must be at least 0 (frames), got {shown(self.sigma)}")
        if isinstance(self.sigma, int) and self.sigma > sys.float_info.max:
            raise ValueError(f"sigma must fit a float, got {shown(self.sigma)}")

    @property
    def form(self) -> str:
        return "gaussian"

    @property
    def _sigma(self) -> float:
        return float(self.sigma)

    @property
    def entries(self) -> None:
        return None

    def matrix(self, num_frames: int) -> Tensor:
        _check_count(num_frames)
        return matrix(self.form, float(self.sigma), None, num_frames)

    def check(self, num_frames: int, num_heads: int) -> None:
        """A Gaussian serves any number of frames and heads."""


@dataclass(frozen=True, eq=False)
class ToeplitzBias(_Bias):
    """Δᵢⱼ from a table over the distance of two frames.

    Args:
        table: ``(L,)`` or ``(heads, L)`` over |j−i| = 0 … L−1, for up to L frames; with
            ``signed``, an odd length 2L−1 over j−i = −(L−1) … L−1. Floating point.
        signed: Whether the table tells j−i from i−j.
        strength, stat, clamp_negative, detach_stat: How Δ is weighted; see the module.
    """

    table: Tensor
    _: KW_ONLY
    signed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.signed, "signed")
        _check_tensor(self.table, "table", dims=(1, 2), shape="(L,) or (heads, L)")
        if self.table.shape[-1] == 0:
            raise ValueError("table must hold at least one distance, got an empty one")
        if self.signed and self.table.shape[-1] % 2 == 0:
            raise ValueError(
                "a signed table has an odd length, -(L-1) to L-1, "
                f"got a table of length {self.table.shape[-1]}"
            )

    @property
    def form(self) -> str:
        return "signed" if self.signed else "symmetric"

    @property
    def entries(self) -> Tensor:
        return self.table

    def matrix(self, num_frames: int) -> Tensor:
        _check_count(num_frames)
        self._check_frames(num_frames)
        return matrix(self.form, 0.0, self.table, num_frames)

    def check(self, num_frames: int, num_heads: int) -> None:
        _check_heads(self.table, 1, num_heads, "table")
        self._check_frames(num_frames)

    def _check_frames(self, num_frames: int) -> None:
        max_frames = table_frames(self.form, self.table)
        if num_frames > max_frames:
            raise ValueError(
                f"the table of ToeplitzBias reaches {max_frames} frames "
                f"(table of shape {tuple(self.table.shape)}, signed={self.signed}), "
                f"asked for {num_frames}"
            )


@dataclass(frozen=True, eq=False)
class DenseBias(_Bias):
    """Any Δ, such as the inter-frame similarity of a reference video (dynamics transfer, Fig. 8).

    Args:
        delta: ``(N, N)`` or ``(heads, N, N)``, floating point: row i, the query's frame;
            column j, the key's. The backend "cpu" copies it in every call, "triton" where the
            entries of a row are not side by side.
        strength, stat, clamp_negative, detach_stat: How Δ is weighted; see the module.
    """

    delta: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor(self.delta, "delta", dims=(2, 3), shape="(N, N) or (heads, N, N)")
        rows, columns = self.delta.shape[-2:]
        if rows != columns:
            raise ValueError(f"delta must be square, got shape {tuple(self.delta.shape)}")

    @property
    def form(self) -> str:
        return "dense"

    @property
    def entries(self) -> Tensor:
        return self.delta

    def matrix(self, num_frames: int) -> Tensor:
        _check_count(num_frames)
        self._check_frames(num_frames)
        return self.delta

    def check(self, num_frames: int, num_heads: int) -> None:
        _check_heads(self.delta, 2, num_heads, "delta")
        self._check_frames(num_frames)

    def _check_frames(self, num_frames: int) -> None:
        if self.delta.shape[-1] != num_frames:
            raise ValueError(
                f"the matrix of DenseBias is for {self.delta.shape[-1]} frames, "
                f"asked for {num_frames}"
            )


Bias = GaussianBias | ToeplitzBias | DenseBias


# ---- the layouts of Δ's entries, for the backends ----


def dims(form: str) -> int:
    """Returns the number of dimensions that Δ's entries have where all heads share them."""
    return 2 if form == "dense" else 1


def matrix(form: str, sigma: float, entries: Tensor | None, num_frames: int) -> Tensor:
    """Returns the matrix Δ, ``(N, N)`` or ``(heads, N, N)``, that entries of a form stand for."""
    if form == "gaussian":
        table = _gaussian_table(sigma, num_frames)
    else:
        assert entries is not None  # the other forms that have a Δ hold it
        if form == "dense":
            return entries
        table = signed_table(form, entries)
    frame = torch.arange(num_frames, device=table.device)
    centre = table.shape[-1] // 2
    return table[..., centre + frame[None, :] - frame[:, None]]


def entries_gradient(form: str, entries: Tensor, matrix_gradient: Tensor) -> Tensor:
    """Returns the gradient of Δ's entries for one of its matrix, which has that one's shape."""
    if form == "dense":
        return matrix_gradient.to(entries)
    return table_gradient(form, entries, _diagonal_sums(matrix_gradient))


def gaussian_table(sigma: float, num_frames: int) -> Tensor:
    """Returns Δ over j−i = −(N−1) … N−1 in float32, on the CPU; it is to be read only.

    Values below float32's normal range are zero: a subnormal operand can cost a hundred cycles.

    The numbers are kept from call to call; the tensor is this call's own. A tensor that is kept
    would be of whatever was on when it was made: a default device, inference mode, fake tensors, a
    transform of torch.func. For the same reason none of torch's operators is called, some of which
    wait for ever in a forked process besides; but where a graph is traced, which is to have them.
    """
    if torch._C._len_torch_dispatch_stack():
        return _gaussian_table(sigma, num_frames)
    return torch.frombuffer(_gaussian_numbers(sigma, num_frames), dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def _gaussian_numbers(sigma: float, num_frames: int) -> array.array[float]:
    half = [1.0]
    for distance in range(1, num_frames):
        # Divided before it is squared: σ² leaves the range of floating point long before σ does.
        ratio = distance / sigma if sigma > 0 else math.inf
        value = math.exp(-0.5 * min(ratio, MANY_SIGMAS) ** 2)
        half.append(value if value >= torch.finfo(torch.float32).tiny else 0.0)
    return array.array("f", [*half[:0:-1], *half])


def _gaussian_table(sigma: float, num_frames: int) -> Tensor:
    """Returns :func:`gaussian_table` by torch's operators, which can be traced."""
    distance = torch.arange(1, num_frames, dtype=torch.float64, device="cpu")
    side = torch.exp(-0.5 * (distance / sigma) ** 2) if sigma > 0 else torch.zeros_like(distance)
    side = side.masked_fill(side < torch.finfo(torch.float32).tiny, 0.0)
    centre = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([side.flip(0), centre, side]).float()


def table_frames(form: str, table: Tensor) -> int:
    """Returns L, the number of frames that a table reaches."""
    length = table.shape[-1]
    return (length + 1) // 2 if form == "signed" else length


def signed_table(form: str, table: Tensor) -> Tensor:
    """Returns a table over j−i = −(L−1) … L−1, ``(2L−1,)`` or ``(heads, 2L−1)``."""
    if form == "signed":
        return table
    return torch.cat([table[..., 1:].flip(-1), table], dim=-1)


def table_gradient(form: str, table: Tensor, signed_gradient: Tensor) -> Tensor:
    """Returns the gradient of a table for one of a signed table that may reach fewer frames."""
    max_frames = table_frames(form, table)
    missing = max_frames - (signed_gradient.shape[-1] + 1) // 2
    gradient = F.pad(signed_gradient, (missing, missing))
    if form == "symmetric":
        centre = max_frames - 1
        mirrored = F.pad(gradient[..., :centre].flip(-1), (1, 0))
        gradient = gradient[..., centre:] + mirrored
    return gradient.to(table)


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """Returns the sums over j−i = −(N−1) … N−1, ``(…, 2N−1)``, always in the same order."""
    frames = matrix.shape[-1]
    # Rows of 2N numbers read as rows of 2N − 1: each begins one column further to the right.
    skewed = F.pad(matrix.flip(-1), (0, frames)).flatten(-2)[..., :-frames]
    return skewed.unflatten(-1, (frames, 2 * frames - 1)).sum(-2).flip(-1)


# ---- checks ----


def check_finite(value: float, name: str) -> None:
    """Raises TypeError or ValueError unless a value is a number in the range of float32."""
    _check_real(value, name)
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:  # of integers too, and false for NaN
        raise ValueError(f"{name} must be finite, in float32 too, got {shown(value)}")


def check_flag(value: bool, name: str) -> None:
    """Raises TypeError unless a value is True or False: "no" and 0 would pass for one of them."""
    if not isinstance(value, bool):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be True or False, got {kind}")


def check_strided(value: Tensor, name: str) -> None:
    """Raises ValueError for tensors without strides, such as sparse ones."""
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be an ordinary (strided) tensor, got {kind}")


def _check_count(num_frames: int) -> None:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int | torch.SymInt):
        raise TypeError(f"num_frames must be an integer, got {type(num_frames).__name__}")
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ValueError(f"num_frames must be 1 to {MAX_FRAMES}, got {shown(num_frames)}")


def shown(value: float) -> str:
    """Returns a number for a message: of many digits, only how large it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def _check_real(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_tensor(value: Tensor, name: str, dims: tuple[int, ...], shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    check_strided(value, name)
    if value.ndim not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def _check_heads(value: Tensor, dims_per_head: int, num_heads: int, name: str) -> None:
    if value.ndim > dims_per_head and value.shape[0] != num_heads:
        raise ValueError(
            f"{name} has {value.shape[0]} heads (shape {tuple(value.shape)}), query has {num_heads}"
        )
