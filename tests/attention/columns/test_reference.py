"""The oracle itself: against the formula in numbers, autograd, and what is known."""

import math

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from tests.attention.columns import cases
from tests.pairwise import pairwise
from vstar_kernels.attention.columns import reference
from vstar_kernels.attention.columns.call import ColumnWanted, check_call
from vstar_kernels.testing import assert_columns, assert_gradients, eager_columns

SMALL = {**cases.OPTIONS, "keys": [1, 16, 77], "queries": [1, 5, 37]}


def inputs(batch=2, queries=7, keys=5, heads=3, dim=4, count=2, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (queries, keys, keys)]
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return (*tensors, torch.randn(keys, count, generator=generator))


def formula(query, key, value, columns, scale):
    """The formula as the specification has it, in float64."""
    q, k, v, g = (x.double() for x in (query, key, value, columns))
    weights = (scale * torch.einsum("bnhd,bthd->bhnt", q, k)).softmax(-1)
    maps = torch.einsum("bhnt,...tk->bnk" if g.ndim == 2 else "bhnt,btk->bnk", weights, g)
    return torch.einsum("bhnt,bthd->bnhd", weights, v), maps / q.shape[2]


@pytest.mark.parametrize("case", pairwise(SMALL), ids=cases.identify)
def test_options(case):
    arguments, options = cases.make(case)
    found = vk.column_attention(*arguments, **options, backend="reference")
    assert_columns(found, *arguments, **options)
    query, key, value, columns = arguments
    scale = case["head_dim"] ** -0.5 if case["scale"] is None else case["scale"]
    expected = formula(query, key, key if value is None else value, columns, scale)
    double = [None if x is None else x.double() for x in arguments[:3]]
    exact = vk.column_attention(*double, columns, **options, backend="reference")
    eager = eager_columns(*double, columns.double(), **options)
    if value is None:
        exact, eager, expected = (exact,), (eager,), expected[1:]
    for x, y, z in zip(exact, eager, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(x, z.to(x), rtol=1e-6, atol=1e-7)


def test_by_loops():
    q, k, v, columns = inputs(batch=1)
    out, maps = vk.column_attention(q, k, v, columns, scale=0.7, backend="reference")
    expected_maps = torch.zeros(7, 2)
    for i in range(7):
        for h in range(3):
            terms = [math.exp(0.7 * float(q[0, i, h] @ k[0, j, h])) for j in range(5)]
            weights = [x / sum(terms) for x in terms]
            found = sum(w * v[0, j, h] for j, w in enumerate(weights))
            torch.testing.assert_close(out[0, i, h], found)
            expected_maps[i] += sum(w * columns[j] for j, w in enumerate(weights)) / 3
    torch.testing.assert_close(maps[0], expected_maps)


@pytest.mark.parametrize("wanted", [("query",), ("query", "key", "value", "columns"), ("columns",)])
@pytest.mark.parametrize("value", [True, False])
def test_formulas_of_the_gradients(wanted, value):
    tensors = inputs(dtype=torch.float64)
    if not value:
        tensors, wanted = (*tensors[:2], None, tensors[3]), [x for x in wanted if x != "value"]
    case = cases.Gradients(tensors, {"scale": -0.4}, wanted)
    expected = case.autograd(lambda x: x)
    for save in (True, False):
        for name, gradient in case.by(reference, save=save).items():
            assert gradient.dtype == expected[name].dtype
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_gradient_that_is_none_is_zero():
    call = check_call(*inputs())
    wanted = ColumnWanted(True, True, True, True)
    of_maps = reference.backward(call, None, (), None, torch.ones(call.map_shape), wanted)
    assert of_maps.query.any()
    assert not of_maps.value.any()
    of_out = reference.backward(call, None, (), torch.ones_like(call.query), None, wanted)
    assert of_out.value.any()
    assert not of_out.columns.any()


def test_gradcheck():
    q, k, v, columns = inputs(queries=3, keys=4, heads=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def out(*x):
        return vk.column_attention(*x, columns, backend="reference")[0]

    assert torch.autograd.gradcheck(out, leaves)
    assert torch.autograd.gradgradcheck(out, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bounds_refuse_what_is_wrong(dtype):
    q, k, v, columns = inputs(keys=20, dim=16, dtype=dtype)
    out, maps = vk.column_attention(q, k, v, columns, backend="reference")
    assert_columns((out, maps), q, k, v, columns)
    assert_columns(maps, q, k, None, columns)
    other = vk.column_attention(q, k, v, columns, scale=0.3, backend="reference")
    missing = out.clone()
    missing[1, 3, 2, 0] = float("nan")
    for wrong in (
        (other[0], maps), (out, other[1]), (missing, maps), (out * 1.1, maps),
        (out, maps * (1 + 1e-4)), (out.double(), maps), (out, maps.double()),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_columns(wrong, q, k, v, columns)
    case = cases.Gradients((q, k, v, columns), {}, ("query", "columns"))
    gradients = case.by(reference)
    assert_gradients(gradients, case.autograd)
    assert_gradients(gradients, case.eager)
    for name in gradients:
        wrong = {**gradients, name: gradients[name] * 1.1}
        with pytest.raises(AssertionError):
            assert_gradients(wrong, case.autograd)


def test_sdpa_with_more_values():
    """It is what SDPA gives of V' = [V | G], whose last columns are averaged over the heads."""
    q, k, v, columns = inputs(heads=2, dtype=torch.float64)
    columns = columns.double()
    out, maps = eager_columns(q, k, v, columns)
    spread = columns.expand(2, 2, 5, 2)  # batch, heads, keys, columns
    found = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), torch.cat([v.transpose(1, 2), spread], -1)
    )
    torch.testing.assert_close(found[..., :4].transpose(1, 2), out)
    torch.testing.assert_close(found[..., 4:].mean(1), maps)
