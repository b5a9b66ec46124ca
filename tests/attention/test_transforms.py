"""PyTorch's transformations of the operations: what each gives is what the formula gives.

The formula is the reference in float64, without a transformation where one can do without.
"""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

import vstar_kernels as vk
from tests.versions import is_before
from vstar_kernels.attention.dispatch import SlowBackendWarning

FRAMES, TOKENS = 3, 2
LAYOUT = vk.Layout(vk.Frames(FRAMES, TOKENS))
RULE = vk.FrameRule.tar(1.0)
OPERATIONS = {
    "tar_attention": lambda q, k, v, **o: vk.tar_attention(q, k, v, vk.GaussianBias(1.0), **o),
    "frame_attention": lambda q, k, v, **o: vk.frame_attention(q, k, v, LAYOUT, RULE, **o),
    "column_attention": lambda q, k, v, **o: torch.cat(
        [x.flatten(1) for x in vk.column_attention(q, k, v, columns(q), **o)], 1
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::vstar_kernels.SlowBackendWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def columns(query):
    """The second and the last key."""
    return torch.eye(FRAMES * TOKENS, device=query.device)[:, [1, -1]]


@pytest.fixture(params=OPERATIONS)
def attend(request):
    return OPERATIONS[request.param]


@pytest.fixture
def exact(attend):
    """The formula, in float64."""

    def run(*tensors):
        return attend(*(x.double() for x in tensors), backend="reference").float()

    return run


def inputs(*lead, count=3):
    generator = torch.Generator().manual_seed(len(lead))
    shape = (*lead, 2, FRAMES * TOKENS, 2, 8)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def assert_near(found, expected, bound=2e-5):
    assert found.abs().max() > 0
    torch.testing.assert_close(found.float(), expected.float(), rtol=bound, atol=bound)


def tangent_of(function, tensors, tangents):
    """The derivative along the tangents, by finite differences; maps are float32 at best."""
    step = 1e-3
    tensors = [x.double() for x in tensors]
    there, back = (
        function(*(x + sign * step * t.double() for x, t in zip(tensors, tangents, strict=True)))
        for sign in (1, -1)
    )
    return (there - back) / (2 * step)


def float64(attend):
    return lambda *tensors: attend(*tensors, backend="reference")


# ---- forward mode: by the reference, as the kernels have no such derivative ----


def test_dual_tensors(attend):
    tensors, tangents = inputs(), inputs(count=6)[3:]
    expected = tangent_of(float64(attend), tensors, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        out = forward_ad.unpack_dual(attend(*duals))
        assert_near(out.tangent, expected, 1e-3)
        assert_near(out.primal, attend(*tensors))
        assert forward_ad.unpack_dual(attend(tensors[0], duals[1], tensors[2])).tangent is not None
        assert forward_ad.unpack_dual(attend(*tensors)).tangent is None


def test_jvp_and_jacfwd(attend):
    tensors, tangents = inputs(), inputs(count=6)[3:]
    out, tangent = torch.func.jvp(attend, tuple(tensors), tuple(tangents))
    assert_near(out, attend(*tensors))
    assert_near(tangent, tangent_of(float64(attend), tensors, tangents), 1e-3)
    forward, backward = (j(attend)(*tensors) for j in (torch.func.jacfwd, torch.func.jacrev))
    assert_near(forward, backward)


def test_forward_over_reverse(attend):
    query, key, value = inputs()

    def loss(query, backend=None):
        return attend(query, key.to(query), value.to(query), backend=backend).square().sum()

    hessian = torch.func.hessian(loss)(query)
    twice = torch.autograd.functional.hessian(lambda q: loss(q, "reference"), query)
    assert_near(hessian, twice, 1e-3)


def test_jacobian_in_forward_mode(attend):
    query, key, value = inputs()
    jacobian = torch.autograd.functional.jacobian
    run = lambda q: attend(q, key, value)  # noqa: E731
    forward = jacobian(run, query, vectorize=True, strategy="forward-mode")
    assert_near(forward, jacobian(run, query))


def test_a_named_backend_says_that_it_has_no_forward_mode():
    query, key, value = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        assert "forward-mode" in vk.backends.why_not(dual, key, value)["cpu"][-1]
        assert vk.backends.why_not(dual, key, value)["reference"] == []
        with pytest.raises(ValueError, match="has no forward-mode derivative, and a tensor"):
            vk.tar_attention(dual, key, value, backend="cpu")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vk.tar_attention(dual, key, value, scale=0.123)
        assert {x.category for x in caught} <= {SlowBackendWarning}


# ---- vmap, and gradients around and inside of it ----


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None)])
def test_vmap(attend, mapped, backend):
    many = inputs(3)
    given = [x if dim == 0 else x[0] for x, dim in zip(many, mapped, strict=True)]
    found = torch.vmap(lambda *x: attend(*x, backend=backend), in_dims=mapped)(*given)
    rows = [
        attend(*(x[i] if dim == 0 else x for x, dim in zip(given, mapped, strict=True)))
        for i in range(3)
    ]
    assert_near(found, torch.stack(rows))


