"""tar_attention under autograd, torch.compile, torch.func, autocast and checkpointing."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import vstar_kernels as vk
from vstar_kernels.attention import autograd, cpu, native, reference
from vstar_kernels.attention.call import Wanted, make_call
from vstar_kernels.testing import inputs

pytestmark = pytest.mark.skipif(bool(native.load().problems), reason="no native library")

HEADS, FRAMES = 3, 7
FORMS = {
    "none": lambda entries, **o: None,
    "gaussian": lambda entries, **o: vk.GaussianBias(1.0, **o),
    "toeplitz": vk.ToeplitzBias,
    "toeplitz by head": vk.ToeplitzBias,
    "signed": lambda entries, **o: vk.ToeplitzBias(entries, signed=True, **o),
    "dense": vk.DenseBias,
    "dense by head": vk.DenseBias,
}
ENTRIES = {
    "toeplitz": (FRAMES + 2,),
    "toeplitz by head": (HEADS, FRAMES),
    "signed": (2 * FRAMES + 3,),
    "dense": (FRAMES, FRAMES),
    "dense by head": (HEADS, FRAMES, FRAMES),
}


def leaf_call(
    form="gaussian",
    stat="row_max",
    *,
    shape=(2, FRAMES, HEADS, 4),
    map_block=0,
    map_heads=False,
    **weight,
):
    """A call of leaves that require gradients, in float64."""
    query, key, value = (x.double().requires_grad_() for x in inputs(*shape))
    entries = torch.rand(ENTRIES[form]).double().requires_grad_() if form in ENTRIES else None
    if stat == "tensor":
        stat = torch.randn(shape[:-1]).requires_grad_()
    bias = FORMS[form](entries, stat=stat, strength=0.7, **weight)
    return make_call(query, key, value, bias, 0.5, map_block, map_heads)


# ---- the formulas against autograd ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stat", ["row_max", "map_max", "none", "tensor"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(
    ("map_block", "map_heads"), [(0, False), (1, False), (1, True), (3, False), (3, True)]
)
def test_formulas_of_the_reference(form, stat, clamp, map_block, map_heads):
    for detach in (False, True):
        for shape in ((2, FRAMES, HEADS, 4), (2, 2, FRAMES, HEADS, 4)):
            call = leaf_call(
                form, stat, shape=shape, map_block=map_block, map_heads=map_heads,
                clamp_negative=clamp, detach_stat=detach,
            )  # fmt: skip
            out, mean_map, _ = reference.forward(call)
            grad_out = torch.randn_like(out)
            grad_map = torch.randn_like(mean_map) if map_block else None
            loss = (out * grad_out).sum() + ((mean_map * grad_map).sum() if map_block else 0.0)
            leaves = {n: t for n, t in call.tensors().items() if not (n == "stat" and detach)}
            expected = torch.autograd.grad(loss, list(leaves.values()))
            wanted = Wanted("delta" in leaves, "stat" in leaves)
            gradients = reference.backward(call, out, (), grad_out, grad_map, wanted)
            for name, gradient in zip(leaves, expected, strict=True):
                found = getattr(gradients, name)
                assert found.dtype == gradient.dtype
                torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


# ---- the operator ----


@pytest.mark.parametrize(
    ("form", "stat", "map_block", "map_heads", "backend"),
    [
        ("none", "none", 0, False, "cpu"),
        ("gaussian", "row_max", 3, True, "cpu"),
        ("toeplitz by head", "tensor", 0, False, "cpu"),
        ("signed", "row_max", 1, False, None),
        ("dense", "tensor", 3, False, "cpu"),
        ("dense by head", "tensor", 1, True, "reference"),
    ],
)
def test_opcheck(form, stat, map_block, map_heads, backend):
    call = leaf_call(form, stat, map_block=map_block, map_heads=map_heads)
    arguments = (
        *(x.detach().float().requires_grad_() for x in (call.query, call.key, call.value)),
        None if call.delta is None else call.delta.detach().float().requires_grad_(),
        None if call.stat is None else call.stat.detach().requires_grad_(),
        *call.options,
        backend,
    )
    torch.library.opcheck(torch.ops.vstar_kernels.attention, arguments)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, mean_map = torch.ops.vstar_kernels.attention(*plain)
    torch.library.opcheck(
        torch.ops.vstar_kernels.attention_backward,
        (
            *plain, out, mean_map if map_block else None, out, call.delta is not None,
            stat == "tensor",
        ),
    )  # fmt: skip


def test_inference_does_without_the_operator(monkeypatch):
    monkeypatch.setattr(autograd, "attention", None)
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    with torch.no_grad():
        vk.tar_attention(q, k, v, vk.GaussianBias(1.0))


def test_gradients_come_from_the_kernels(monkeypatch):
    calls = []
    run = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: calls.append(args) or run(*args))
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    vk.tar_attention(q, k, v, vk.GaussianBias(1.0)).sum().backward()
    assert len(calls) == 1
    expected = torch.autograd.grad(
        vk.reference.tar_attention(q, k, v, vk.GaussianBias(1.0)).sum(), (q, k, v)
    )
    for x, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-6)


def test_only_what_is_wanted_has_a_gradient():
    q, k, v = inputs(2, 6, 3, 8)
    table = torch.rand(6)
    out = vk.tar_attention(q, k.requires_grad_(), v, vk.ToeplitzBias(table))
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert table.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_detached_statistic_has_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    stat = torch.rand(2, 6, 3, requires_grad=True)
    bias = vk.GaussianBias(1.0, stat=stat, detach_stat=True)
    vk.tar_attention(q, k, v, bias, backend=backend).sum().backward()
    assert q.grad is not None
    assert stat.grad is None


def test_gradient_of_the_map_alone():
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    bias = vk.GaussianBias(1.0)
    _, mean_map = vk.tar_attention(q, k, v, bias, return_map=True, map_block=2)
    gradients = torch.autograd.grad(mean_map.square().sum(), (q, k, v))
    _, expected_map = vk.reference.tar_attention(q, k, v, bias, return_map=True, map_block=2)
    expected = torch.autograd.grad(expected_map.square().sum(), (q, k, v), allow_unused=True)
    for gradient, other in zip(gradients[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert not gradients[2].any()


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    out = vk.tar_attention(q, k, v, vk.GaussianBias(1.0))
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' has"):
        gradient.sum().backward()
    out = vk.tar_attention(q, k, v, vk.GaussianBias(1.0), backend="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    gradient.sum().backward()


# ---- torch.compile ----


class Layer(torch.nn.Module):
    """A model that uses tar_attention as a processor does."""

    def __init__(self, bias, **options):
        super().__init__()
        self.project = torch.nn.Linear(12, 36)
        self.bias, self.options = bias, options

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 3, 4)).unbind(-3)
        return F.silu(vk.tar_attention(q, k, v, self.bias, **self.options).flatten(-2))


BIASES = {
    "none": None,
    "gaussian": vk.GaussianBias(1.0),
    "toeplitz": vk.ToeplitzBias(torch.rand(40), strength=0.5, stat="map_max"),
    "dense": vk.DenseBias(torch.rand(3, 6, 6), clamp_negative=True, stat="none"),
}


@pytest.mark.parametrize(
    ("bias", "backend"),
    [("none", None), ("gaussian", "cpu"), ("toeplitz", "reference"), ("dense", None)],
)
def test_compiled_in_one_graph(bias, backend):
    torch._dynamo.reset()
    layer = Layer(BIASES[bias], backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_inductor():
    torch._dynamo.reset()
    layer = Layer(vk.GaussianBias(1.0))
    x = torch.randn(2, 6, 12, requires_grad=True)
    out = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(out, layer(x))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("map_heads", [False, True])
def test_a_bias_made_in_the_graph_and_a_map(map_heads):
    torch._dynamo.reset()

    def step(q, k, v):
        out, mean_map = vk.tar_attention(
            q, k, v, vk.GaussianBias(2.0), return_map=True, map_heads=map_heads
        )
        return out.sum() + mean_map.square().sum()

    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradient = torch.autograd.grad(compiled(q, k, v), q)
    torch.testing.assert_close(gradient, torch.autograd.grad(step(q, k, v), q))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_sizes_may_change_without_a_graph_for_each():
    torch._dynamo.reset()
    layer = Layer(vk.GaussianBias(1.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch, frames in ((2, 6), (3, 7), (5, 16), (4, 33)):
            x = torch.randn(batch, frames, 12)
            torch.testing.assert_close(compiled(x), layer(x))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_steps_do_not_recompile():
    torch._dynamo.reset()
    layer = Layer(vk.GaussianBias(1.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 6, 12, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad is not None


# ---- torch.func ----


def test_func_grad():
    q, k, v = inputs(2, 6, 3, 8)
    bias = vk.GaussianBias(1.0)
    gradient = torch.func.grad(lambda q: vk.tar_attention(q, k, v, bias).square().sum())(q)
    expected = torch.func.grad(lambda q: vk.reference.tar_attention(q, k, v, bias).square().sum())(
        q
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["gaussian", "toeplitz"])
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (2, 0, None)])
def test_vmap(form, dims):
    tensors = inputs(4, 2, 4, 6, 3, 8)
    q, k, v = (x if dim is not None else x[0] for x, dim in zip(tensors, dims, strict=True))
    if dims[0] == 2:
        q, k = q.movedim(0, 1), k[:, :, 0]
        q, v = q[:, :, 0].transpose(0, 1).movedim(0, 2), v[:, 0]
    bias = vk.GaussianBias(1.0) if form == "gaussian" else vk.ToeplitzBias(torch.rand(6))

    def run(attention):
        return lambda q, k, v: attention(
            q, k, v, bias, return_map=True, map_heads=form == "toeplitz"
        )

    out, mean_map = torch.func.vmap(run(vk.tar_attention), in_dims=dims)(q, k, v)
    expected, expected_map = torch.func.vmap(run(vk.reference.tar_attention), in_dims=dims)(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_map, expected_map, rtol=1e-5, atol=1e-5)


def test_vmap_of_grad():
    q, k, v = inputs(4, 2, 6, 3, 8)
    bias = vk.GaussianBias(1.0)

    def loss(attention):
        return lambda q, k, v: attention(q, k, v, bias).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss(vk.tar_attention)))(q, k, v)
    expected = torch.func.vmap(torch.func.grad(loss(vk.reference.tar_attention)))(q, k, v)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_a_table_is_refused():
    """And over its gradients; the reference, to which the error points, does both."""
    q, k, v = inputs(2, 6, 3, 8)
    tables = torch.rand(3, 6)

    def attend(table, backend=None):
        return vk.tar_attention(q, k, v, vk.ToeplitzBias(table), backend=backend)

    def sums(table, backend=None):
        return attend(table, backend).square().sum((1, 2, 3))

    for refused, given in ((torch.func.vmap(attend), tables), (torch.func.jacrev(sums), tables[0])):
        with pytest.raises(NotImplementedError, match=r"same for all of it.*backend='reference'"):
            refused(given)
    found = torch.func.vmap(lambda t: attend(t, "reference"))(tables)
    torch.testing.assert_close(found, torch.stack([attend(t) for t in tables]))
    found = torch.func.jacrev(lambda t: sums(t, "reference"))(tables[0])
    expected = torch.autograd.functional.jacobian(sums, tables[0])  # row by row
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- autocast, checkpoints ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(dtype):
    q, k, v = inputs(2, 6, 3, 8)
    with torch.autocast("cpu", dtype=dtype):
        out = vk.tar_attention(q, k.to(dtype), v, vk.GaussianBias(1.0))
        sdpa = F.scaled_dot_product_attention(q, k, v)
        double = vk.tar_attention(q.double(), k.double(), v.double(), backend="reference")
    assert out.dtype == sdpa.dtype == dtype
    assert double.dtype == F.scaled_dot_product_attention(*(x.double() for x in (q, k, v))).dtype
    expected = vk.tar_attention(*(x.to(dtype) for x in (q, k, v)), vk.GaussianBias(1.0))
    assert torch.equal(out, expected)


def test_gradients_under_autocast_have_the_inputs_types():
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vk.tar_attention(q, k, v, vk.GaussianBias(1.0))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 8))

    def attend(q, k, v):
        return vk.tar_attention(q, k, v, vk.GaussianBias(1.0))

    expected = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    checkpoint(attend, q, k, v, use_reentrant=use_reentrant).square().sum().backward()
    for x, gradient in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, gradient)
