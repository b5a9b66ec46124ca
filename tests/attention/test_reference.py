"""The oracle itself, against sums written out and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from vstar_kernels.testing import inputs

tar = vk.reference.tar_attention


def by_hand(q, k, v, sigma, strength):
    """Equation 3 with loops, for one sequence: (frames, head_dim) each."""
    n, d = q.shape
    weights = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        phi = [
            sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) / math.sqrt(d) for j in range(n)
        ]
        m = max(phi)
        x = [phi[j] + strength * m * math.exp(-((j - i) ** 2) / (2 * sigma**2)) for j in range(n)]
        total = sum(math.exp(y) for y in x)
        weights[i] = torch.tensor([math.exp(y) / total for y in x])
    return weights, weights @ v.double()


def test_formula_by_hand():
    q, k, v = (x.double() for x in inputs(2, 7, 3, 5))
    out, mean_map = tar(q, k, v, vk.GaussianBias(1.5, strength=0.8), return_map=True)
    maps = torch.zeros(2, 7, 7, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            weights, expected = by_hand(q[b, :, h], k[b, :, h], v[b, :, h], 1.5, 0.8)
            torch.testing.assert_close(out[b, :, h], expected)
            maps[b] += weights / 3
    torch.testing.assert_close(mean_map, maps.float())


@pytest.mark.parametrize("bias", [None, vk.GaussianBias(1.0, strength=0.0)])
def test_without_strength_it_is_sdpa(bias):
    q, k, v = (x.double() for x in inputs(2, 9, 3, 8))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(tar(q, k, v, bias), expected.transpose(1, 2))


def test_five_dimensions_are_sequences_by_space():
    q, k, v = inputs(2, 4, 6, 3, 8)
    out, mean_map = tar(q, k, v, vk.GaussianBias(1.0), return_map=True)
    flat, flat_map = tar(
        *(x.flatten(0, 1) for x in (q, k, v)), vk.GaussianBias(1.0), return_map=True
    )
    torch.testing.assert_close(out.flatten(0, 1), flat)
    torch.testing.assert_close(mean_map, flat_map.unflatten(0, (2, 4)).mean(1))
    torch.testing.assert_close(mean_map.sum(-1), torch.ones(2, 6))


def test_three_forms_agree():
    q, k, v = inputs(2, 9, 3, 8)
    gaussian = vk.GaussianBias(1.3)
    table = torch.exp(-(torch.arange(12) ** 2) / (2 * 1.3**2))
    signed = torch.cat([table[1:].flip(0), table])
    expected = tar(q, k, v, gaussian)
    for bias in [
        vk.ToeplitzBias(table),
        vk.ToeplitzBias(table.expand(3, -1)),
        vk.ToeplitzBias(signed, signed=True),
        vk.DenseBias(gaussian.matrix(9)),
        vk.DenseBias(gaussian.matrix(9).expand(3, -1, -1)),
    ]:
        torch.testing.assert_close(tar(q, k, v, bias), expected)


def test_statistics():
    q, k, v = (x.double() for x in inputs(2, 5, 3, 8))
    phi = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    delta = vk.GaussianBias(1.0).matrix(5).double()
    tensor = torch.randn(2, 5, 3)
    for stat, weight in {
        "row_max": phi.amax(-1, keepdim=True),
        "map_max": phi.amax((-2, -1), keepdim=True),
        "none": torch.ones(1, 1, 1, 1),
        tensor: tensor.permute(0, 2, 1)[..., None],
    }.items():
        for clamp in (False, True):
            w = torch.where(weight < 0, 0.0, weight) if clamp else weight
            expected = torch.einsum("bhij,bjhd->bihd", (phi + 0.5 * w * delta).softmax(-1), v)
            bias = vk.GaussianBias(1.0, strength=0.5, stat=stat, clamp_negative=clamp)
            torch.testing.assert_close(tar(q, k, v, bias), expected)


def test_negative_row_maximum_turns_the_band_round():
    q, k, v = inputs(1, 9, 1, 8)
    q, k = q.abs(), -k.abs()
    plain = tar(q, k, v, None, return_map=True)[1][0].diagonal().mean()
    faithful = tar(q, k, v, vk.GaussianBias(1.0), return_map=True)[1][0].diagonal().mean()
    clamped = tar(q, k, v, vk.GaussianBias(1.0, clamp_negative=True), return_map=True)[1][0]
    assert faithful < plain
    torch.testing.assert_close(clamped.diagonal().mean(), plain)


@pytest.mark.parametrize("stat", ["row_max", "map_max", "none", "tensor"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("form", ["gaussian", "toeplitz", "dense"])
def test_gradcheck(form, stat, clamp, detach):
    q, k, v = (x.double().requires_grad_() for x in inputs(2, 4, 2, 3))
    stat_tensor = torch.randn(2, 4, 2).requires_grad_()
    values = {
        "gaussian": torch.zeros(()),
        "toeplitz": torch.rand(2, 4, dtype=torch.float64).requires_grad_(),
        "dense": torch.rand(4, 4, dtype=torch.float64).requires_grad_(),
    }[form]

    def run(q, k, v, values):
        options = {
            "strength": 0.6,
            "stat": stat_tensor if stat == "tensor" else stat,
            "clamp_negative": clamp,
            "detach_stat": detach,
        }
        bias = {
            "gaussian": lambda: vk.GaussianBias(1.0, **options),
            "toeplitz": lambda: vk.ToeplitzBias(values, **options),
            "dense": lambda: vk.DenseBias(values, **options),
        }[form]()
        return tar(q, k, v, bias)

    if detach and stat in ("row_max", "map_max"):
        # The numerical derivative sees the statistic move; the analytical one must not.
        fixed = torch.autograd.grad(run(q, k, v, values).square().sum(), q)[0]
        moving = torch.autograd.grad(
            tar(q, k, v, vk.GaussianBias(1.0, strength=0.6, stat=stat)).square().sum(), q
        )[0]
        assert not torch.allclose(fixed, moving)
    else:
        assert torch.autograd.gradcheck(run, (q, k, v, values))


def test_gradcheck_of_the_map():
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 2, 4, 2, 3))

    def run(q, k, v):
        out, mean_map = tar(q, k, v, vk.GaussianBias(1.0), return_map=True)
        return out, mean_map.double()

    # The map is float32, so the difference quotient is coarse.
    assert torch.autograd.gradcheck(run, (q, k, v), eps=1e-3, atol=1e-3, rtol=1e-2)


def test_tie_gives_its_gradient_to_the_first():
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(1, 3, 1, 1).clone()
    k = torch.ones_like(q).requires_grad_()
    v = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    bias = vk.GaussianBias(0.0)
    out = tar(q, k, v, bias)
    out[0, 2].sum().backward()
    # Row 2 by hand: logits x_j + [j = 2] x_first.
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    row = torch.stack([x[0], x[1], x[2] + x[0]]).softmax(0) @ v.flatten()
    row.backward()
    torch.testing.assert_close(k.grad.flatten(), x.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_float32(dtype):
    q, k, v = inputs(2, 9, 3, 8, dtype=dtype)
    bias = vk.GaussianBias(1.0)
    expected = tar(q.float(), k.float(), v.float(), bias)
    assert torch.equal(tar(q, k, v, bias), expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tar(q, k, v, bias), expected.to(dtype))
