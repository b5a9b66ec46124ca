"""The oracle and the tolerances: one formula and one set of bounds for tests, demo and benchmarks.

:func:`eager` is the formula, one PyTorch operation after the other in the inputs' type; in float64
it is the oracle. It shares nothing with :mod:`vstar_kernels.attention.reference`, which is checked
against it as the kernels are; both are checked against plain loops over numbers in the tests. The
bounds compare a result's error with that of the same formula
computed by PyTorch, and say how much more they allow and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.frames.layout import Frames, Layout
from vstar_kernels.attention.frames.rules import FrameRule

if not __debug__:
    raise ImportError("vstar_kernels.testing checks by assert, which python -O leaves out")

EPS = torch.finfo(torch.float32).eps
ROW_SUM = 4e-6  # how much a row of a float32 map may miss 1 by
CELL = 16 * EPS  # how much a weight of a float32 map may err by
FEW = 64  # independent errors: the ratio of two norms of fewer may be above 2 by chance
DRAWS = 8  # of the changed inputs on which PyTorch's usual error is measured


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Returns a random query, key and value, already rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, *shape, generator=generator).to(dtype)
    return tuple(x.clone() for x in drawn)  # none lies behind another, where a kernel could read on


# ---- the formula ----


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
    map_block: int = 1,
) -> Any:
    """Computes the formula, every step in the inputs' type, with all maps, as the official code.

    The arguments and shapes are :func:`vstar_kernels.tar_attention`'s. A caller that times it makes
    Δ once, as ``DenseBias(bias.matrix(frames).to(query), …)``.

    Returns:
        The output, or with ``return_map`` the output and the mean map.
    """
    weights = eager_weights(query, key, bias, scale=scale)
    out = (weights @ value.transpose(-3, -2)).transpose(-3, -2)
    if not return_map:
        return out
    shared = tuple(range(1, weights.ndim - (3 if map_heads else 2)))
    mean_map = weights.mean(shared) if shared else weights
    if map_block > 1:
        frames = torch.arange(query.shape[-3], device=query.device)
        in_block = F.one_hot(frames // map_block).to(mean_map)  # (frames, blocks)
        mean_map = in_block.T @ mean_map @ in_block
    return out, mean_map


def eager_weights(
    query: Tensor, key: Tensor, bias: Bias | None = None, *, scale: float | None = None
) -> Tensor:
    """Returns A′ = softmax(φ + strength · stat · Δ), ``(…, heads, frames, frames)``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.transpose(-3, -2) @ key.transpose(-3, -2).mT) * scale
    if bias is not None and bias.strength != 0:
        delta = bias.matrix(query.shape[-3]).to(logits)
        logits = logits + bias.strength * _statistic(logits, bias) * delta
    return logits.softmax(-1)


def _statistic(logits: Tensor, bias: Bias) -> Tensor:
    """Returns the statistic of each row, broadcastable to the logits."""
    dims = {"row_max": (-1,), "map_max": (-2, -1)}
    if isinstance(bias.stat, Tensor):
        stat = bias.stat.mT.unsqueeze(-1).to(logits)
    elif bias.stat not in dims:
        stat = logits.new_ones(())
    elif not logits.requires_grad:
        stat = logits.amax(dims[bias.stat], keepdim=True)
    else:  # amax is faster, but divides a gradient among ties; max gives it to the first
        flat = logits if bias.stat == "row_max" else logits.flatten(-2).unsqueeze(-2)
        stat = flat.max(-1, keepdim=True).values
    if bias.detach_stat:
        stat = stat.detach()
    return _clamped(stat) if bias.clamp_negative else stat


def _clamped(stat: Tensor) -> Tensor:
    """Returns max(stat, 0); the gradient passes at 0, where torch.clamp's does up to torch 2.13."""
    return torch.where(stat < 0, 0.0, stat)


def oracle(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None = None, **options: Any
) -> Any:
    """Returns :func:`eager`'s results in float64, of the very numbers that the kernel is given."""
    return eager(query.double(), key.double(), value.double(), bias, **options)


# ---- bounds of the output and the map ----


