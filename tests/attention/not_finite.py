"""NaN, infinities and huge values: what every backend does with them alike."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels.attention.bias import Bias
from vstar_kernels.testing import inputs

BATCH, HEADS, HEAD_DIM = 2, 2, 8
PLACES = ("query", "key", "value", "stat")


def make_bias(name: str, frames: int) -> Bias | None:
    """One of the biases whose statistics meet what is not finite in their own ways."""
    generator = torch.Generator().manual_seed(0)
    return {
        "none": lambda: None,
        "row_max": lambda: vk.GaussianBias(1.0, clamp_negative=True),
        "map_max": lambda: vk.GaussianBias(1.0, stat="map_max"),
        "map_max clamped": lambda: vk.ToeplitzBias(
            torch.rand(frames, generator=generator), stat="map_max", clamp_negative=True
        ),
        "tensor": lambda: vk.GaussianBias(
            1.0, stat=torch.rand(BATCH, frames, HEADS, generator=generator), clamp_negative=True
        ),
    }[name]()


BIASES = ("none", "row_max", "map_max", "map_max clamped", "tensor")


def results(backend: str, tensors: list[Tensor], bias: Bias | None) -> dict[str, Tensor]:
    """The output, the mean map and the gradients of both."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, mean_map = vk.tar_attention(*leaves, bias, return_map=True, backend=backend)
    weights = torch.arange(mean_map[0].numel()).view(mean_map.shape[1:]).to(mean_map)
    gradients = torch.autograd.grad(out.sum() + (weights * mean_map).sum(), leaves)
    names = ("out", "map", "grad_query", "grad_key", "grad_value")
    return dict(zip(names, (out.detach(), mean_map.detach(), *gradients), strict=True))


def assert_as_the_reference(
    backend: str, frames: int, name: str, cases: Iterable[tuple[str, float]]
) -> None:
    """NaN is exactly where the reference has it, and what has none is as without it.

    Each of the cases is a place and the number that stands in one element there.
    """
    clean = results(backend, list(inputs(BATCH, frames, HEADS, HEAD_DIM)), make_bias(name, frames))
    for place, bad in cases:
        _assert_contained(backend, frames, name, clean, place, bad)


def _assert_contained(
    backend: str, frames: int, name: str, clean: dict[str, Tensor], place: str, bad: float
) -> None:
    bias, row = make_bias(name, frames), frames // 2
    tensors = list(inputs(BATCH, frames, HEADS, HEAD_DIM))
    if place == "stat":
        assert bias is not None
        bias.stat[1, row, 1] = bad
    else:
        tensors[PLACES.index(place)][1, row, 1, 3] = bad
    found, expected = results(backend, tensors, bias), results("reference", tensors, bias)
    for result, tensor in found.items():
        assert torch.equal(tensor.isnan(), expected[result].isnan()), (place, bad, result)
    # Nothing of it in another sequence or head; a map is of all heads of its batch element.
    for result in ("out", "grad_query", "grad_key", "grad_value"):
        elsewhere = torch.ones_like(found[result], dtype=torch.bool)
        elsewhere[1, :, 1] = False
        same = torch.equal(found[result][elsewhere], clean[result][elsewhere])
        assert same, (place, bad, result)
    assert torch.equal(found["map"][0], clean["map"][0])
    rows = torch.arange(frames) != row  # of a query, nothing in another row but by map_max
    if place in ("query", "stat") and not name.startswith("map_max"):
        assert torch.equal(found["out"][:, rows], clean["out"][:, rows])
    if math.isnan(bad):
        touched = found["out"][1, :, 1]
        by_map = place == "query" and name.startswith("map_max")
        where = touched[:, 3] if place == "value" else touched
        all_rows = place in ("key", "value") or by_map
        assert (where if all_rows else where[row]).isnan().all()


def assert_largest_values(backend: str, frames: int, dtype: torch.dtype) -> None:
    """Values up to float32's largest number over the number of frames do not overflow."""
    largest = min(torch.finfo(torch.float32).max / frames, torch.finfo(dtype).max) * 0.99
    query = torch.zeros(1, frames, 2, HEAD_DIM, dtype=dtype)
    value = torch.full_like(query, largest)
    value[..., 1::2] *= -1
    out = vk.tar_attention(query, query, value, vk.GaussianBias(1.0), backend=backend)
    torch.testing.assert_close(out, value, rtol=max(1e-5, 8 * torch.finfo(dtype).eps), atol=0)


def assert_infinite_keys_mask(backend: str, frames: int) -> None:
    """A key that is −∞ where all queries are positive gets nothing, and leaves no NaN anywhere."""
    tensors = list(inputs(1, frames, 1, HEAD_DIM))
    tensors[0][..., 3].abs_()
    tensors[1][0, frames // 2, 0, 3] = -math.inf
    bias = vk.GaussianBias(1.0, stat="none")
    leaves = [x.requires_grad_() for x in tensors]

    def found(backend: str) -> tuple[Tensor, ...]:
        out, mean_map = vk.tar_attention(*leaves, bias, return_map=True, backend=backend)
        # Of the queries' gradient, 0 · ∞ is NaN on every backend.
        return (
            out,
            mean_map,
            *torch.autograd.grad(out.square().sum() + mean_map[0, 0, 0], leaves[1:]),
        )

    for one, other in zip(found(backend), found("reference"), strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def assert_masks(backend: str, frames: int) -> None:
    """−∞ in Δ masks keys, whichever block of them comes first; gradients too."""
    future = torch.ones(frames, frames).tril(-1).bool()
    bias = vk.DenseBias(torch.zeros(frames, frames).masked_fill(future, -math.inf), stat="none")
    tensors = list(inputs(1, frames, 1, HEAD_DIM))
    found, expected = results(backend, tensors, bias), results("reference", tensors, bias)
    for result, tensor in found.items():
        scale = expected[result].abs().max().item()
        torch.testing.assert_close(tensor, expected[result], rtol=0, atol=1e-3 * scale)
