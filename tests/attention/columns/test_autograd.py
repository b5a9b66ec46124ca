"""column_attention under autograd, torch.compile, torch.func, autocast and fake tensors."""

import types

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vstar_kernels as vk
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.columns import reference
from vstar_kernels.attention.columns.call import ColumnWanted, check_call


@pytest.fixture
def kernel(monkeypatch):
    """A backend that is not the reference, but computes what it does, and what it was asked for."""
    calls = []

    def forward(call, *, save=False):
        calls.append(("forward", save))
        with torch.no_grad():
            return reference.forward(call)._replace(saved=(call.query[..., 0] * 2,) if save else ())

    def backward(call, out, saved, grad_out, grad_map, wanted):
        assert out is None  # nobody needs it, so it is not kept
        calls.append(("backward", len(saved), wanted))
        return reference.backward(call, out, saved, grad_out, grad_map, wanted)

    module = types.SimpleNamespace(
        unavailable=list, why_not=lambda call: [], forward=forward, backward=backward
    )
    backends = {"kernel": module, "reference": reference}
    monkeypatch.setattr(dispatch.COLUMN_ATTENTION, "backends", backends)
    return calls


def inputs(queries=9, keys=5, heads=2, dim=4, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n, heads, dim) for n in (queries, keys, keys)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    return (*tensors, torch.randn(keys, count, generator=generator))


def leaves(**options):
    return [x.requires_grad_() for x in inputs(**options)]


def loss_of(results):
    results = results if isinstance(results, tuple) else (results,)
    return sum(x.float().square().sum() for x in results)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- what is kept and asked for ----


def test_maps_that_no_gradient_reaches(kernel):
    query, key, value, columns = inputs()
    for wanted, others in ((False, ()), (True, (query,)), (True, (columns,))):
        for tensor in (query, key, columns):
            tensor.requires_grad_(any(tensor is x for x in others))
        value.requires_grad_()
        out, maps = vk.column_attention(query, key, value, columns)
        assert out.requires_grad
        assert maps.requires_grad is wanted
        loss = loss_of((out, maps)) if wanted else loss_of(out)
        assert torch.autograd.grad(loss, value)[0].isfinite().all()


@pytest.mark.parametrize("value", [True, False])
def test_only_what_is_wanted_is_asked_of_the_backend(kernel, value):
    q, k, v, columns = inputs()
    q.requires_grad_()
    loss_of(vk.column_attention(q, k, v if value else None, columns)).backward()
    assert kernel == [
        ("forward", True), ("backward", 1, ColumnWanted(True, False, False, False))
    ]  # fmt: skip


def test_inference_does_without_the_operator(kernel):
    with torch.no_grad():
        vk.column_attention(*leaves())
    assert kernel == [("forward", False)]


@pytest.mark.parametrize("value", [True, False])
def test_gradients_come_from_the_backend(kernel, value):
    def run(backend):
        q, k, v, columns = leaves()
        tensors = (q, k, v, columns) if value else (q, k, columns)
        found = vk.column_attention(q, k, v if value else None, columns, backend=backend)
        return torch.autograd.grad(loss_of(found), tensors)

    close(run("kernel"), run("reference"))


@pytest.mark.parametrize("backend", ["cpu", "kernel"])
@pytest.mark.parametrize("value", [True, False])
def test_nothing_as_large_as_the_weights_is_kept(backend, value, request):
    """Kept are the inputs themselves, and a number for each query and head at most."""
    if backend == "kernel":
        request.getfixturevalue("kernel")
    elif dispatch.COLUMN_ATTENTION.backends["cpu"].unavailable():
        pytest.skip("no native library")
    q, k, v, columns = inputs(queries=300, keys=77, dim=8)
    k, v = (x[:1].expand_as(x) for x in (k, v))
    q.requires_grad_()
    given = {x.untyped_storage().data_ptr() for x in (q, k, v, columns)}
    kept = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = vk.column_attention(q, k, v if value else None, columns, backend=backend)
    assert sum(kept) <= 2 * 2 * 300  # batch, heads, queries
    loss_of(found).backward()
    assert q.grad.any()


def test_second_derivatives_are_refused(kernel):
    q, k, v, columns = leaves()
    loss = loss_of(vk.column_attention(q, k, v, columns))
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"column_attention's kernels.*'reference' has"):
        gradient.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kernel, use_reentrant):
    q, k, v, columns = leaves()
    expected = torch.autograd.grad(loss_of(vk.column_attention(q, k, v, columns)), (q, k, v))
    found = checkpoint(vk.column_attention, q, k, v, columns, use_reentrant=use_reentrant)
    loss_of(found).backward()
    for x, gradient in zip((q, k, v), expected, strict=True):
        close(x.grad, gradient)