def largest_error(out: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference; infinity where either is not finite."""
    if not (out.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return (out.double() - expected.double()).abs().max().item() if out.numel() else 0.0


def assert_exact(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    *,
    equal_terms: int = 0,
    **options: Any,
) -> None:
    """Asserts that ``out`` errs at most twice as much as PyTorch's in float32, rounded to its type.

    On top come roundings that the two computations need not share, nor be equally unlucky in: a few
    of the largest value, and what four of each logit's terms do to an element. ``equal_terms`` is
    how many logits of a row are equal by construction, as where scale = 0: adding n equal terms
    one by one may round every time in the same direction, by up to eps / 2 of the sum.
    """
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    expected = oracle(query, key, value, bias, **options)
    plain = eager(query.float(), key.float(), value.float(), bias, **options).to(out.dtype)
    if not out.numel():
        return
    size = value.double().abs().max().item()
    allowed = torch.tensor(2 * largest_error(plain, expected) + (4 + equal_terms / 2) * EPS * size)
    error = (out.double() - expected).abs()
    if (error <= allowed).all():
        return
    # No error of the weights moves an output by more than the values' range.
    moved = 2 * EPS * sensitivity(query, key, value, bias, options.get("scale"))
    allowed = allowed + moved.clamp(max=2 * size)
    worst = (error - allowed).nan_to_num(nan=float("inf")).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )


def assert_as_exact_as_eager(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any
) -> None:
    """Asserts :func:`assert_exact` in float32, and in 16 bits at most twice :func:`eager`'s error.

    That is the bound of kernels whose weights are rounded to the inputs' type for the matrix units,
    as eager's are. Two roundings of the largest value come on top.
    """
    if query.dtype == torch.float32:
        assert_exact(out, query, key, value, bias, **options)
        return
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    expected = oracle(query, key, value, bias, **options)
    allowed = 2 * largest_error(eager(query, key, value, bias, **options), expected)
    allowed += 2 * torch.finfo(query.dtype).eps * value.abs().max().item()
    error = largest_error(out, expected)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def sensitivity(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, scale: float | None
) -> Tensor:
    """Returns how far an output's elements move, at most, for relative errors of 1 in its logits.

    Logits are sums, of products and of the bias: they err relatively to the sum of their terms'
    absolute values tᵢⱼ, however much cancels. To first order
    |δoutᵢ| ≤ Σⱼ A′ᵢⱼ tᵢⱼ |vⱼ − outᵢ| ≤ Σⱼ A′ᵢⱼ tᵢⱼ (|vⱼ| + |outᵢ|).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.double().transpose(-3, -2) for x in (query, key, value))
    logits = scale * (q @ k.mT)
    terms = abs(scale) * (q.abs() @ k.mT.abs())
    if bias is not None and bias.strength != 0:
        weight = bias.strength * bias.matrix(query.shape[-3]).double()
        stat = _statistic(logits, bias)
        stat_terms = stat.abs()
        if isinstance(bias.stat, str) and bias.stat != "none":  # one of the logits, with its terms
            stat_terms = terms.amax(-1 if bias.stat == "row_max" else (-2, -1), keepdim=True)
        terms = terms + weight.abs() * stat_terms
        logits = logits + weight * stat
    weights = logits.softmax(-1)
    moved = weights * terms
    result = moved @ v.abs() + moved.sum(-1, keepdim=True) * (weights @ v).abs()
    return result.transpose(-3, -2)


def assert_map(
    mean_map: Tensor, expected: Tensor, *, frames: int, map_block: int = 1, rows_only: bool = False
) -> None:
    """Asserts that a float32 map holds all weights of its rows, and each in its place.

    A row's sum does not depend on the logits, so its bound holds however large those are. A cell's
    bound is for logits of a few units, whose weights err by a few roundings; ``rows_only`` leaves
    it out.
    """
    assert mean_map.shape == expected.shape
    assert mean_map.dtype == torch.float32
    if not mean_map.numel():
        return
    size = min(map_block, frames)  # rows, and columns, of the map that a cell is summed over
    error = (mean_map.double().sum(-1) - expected.double().sum(-1)).abs().max().item()
    assert error <= ROW_SUM * size, f"a row of the map is off by {error:.3g}"
    if not rows_only:
        error = largest_error(mean_map, expected)
        assert error <= CELL * size**2, f"the map is off by {error:.3g}, allowed {CELL * size**2}"


# ---- frame_attention: the formula over all pairs of tokens, and its bounds ----


def eager_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
) -> Any:
    """Computes :func:`vstar_kernels.frame_attention` densely, every step in the inputs' type.

    The rule's tables are spelled out for every pair of tokens, from the layout's segments. In
    float64 it is the oracle.

    Returns:
        The output, or with ``return_map`` the output and the map.
    """
    parts = _frame_parts(
        query, key, layout, rule, key_layout=key_layout, key_lengths=key_lengths, scale=scale
    )
    out = _frames_out(parts.weights, value)
    if not return_map:
        return out
    return out, _frames_map(parts.weights, layout, key_layout, map_heads)


def _frames_out(weights: Tensor, value: Tensor) -> Tensor:
    """Returns the output of A′."""
    return torch.einsum("bhij,bjhd->bihd", weights, _repeat_heads(value, weights.shape[1]))


