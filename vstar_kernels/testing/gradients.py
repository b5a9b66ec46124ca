"""The bounds of gradients, of any operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vstar_kernels.testing.bounds import EPS

FEW = 64  # independent errors: the ratio of two norms of fewer may be above 2 by chance
DRAWS = 8  # of the changed inputs on which PyTorch's usual error is measured

NamedTensors = Mapping[str, Tensor]


def assert_gradients(
    found: NamedTensors,
    compute: Callable[[Callable[[Tensor], Tensor]], NamedTensors],
    *,
    equal_terms: int = 0,
    vanishing: float = 0.0,
) -> float:
    """Asserts that gradients err about as little as PyTorch's, in length and in direction.

    ``compute`` returns the gradients, by the same names, of a plain formula on the inputs after
    each of them (query, key, value, gradients of the results, tensors of the bias) went through the
    function that it is given. It is called with the identity, for PyTorch's own error, and with
    ``Tensor.double``, for the truth g. With e the error of ``found``:

    **Norm.** ‖e‖ ≤ 2 ‖e of PyTorch‖ + 4 eps ‖g‖. With n independent errors of one size in each, the
    squares of two such norms have a ratio above 4 by chance with the probability of Fisher's
    F(n, n) > 4: 4 % for n = 7, 5e-8 for n = 64. Where PyTorch's error is made of fewer than 64 (a
    table of a few entries, head_dim 1), PyTorch may be lucky where another order of summation is
    not. There, and only there, 6 times PyTorch's error without the luck comes on top: the root mean
    square, over some draws, of its float32 error on inputs of which each has changed by ± eps of
    its own. That has in it what a rounding of each input does, which no float32 computation is
    better than, and what the formula's own steps round: where a weight is almost 1, dA′ − rowsum
    cancels by much more than the inputs' roundings show. (Three errors exceed 4 times what 8 draws
    of them show with the probability of F(3, 24) > 16, 6e-6, which thousands of drawn cases meet;
    6 times, with 5e-9.) Errors of uneven sizes eᵢ count as
    n = 3 (Σ eᵢ²)² / Σ eᵢ⁴, which is as many normal ones of one size.

    **Cosine.** 1 − cos(found, g) ≤ (that bound / ‖g‖)². A perpendicular error of relative size r
    costs r²/2, so nothing that passes for the norm fails here but by its direction.

    **Signed bias.** A gradient that is systematically too long or too short, and not merely
    rounded, shows in the slope b = Σ dᵢgᵢ / Σ gᵢ² of d = found − PyTorch's on the gradient. (Not of
    e: most of what rounding to 16 bits does is in both, and cancels.) Rounding has no preferred
    sign, so b is a sum of terms dᵢgᵢ with random signs: its expectation is 0 and its deviation
    s = √(Σ dᵢ²gᵢ²) / Σ gᵢ². By Hoeffding's inequality |b| > 6 s has a probability below
    2 exp(−6²/2) = 3e-8, for differences and gradients of any sizes. (6 ‖d‖ / (‖g‖ √n) is the same
    only where all n of the dᵢgᵢ are of one size. At head_dim 1 each element of the gradient is a
    single product of normal numbers instead of a sum of many: a handful of elements holds most of
    ‖g‖² and of Σ dᵢ²gᵢ², and s is several times as large.) What comes on top is PyTorch's own
    slope on the truth, by which d of an unbiased gradient is off where every step of the formula is
    rounded to 16 bits, and 4 eps for the roundings that all elements share, of the scale and of the
    strength. By Cauchy and Schwarz |b| ≤ s √n: in fewer than 36 elements a bias cannot be told from
    luck, and the bound of the norm is all there is. Signs are not random among copies: where all
    weights of a row are equal, the gradients of all values are one number, which is rounded one
    way. So the dᵢgᵢ of elements whose g rounds to the same number of the gradient's type are added
    up and count as one term.

    ``equal_terms`` as in :func:`vstar_kernels.testing.assert_exact`: half an eps of each is added
    to the 4 eps of both.
    ``vanishing`` is the norm of the rounding that may be left where a gradient is zero by
    construction, as of keys or values that are all alike: rows of dA′ − rowsum add up to zero
    however the inputs change, so PyTorch's error need not show it.

    Returns:
        The largest relative error ‖e‖ / ‖g‖; of gradients that are zero, ‖e‖.
    """
    plain, exact = compute(lambda x: x), compute(Tensor.double)
    assert found.keys() == exact.keys(), f"{sorted(found)} instead of {sorted(exact)}"
    noise: dict[str, float] = {}  # measured where it is needed
    shared = (4 + equal_terms / 2) * EPS  # of all elements alike
    worst = 0.0
    for name, g in exact.items():
        g, x = g.double(), found[name].double()
        assert x.shape == g.shape, f"{name}: shape {tuple(x.shape)}, not {tuple(g.shape)}"
        assert x.isfinite().all(), f"{name}: not finite"
        e, plain_e = x - g, plain[name].double() - g
        size, error = g.norm().item(), e.norm().item()
        allowed = 2 * plain_e.norm().item() + shared * size
        if error > allowed:
            allowed += vanishing
            if error > allowed and _independent(plain_e) < FEW:
                noise = noise or _errors_nearby(compute, exact)
                allowed += 6 * noise[name]
            assert error <= allowed, (
                f"{name}: relative error {error / (size or 1):.3g}, "
                f"allowed {allowed / (size or 1):.3g}"
            )
        worst = max(worst, error / (size or 1.0))
        if size <= allowed:  # nothing but rounding, which has neither direction nor length
            continue
        cosine = ((x * g).sum() / (x.norm() * size)).item()
        assert 1 - cosine <= (allowed / size) ** 2 + 1e-13, f"{name}: cosine {cosine}"
        terms = _without_copies((x - plain[name].double()) * g, g.to(found[name].dtype))
        slope, deviation = terms.sum().item() / size**2, terms.norm().item() / size**2
        plain_slope = (plain_e * g).sum().item() / size**2
        straight = 6 * deviation + abs(plain_slope) + shared
        assert abs(slope) <= straight, f"{name}: biased by {slope:.3g}, allowed {straight:.3g}"
    return worst


def _independent(errors: Tensor) -> float:
    """Returns how many normal errors of one size have the moments of these."""
    count, fourth = errors.numel(), errors.pow(4).sum().item()
    return min(count, 3 * errors.square().sum().item() ** 2 / fourth) if fourth else 0.0


def _without_copies(terms: Tensor, numbers: Tensor) -> Tensor:
    """Returns the sums of the terms that belong to equal numbers."""
    distinct, places = numbers.flatten().unique(return_inverse=True)
    return terms.new_zeros(distinct.shape).index_add(0, places, terms.flatten())


def _errors_nearby(
    compute: Callable[[Callable[[Tensor], Tensor]], NamedTensors], exact: NamedTensors
) -> dict[str, float]:
    """Returns the root mean square of PyTorch's errors in float32 when its inputs move by eps."""
    generator = torch.Generator().manual_seed(0)

    def changed(x: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, x.shape, generator=generator) - 1
        return (x.double() * (1 + EPS * signs.to(x.device))).float()

    squares = dict.fromkeys(exact, 0.0)
    for _ in range(DRAWS):
        for name, gradient in compute(changed).items():
            squares[name] += (gradient.double() - exact[name].double()).square().sum().item()
    return {name: math.sqrt(square / DRAWS) for name, square in squares.items()}