# ---- the operator ----


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("wanted", [(True, True, True, True), (True, False, False, False)])
def test_opcheck(value, wanted):
    q, k, v, columns = inputs()
    call = check_call(q, k, v if value else None, columns.clone())
    operators = torch.ops.vstar_kernels
    tensors = [call.query, call.key, call.value, call.columns.clone()]
    wanted = [w and x is not None for w, x in zip(wanted, tensors, strict=True)]
    asked = [
        None if x is None else x.detach().requires_grad_(w)
        for x, w in zip(tensors, wanted, strict=True)
    ]
    torch.library.opcheck(operators.column_attention, (*asked, *call.options, "reference"))
    grads = torch.ones_like(q) if value else None, torch.ones(call.map_shape)
    torch.library.opcheck(
        operators.column_attention_backward,
        (*tensors, *call.options, "reference", *grads, None, *wanted),
    )


class Layer(torch.nn.Module):
    """Cross-attention as a processor calls it; returns the maps' loss too."""

    def __init__(self, value):
        super().__init__()
        self.project, self.value = torch.nn.Linear(8, 8), value

    def forward(self, x, text, columns):
        q, k = (self.project(y).unflatten(-1, (2, 4)) for y in (x, text))
        found = vk.column_attention(q, k, k * 2 if self.value else None, columns)
        return (found[0].flatten(-2) + x, found[1]) if self.value else found


@pytest.mark.parametrize("value", [True, False])
def test_compiled_in_one_graph(value, kernel):
    torch._dynamo.reset()
    layer = Layer(value)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, text, columns = torch.randn(2, 9, 8), torch.randn(2, 5, 8), torch.randn(5, 3)
    with torch.no_grad():
        close(compiled(x, text, columns), layer(x, text, columns))
    x.requires_grad_()
    (found,) = torch.autograd.grad(loss_of(compiled(x, text, columns)), x)
    (expected,) = torch.autograd.grad(loss_of(layer(x, text, columns)), x)
    close(found, expected)


# ---- torch.func ----


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_func_grad(kernel, value, backend):
    q, k, v, columns = inputs()

    def loss(q, name):
        return loss_of(vk.column_attention(q, k, v if value else None, columns, backend=name))

    found = torch.func.grad(loss)(q, backend)
    (expected,) = torch.autograd.grad(loss(q.requires_grad_(), "reference"), q)
    close(found, expected)


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, None, None, None), (2, 0, None, 1)])
def test_vmap(kernel, dims):
    many = [inputs(seed=seed) for seed in range(3)]
    tensors = [torch.stack(x) for x in zip(*many, strict=True)]
    tensors = [x[0] if d is None else x.movedim(0, d) for x, d in zip(tensors, dims, strict=True)]

    def gradient(*x):
        return torch.func.grad(lambda q: loss_of(vk.column_attention(q, *x[1:])))(x[0])

    out, maps = torch.func.vmap(vk.column_attention, in_dims=dims)(*tensors)
    alone = torch.func.vmap(lambda q, k, v, g: vk.column_attention(q, k, None, g), in_dims=dims)(
        *tensors
    )
    gradients = torch.func.vmap(gradient, in_dims=dims)(*tensors)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)]
        expected = vk.column_attention(*one)
        close((out[i], maps[i], alone[i]), (*expected, expected[1]))
        close(gradients[i], gradient(*one))


# ---- autocast, fake and meta tensors ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(kernel, dtype):
    q, k, v, columns = inputs()
    q.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out, maps = vk.column_attention(q, k.to(dtype), v, columns)
    assert (out.dtype, maps.dtype) == (dtype, torch.float32)
    expected = vk.column_attention(*(x.to(dtype) for x in (q, k, v)), columns)
    assert torch.equal(out, expected[0])
    assert torch.equal(maps, expected[1])
    loss_of((out, maps)).backward()
    assert q.grad.dtype == torch.float32


def test_fake_and_meta_tensors(kernel):
    meta = [x.to("meta") for x in inputs()]
    with FakeTensorMode():
        fake = [torch.empty(x.shape) for x in meta]
        faked = (*vk.column_attention(*fake), vk.column_attention(*fake[:2], None, fake[3]))
    for found in (faked, (*vk.column_attention(*meta),
                          vk.column_attention(*meta[:2], None, meta[3]))):  # fmt: skip
        assert [x.shape for x in found] == [(2, 9, 2, 4), (2, 9, 3), (2, 9, 3)]
        assert all(x.dtype == torch.float32 for x in found)
    assert kernel == []