def _frames_map(
    weights: Tensor, layout: Layout, key_layout: Layout | None, map_heads: bool
) -> Tensor:
    """Returns the map of A′."""
    keys = layout if key_layout is None else key_layout
    rows = F.one_hot(_tokens(layout)[0], layout.frames + 1)[:, :-1].to(weights)
    columns = F.one_hot(_tokens(keys)[0], keys.frames + 1).to(weights)
    each = (rows / rows.sum(0)).T @ weights @ columns  # (batch, heads, F_q, F_k + 1)
    return each if map_heads else each.mean(1)


class _FrameParts(NamedTuple):
    """What the formula makes, ``(batch, heads, tokens, keys)`` each."""

    weights: Tensor
    terms: Tensor  # of every logit: the sum of the absolute values of what it is a sum of


def _tokens(layout: Layout) -> tuple[Tensor, Tensor]:
    """Returns the frame's number, F of text, and the place in the frame of each token."""
    numbers: dict[float, int] = {}
    sizes: dict[int, int] = {}
    tokens: list[tuple[int, int]] = []
    for segment in layout.segments:
        if not isinstance(segment, Frames):
            tokens += [(-1, 0)] * segment.tokens
            continue
        for i in range(segment.count):
            number = numbers.setdefault(segment.first + i * segment.step, len(numbers))
            for _ in range(segment.tokens):
                tokens.append((number, sizes.get(number, 0)))
                sizes[number] = sizes.get(number, 0) + 1
    frame, place = torch.tensor(tokens, device="cpu").T
    return torch.where(frame < 0, len(numbers), frame), place


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Returns keys or values with a head for each of the queries'."""
    return torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], dim=2)


def _frame_parts(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    rule: FrameRule | None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> _FrameParts:
    """Returns A′ and the size of what its logits are made of."""
    rule = FrameRule() if rule is None else rule
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = layout if key_layout is None else key_layout
    tables = rule.tables(layout, keys)
    (f, place), (g, key_place) = _tokens(layout), _tokens(keys)
    distance = key_place - place[:, None]

    def spelled(table: Tensor, neutral: float) -> Tensor:
        """Returns the entry for each pair of tokens; ``neutral`` where one of them is text."""
        return F.pad(table, (0, 1, 0, 1), value=neutral)[..., f[:, None], g]

    def within(bounds: Tensor) -> Tensor:
        return (spelled(bounds[0], -(2**30)) <= distance) & (distance <= spelled(bounds[1], 2**30))

    every_key = _repeat_heads(key, query.shape[2])
    logits = torch.einsum("bihd,bjhd->bhij", query, every_key) * scale
    terms = torch.einsum("bihd,bjhd->bhij", query.abs(), every_key.abs()) * abs(scale)
    if tables.factor is not None:
        of_positive, of_others = (spelled(x, 1.0).to(logits) for x in tables.factor)
        factor = torch.where(logits > 0, of_positive, of_others)
        if tables.factor_span is not None:
            factor = torch.where(within(tables.factor_span), factor, torch.ones_like(factor))
        logits, terms = logits * factor, terms * factor.abs()

    visible = torch.ones_like(logits, dtype=torch.bool)
    if key_lengths is not None:
        visible &= (torch.arange(len(g)) < key_lengths[:, None])[:, None, None]
    if tables.band is not None:
        visible &= within(tables.band)
    offset = logits.new_zeros(())
    if tables.offset is not None:
        offset = spelled(tables.offset, 0.0).to(logits)
        visible &= offset > -math.inf
        offset = offset.masked_fill(offset == -math.inf, 0.0)

    if tables.delta is not None:
        delta = spelled(tables.delta, 0.0).to(logits)
        stat = _frame_statistic(logits, visible, [g == frame for frame in range(keys.frames)], rule)
        stat_terms = stat.abs()
        if rule.stat in ("row_max", "frame_max"):
            stat_terms = terms.amax(-1, keepdim=True)
        if rule.clamp_negative:
            stat = _clamped(stat)
        logits, terms = logits + stat * delta, terms + stat_terms * delta.abs()
    logits, terms = logits + offset, terms + offset.abs()

    some = visible.any(-1, keepdim=True)
    weights = logits.masked_fill(~visible & some, -math.inf).softmax(-1)
    return _FrameParts(torch.where(visible, weights, torch.zeros_like(weights)), terms)


def _frame_statistic(
    logits: Tensor, visible: Tensor, of_frame: list[Tensor], rule: FrameRule
) -> Tensor:
    """Returns r of each row, ``(batch, heads, tokens, 1)``; 0 without a visible key of the video.

    ``of_frame`` has a mask of the keys for each frame.
    """
    if isinstance(rule.stat, Tensor):
        return rule.stat.mT.unsqueeze(-1).to(logits)
    found = [torch.full_like(logits[..., :1], -math.inf)]
    for keys in of_frame:
        count = visible[..., keys].sum(-1, keepdim=True)
        x = logits[..., keys].masked_fill(~visible[..., keys] & (count > 0), -math.inf)
        if rule.stat == "frame_max":
            x = x.logsumexp(-1, keepdim=True) - count.clamp(min=1).to(logits).log()
        found.append(x.masked_fill(count == 0, -math.inf))
    largest = torch.cat(found, -1).max(-1, keepdim=True).values
    return torch.where(largest > -math.inf, largest, torch.zeros_like(largest))


def assert_frames(
    found: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    **options: Any,
) -> None:
    """Asserts that :func:`vstar_kernels.frame_attention`'s result is about as exact as PyTorch's.

    ``found`` is what it returned for the arguments: the output, or the output and the map. In
    float32 the output may err twice as much as the eager formula, and by a few roundings of each
    logit's terms; in 16 bits twice as much as the eager formula does in that type. Two roundings
    of the largest value come on top. The map, which is float32, is compared with that of the very
    inputs in float64; what its logits' terms do to a weight is allowed.
    """
    result: tuple[Tensor, ...] = found if options.pop("return_map", False) else (found,)
    map_heads = options.pop("map_heads", False)
    weights, terms = _frame_parts(query.double(), key.double(), layout, rule, **options)
    expected = _frames_out(weights, value.double())
    plain = eager_frames(query, key, value, layout, rule, **options)
    _assert_output(result[0], plain, expected, value.double(), weights * terms)
    if len(result) == 2:
        mean_map = result[1]
        expected_map = _frames_map(weights, layout, options.get("key_layout"), map_heads)
        assert (mean_map.shape, mean_map.dtype) == (expected_map.shape, torch.float32)
        error = largest_error(mean_map.sum(-1), expected_map.sum(-1))
        assert error <= ROW_SUM, f"a row of the map is off by {error:.3g}"
        largest = terms.max().item() if terms.numel() else 0.0
        error, allowed = largest_error(mean_map, expected_map), CELL * max(1.0, largest)
        assert error <= allowed, f"the map is off by {error:.3g}, allowed {allowed:.3g}"


def _assert_output(
    out: Tensor, plain: Tensor, expected: Tensor, value: Tensor, moved: Tensor
) -> None:
    """Asserts the bound of the output; ``moved`` is A′ times its logits' terms."""
    assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
    if not out.numel():
        return
    value, size = _repeat_heads(value, out.shape[2]), value.abs().max().item()
    moves = torch.einsum("bhij,bjhd->bihd", moved, value.abs())
    moves = moves + moved.sum(-1).mT.unsqueeze(-1) * expected.abs()
    bound = 2 * largest_error(plain, expected) + 2 * torch.finfo(out.dtype).eps * size
    allowed = bound + (2 * EPS * moves).clamp(max=2 * size)
    error = (out.double() - expected).abs()
    worst = (error - allowed).nan_to_num(nan=math.inf).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )


