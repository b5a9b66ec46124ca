"""The oracle against sums written out, and that the bounds refuse what is wrong."""

import math

import pytest
import torch

import vstar_kernels as vk
from tests.pairwise import pairwise
from vstar_kernels import testing
from vstar_kernels.testing import assert_exact, assert_gradients, inputs, largest_error

OPTIONS = {
    "space": [(), (2,)],
    "bias": ["none", "gaussian", "toeplitz", "dense"],
    "stat": ["row_max", "map_max", "none", "tensor"],
    "strength": [0.7, -1.3, 0.0],
    "clamp_negative": [False, True],
    "detach_stat": [False, True],
    "scale": [None, 0.3, -0.2],
    "map_block": [1, 2, 5],
}


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: f"{c['bias']}-{c['stat']}")
def test_the_oracle_and_the_reference_agree(case):
    """Two computations that share nothing, in float64, gradients included."""
    frames, heads = 7, 3
    q, k, v = (x.double() for x in inputs(2, *case["space"], frames, heads, 4))
    stat = torch.randn(q.shape[:-1]) if case["stat"] == "tensor" else case["stat"]
    weight = {name: case[name] for name in ("strength", "clamp_negative", "detach_stat")}
    delta = torch.rand(heads, frames, frames, dtype=torch.float64)
    bias = {
        "none": lambda **_: None,
        "gaussian": lambda **options: vk.GaussianBias(1.5, **options),
        "toeplitz": lambda **options: vk.ToeplitzBias(delta[:, 0], **options),
        "dense": lambda **options: vk.DenseBias(delta, **options),
    }[case["bias"]](stat=stat, **weight)
    options = {"scale": case["scale"], "return_map": True, "map_block": case["map_block"]}
    grad_out, grad_map = torch.randn_like(q), torch.randn(2, *2 * [-(-frames // case["map_block"])])

    def run(formula):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results = formula(*leaves, bias, **options)
        loss = (results[0] * grad_out).sum() + (results[1] * grad_map).sum()
        return [*results, *torch.autograd.grad(loss, leaves)]

    for ours, other in zip(run(testing.eager), run(vk.reference.tar_attention), strict=True):
        # The reference returns its map in float32.
        torch.testing.assert_close(ours, other, check_dtype=False, rtol=1e-7, atol=3e-7)
    out = testing.oracle(q.float(), k.float(), v.float(), bias, **options)[0]
    assert torch.equal(out, run(testing.eager)[0].detach())


def by_hand(query, key, value, delta, strength, clamp_negative):
    """Equation 3 for one sequence, ``(frames, head_dim)`` each, a number at a time in loops."""
    frames, head_dim = len(query), len(query[0])
    weights, out = [], []
    for i in range(frames):
        logits = [
            sum(query[i][c] * key[j][c] for c in range(head_dim)) / math.sqrt(head_dim)
            for j in range(frames)
        ]
        largest = max(logits)
        if clamp_negative and largest < 0:
            largest = 0.0
        regularized = [logits[j] + strength * largest * delta[i][j] for j in range(frames)]
        total = sum(math.exp(x) for x in regularized)
        weights.append([math.exp(x) / total for x in regularized])
        out.append(
            [sum(weights[i][j] * value[j][c] for j in range(frames)) for c in range(head_dim)]
        )
    return weights, out


@pytest.mark.parametrize("clamp_negative", [False, True])
@pytest.mark.parametrize("sign", ["mixed", "negative"])
@pytest.mark.parametrize("strength", [0.8, -1.5])
def test_the_oracle_by_hand(strength, sign, clamp_negative):
    """Also where all logits, and with them the rows' maxima, are negative."""
    frames, heads, sigma = 7, 3, 1.5
    q, k, v = (x.double() for x in inputs(2, frames, heads, 5))
    if sign == "negative":
        q, k = q.abs(), -k.abs()
    delta = [
        [math.exp(-((j - i) ** 2) / (2 * sigma**2)) for j in range(frames)] for i in range(frames)
    ]
    matrix = torch.tensor(delta, dtype=torch.float64)
    bias = vk.DenseBias(matrix, strength=strength, clamp_negative=clamp_negative)
    torch.testing.assert_close(vk.GaussianBias(sigma).matrix(frames).double(), matrix)
    out, mean_map = testing.eager(q, k, v, bias, return_map=True)
    maps = torch.zeros(2, frames, frames, dtype=torch.float64)
    maxima = []
    for b in range(2):
        for h in range(heads):
            sequence = [x[b, :, h].tolist() for x in (q, k, v)]
            weights, expected = by_hand(*sequence, delta, strength, clamp_negative)
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(out[b, :, h], expected, rtol=1e-12, atol=1e-12)
            maps[b] += torch.tensor(weights, dtype=torch.float64) / heads
            maxima.append((q[b, :, h] @ k[b, :, h].T).amax(-1))
    torch.testing.assert_close(mean_map, maps, rtol=1e-12, atol=1e-12)
    assert (torch.cat(maxima) < 0).all() == (sign == "negative")


def test_not_finite_is_infinitely_wrong():
    good, bad = torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])
    assert largest_error(bad, good) == float("inf")
    assert largest_error(bad, bad) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_assert_exact_refuses_what_is_wrong(dtype):
    q, k, v = inputs(2, 16, 2, 8, dtype=dtype)
    bias = vk.GaussianBias(1.0)
    out = vk.reference.tar_attention(q, k, v, bias)
    assert_exact(out, q, k, v, bias)
    worse = out.clone()
    worse[0, 3, 1, 5] += 32 * torch.finfo(dtype).eps * max(1.0, worse.abs().max().item())
    with pytest.raises(AssertionError, match="allowed"):
        assert_exact(worse, q, k, v, bias)
    with pytest.raises(AssertionError, match="allowed"):
        assert_exact(out, q, k, v, vk.GaussianBias(1.1))


def test_assert_map_refuses_what_is_wrong():
    q, k, v = inputs(2, 3, 6, 2, 8)
    bias = vk.GaussianBias(1.0)
    options = {"return_map": True, "map_block": 2}
    expected = testing.oracle(q, k, v, bias, **options)[1]
    sizes = {"frames": 6, "map_block": 2}
    testing.assert_map(expected.float(), expected, **sizes)
    moved = expected.float()
    moved[0, 1, 1] += 1e-4
    with pytest.raises(AssertionError, match="row of the map"):
        testing.assert_map(moved, expected, **sizes, rows_only=True)
    moved[0, 1, 2] -= 1e-4  # now the row holds all weights, at the wrong place
    testing.assert_map(moved, expected, **sizes, rows_only=True)
    with pytest.raises(AssertionError, match="the map is off"):
        testing.assert_map(moved, expected, **sizes)


def gradients_of(shape, dtype, seed=0):
    """The function that assert_gradients takes."""
    tensors = inputs(*shape, dtype=dtype, seed=seed)
    grad_out = inputs(*shape, dtype=dtype, seed=seed + 1)[0]

    def compute(change):
        leaves = [change(x).requires_grad_() for x in tensors]
        out = vk.reference.tar_attention(*leaves, vk.GaussianBias(1.0))
        found = torch.autograd.grad(out, leaves, change(grad_out))
        return dict(zip(("query", "key", "value"), found, strict=True))

    return compute


TOO_LONG = {torch.float32: 2e-6, torch.float16: 5e-5, torch.bfloat16: 3e-4}


@pytest.mark.parametrize("dtype", TOO_LONG)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_gradient_that_is_a_little_too_long_is_refused(dtype, sign, name):
    """In 16 bits by less than a tenth of what rounding may do to an element."""
    compute = gradients_of((2, 48, 4, 40), dtype)
    found = compute(lambda x: x)
    assert 0 < assert_gradients(found, compute) < 4 * torch.finfo(dtype).eps
    wrong = compute(torch.Tensor.double)[name] * (1 + sign * TOO_LONG[dtype])
    with pytest.raises(AssertionError, match=f"{name}: (biased|relative error)"):
        assert_gradients({**found, name: wrong.to(dtype)}, compute)


@pytest.mark.parametrize("change", ["direction", "element", "missing", "nan"])
def test_gradients_that_are_wrong_are_refused(change):
    compute = gradients_of((2, 16, 2, 8), torch.float32)
    found = dict(compute(lambda x: x))
    if change == "direction":
        found["key"] = found["key"].roll(1, 0)
    elif change == "element":
        found["key"][1, 3, 0, 2] += 1e-4
    elif change == "nan":
        found["key"][1, 3, 0, 2] = float("nan")
    else:
        del found["key"]
    with pytest.raises(AssertionError, match="key"):
        assert_gradients(found, compute)


@pytest.mark.parametrize("head_dim", [1, 2])
def test_few_and_uneven_elements_are_not_taken_for_a_bias(head_dim):
    """Gradients rounded to 16 bits, most of whose length is in a handful of elements."""
    for seed in range(100):
        compute = gradients_of((1, 30, 1, head_dim), torch.float16, seed)
        rounded = {name: x.half() for name, x in compute(torch.Tensor.double).items()}
        assert_gradients(rounded, compute)


@pytest.mark.parametrize(("count", "is_excused"), [(5, True), (1000, False)])
def test_bad_luck_is_excused_in_few_elements_alone(count, is_excused):
    """Errors above PyTorch's, and below what one rounding of the inputs does."""
    x = 1 + inputs(count)[0].sigmoid()  # of nearly one size, as the errors are then too

    def compute(change):
        return {"query": change(x) ** 3}

    unlucky = 1 + 8 * testing.EPS * torch.randn(count).sign().double()
    found = {"query": compute(torch.Tensor.double)["query"] * unlucky}
    if is_excused:
        assert_gradients(found, compute)
    else:
        with pytest.raises(AssertionError, match="query: relative error"):
            assert_gradients(found, compute)


def test_copies_of_one_rounding_are_not_taken_for_a_bias():
    """Each of these 40 numbers is there 150 times, and one of them is rounded the other way."""
    x = inputs(40)[0].half()

    def compute(change):
        return {"value": (change(x) + change(x) / 3).expand(150, 40)}

    found = compute(lambda x: x)["value"].clone()
    found[:, 7] = torch.nextafter(found[:, 7], torch.tensor(float("inf"), dtype=torch.half))
    assert_gradients({"value": found}, compute)
    biased = found.double() * (1 + 1e-3)
    with pytest.raises(AssertionError, match=r"value: (biased|relative error)"):
        assert_gradients({"value": biased.half()}, compute)