def test_vmap_over_another_dimension(attend):
    many = inputs(3)
    found = torch.vmap(attend, in_dims=(1, 0, 0))(many[0].movedim(0, 1), *many[1:])
    assert_near(found, torch.vmap(attend)(*many))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_of_vmap_and_vmap_of_gradients(attend, backend):
    many = inputs(3)

    def loss(*tensors):
        return attend(*tensors, backend=backend).square().sum()

    leaves = [x.clone().requires_grad_() for x in many]
    sum(float64(attend)(*(x[i] for x in leaves)).square().sum() for i in range(3)).backward()
    of_vmap = torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), argnums=(0, 1, 2))(*many)
    vmap_of = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*many)
    for leaf, one, other in zip(leaves, of_vmap, vmap_of, strict=True):
        assert_near(one, leaf.grad)
        assert_near(other, leaf.grad)


def test_vmap_of_gradients_of_empty_tensors():
    """A gradient that is empty is one all the same, and has the mapped dimension."""
    no_heads, no_queries = torch.empty(3, 2, 4, 0, 8), torch.empty(3, 2, 0, 2, 8)
    text = torch.randn(2, 4, 2, 8)
    gradient = torch.func.grad(lambda q: vk.tar_attention(q, q, q).sum())
    assert torch.vmap(gradient)(no_heads).shape == no_heads.shape
    gradient = torch.func.grad(lambda q: vk.column_attention(q, text, None, torch.eye(4)).sum())
    assert torch.vmap(gradient)(no_queries).shape == no_queries.shape


def test_nested_vmap(attend):
    many = inputs(2, 3)
    found = torch.vmap(torch.vmap(attend))(*many)
    flat = torch.vmap(attend)(*(x.flatten(0, 1) for x in many))
    assert_near(found, flat.unflatten(0, (2, 3)))


def test_batched_gradients(attend, exact):
    tensors = [x.requires_grad_() for x in inputs()]
    out = attend(*tensors)
    many = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(out, tensors, many, is_grads_batched=True)
    for index in range(3):
        expected = torch.autograd.grad(exact(*tensors), tensors, many[index])
        for all_of, one in zip(found, expected, strict=True):
            assert_near(all_of[index], one)


def test_vectorized_jacobian(attend):
    query, key, value = inputs()
    jacobian = torch.autograd.functional.jacobian
    vectorized = jacobian(lambda q: attend(q, key, value), query, vectorize=True)
    assert_near(vectorized, torch.func.jacrev(attend)(query, key, value))


# ---- to the table of a rule, which is copied where nothing follows it ----


@pytest.fixture
def by_table():
    tensors = inputs()

    def run(table, backend=None):
        rule = vk.FrameRule.bias(table, 0.5, "frame_max")
        return vk.frame_attention(*tensors, LAYOUT, rule, backend=backend)

    return run


def tables(*lead):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*lead, FRAMES, FRAMES, generator=generator)


def test_tangents_of_a_rules_table(by_table):
    table, tangent = tables(2)
    expected = (by_table(table + 0.01 * tangent) - by_table(table - 0.01 * tangent)) / 0.02
    assert_near(torch.func.jvp(by_table, (table,), (tangent,))[1], expected, 1e-3)
    with forward_ad.dual_level():
        out = by_table(forward_ad.make_dual(table, tangent))
        assert_near(forward_ad.unpack_dual(out).tangent, expected, 1e-3)
    jacobians = [j(by_table)(table) for j in (torch.func.jacfwd, torch.func.jacrev)]
    assert_near(*jacobians)


def test_vmap_over_a_rules_table(by_table):
    many = tables(3)
    found = torch.vmap(lambda table: by_table(table, "reference"))(many)
    assert_near(found, torch.stack([by_table(table) for table in many]))
    with pytest.raises(NotImplementedError, match=r"maps over the batch.*backend='reference'"):
        torch.vmap(by_table)(many)


# ---- the rest ----


def test_functionalize(attend):
    tensors = inputs()
    assert torch.equal(torch.func.functionalize(attend)(*tensors), attend(*tensors))


@pytest.mark.skipif(is_before("torch", "2.13"), reason="dynamo traces it since torch 2.13")
def test_vmap_in_a_compiled_function(attend):
    many = inputs(3)
    torch._dynamo.reset()
    compiled = torch.compile(torch.vmap(attend), backend="aot_eager", fullgraph=True)
    assert_near(compiled(*many), torch.vmap(attend)(*many))
    leaves = [x.requires_grad_() for x in many]
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(torch.vmap(attend)(*leaves).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_tangents_in_a_compiled_function_are_refused(attend):
    """Where a graph need not be whole, torch does without one and computes them."""
    tensors = inputs()

    def tangents(*primals):
        return torch.func.jvp(attend, primals, primals)[1]

    torch._dynamo.reset()
    compiled = torch.compile(tangents, backend="aot_eager", fullgraph=True)
    # Of frame_attention dynamo refuses the layout's tables before, in its own words.
    words = r"no forward-mode derivative under|conversion to view functorch tensor"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(*tensors)
    torch._dynamo.reset()
    compiled = torch.compile(tangents, backend="aot_eager")
    assert torch.equal(compiled(*tensors), tangents(*tensors))


@pytest.mark.parametrize("option", ["scale", "strength", "sigma"])
def test_compiled_with_options_that_vary(option):
    """torch.compile makes them symbols when it sees a second value."""
    tensors = inputs()

    def run(number):
        scale = number if option == "scale" else None
        bias = vk.GaussianBias(
            number if option == "sigma" else 1.0,
            strength=number if option == "strength" else 1.0,
        )
        return vk.tar_attention(*tensors, bias, scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for number in (0.5, 0.75, 1.25):
        assert torch.equal(compiled(number), run(number))