# ---- column_attention: the formula with all weights, and its bounds ----


def eager_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """Computes :func:`vstar_kernels.column_attention` with all weights, in the inputs' type.

    In float64 it is the oracle.

    Returns:
        The output and the maps; without a value the maps.
    """
    weights = eager_weights(query, key, scale=scale)  # (batch, heads, N, T)
    maps = weights.mean(1) @ columns.to(weights)
    if value is None:
        return maps
    return (weights @ value.transpose(1, 2)).transpose(1, 2), maps


def assert_columns(
    found: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> None:
    """Asserts that :func:`vstar_kernels.column_attention`'s result is about as exact as PyTorch's.

    ``found`` is what it returned for the arguments. The bounds are those of :func:`assert_frames`;
    a map, which is a sum of weights that add up to 1, errs by the largest weight of a column more.
    """
    q, k = query.double(), key.double()
    weights = eager_weights(q, k, scale=scale)
    factor = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    terms = factor * torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs())
    maps = found
    if value is not None:
        out, maps = found
        plain, _ = eager_columns(query, key, value, columns, scale=scale)
        expected = torch.einsum("bhij,bjhd->bihd", weights, value.double())
        _assert_output(out, plain, expected, value.double(), weights * terms)
    expected_maps = weights.mean(1) @ columns.double()
    assert (maps.shape, maps.dtype) == (expected_maps.shape, torch.float32)
    if not maps.numel():
        return
    error = largest_error(maps, expected_maps)
    allowed = CELL * max(1.0, terms.max().item()) * columns.abs().max().item()
    assert error <= allowed, f"a map is off by {error:.3g}, allowed {allowed:.3g}"


# ---- bounds of the gradients ----

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

    ``equal_terms`` as in :func:`assert_exact`: half an eps of each is added to the 4 eps of both.
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
