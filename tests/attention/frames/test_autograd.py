"""frame_attention under autograd, torch.compile, torch.func, autocast and fake tensors."""

import dataclasses
import types

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vstar_kernels as vk
from tests.attention.frames import cases
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.frames import reference
from vstar_kernels.attention.frames.call import FrameWanted, check_call

LAYOUT = vk.Layout(vk.Text(2), vk.Frames(3, 4), vk.Text(1))
R = vk.FrameRule


@pytest.fixture
def kernel(monkeypatch):
    """A backend that is not the reference, but computes what it does, and what it was asked for."""
    calls = []

    def forward(call, *, save=False):
        calls.append(("forward", save))
        with torch.no_grad():
            return reference.forward(call)._replace(saved=(call.query * 2,) if save else ())

    def backward(call, out, saved, grad_out, grad_map, wanted):
        calls.append(("backward", len(saved), wanted))
        return reference.backward(call, out, saved, grad_out, grad_map, wanted)

    module = types.SimpleNamespace(
        unavailable=list, why_not=lambda call: [], forward=forward, backward=backward
    )
    backends = {"kernel": module, "reference": reference}
    monkeypatch.setattr(dispatch.FRAME_ATTENTION, "backends", backends)
    return calls


def inputs(*, dtype=torch.float32, heads=4, key_heads=2, tokens=LAYOUT.tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, tokens, h, 4) for h in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def leaves(**options):
    return [x.requires_grad_() for x in inputs(**options)]


def trained(*, stat="none", heads=()):
    """A rule with a table that requires a gradient, and that table."""
    table = cases.table(LAYOUT, None, *heads).requires_grad_()
    return R.bias(table, 0.6, stat), table


# ---- the formulas against autograd ----

GRADIENT_RULES = {
    "none": lambda: R(),
    "frame_max": lambda: R.tar(1.0, 0.7),
    "row_max": lambda: R.tar(1.0, 0.7, "row_max"),
    "clamped": lambda: R.tar(1.0, -0.7, "row_max", True),
    "frame_max in a window": lambda: R.tar(1.0) + R.window(1),
    "factors": lambda: R.tar(1.0, stat="row_max") + R.attenuate(0.4, 2, metric="token"),
    "factors of a mean": lambda: R.tar(1.0) + R.attenuate(0.4, 1) + R.band(2),
    "by head": lambda: R.bias(cases.table(LAYOUT, None, 4), 0.7, "frame_max"),
    "mask by head": lambda: R.bias(cases.masked(cases.table(LAYOUT, None, 4))) + R.tar(1.0),
    "given": lambda: R.tar(1.0, stat=torch.randn(2, LAYOUT.tokens, 4).requires_grad_()),
    "given, clamped": lambda: R.tar(
        1.0, stat=torch.randn(2, LAYOUT.tokens, 4).requires_grad_(), clamp_negative=True
    ),
    "trained": lambda: trained()[0],
    "trained by head": lambda: trained(heads=(4,))[0] + R.window(1),
    "trained by stat": lambda: trained(stat="frame_max")[0] + trained(heads=(4,))[0],
}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
@pytest.mark.parametrize("return_map", ["none", "mean", "heads"])
@pytest.mark.parametrize("lengths", [None, [0, 6]])
def test_formulas_of_the_reference(rule, return_map, lengths, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 600)  # several chunks
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32)
    call = check_call(
        *leaves(dtype=torch.float64), LAYOUT, GRADIENT_RULES[rule](), key_lengths=lengths,
        return_map=return_map != "none", map_heads=return_map == "heads",
    )  # fmt: skip
    out, mean_map, _ = reference.forward(call)
    grad_out = torch.randn_like(out)
    loss, grad_map = (out * grad_out).sum(), None
    if mean_map is not None:
        grad_map = torch.randn_like(mean_map)
        loss = loss + (mean_map * grad_map).sum()
    names = [n for n, t in call.tensors().items() if t.requires_grad]
    expected = torch.autograd.grad(loss, [getattr(call, n) for n in names])
    wanted = FrameWanted(*(n in names for n in FrameWanted._fields))
    with torch.no_grad():
        gradients = reference.backward(call, out, (), grad_out, grad_map, wanted)
    for name, gradient in zip(names, expected, strict=True):
        found = getattr(gradients, name)
        assert found.dtype == gradient.dtype
        assert found.shape == gradient.shape
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6, msg=name)
    for name in FrameWanted._fields:
        assert (getattr(gradients, name) is not None) == (name in names)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 600)
    rule = R.tar(1.0) + R.attenuate(0.4, 1)

    def run(q, k, v):
        return vk.frame_attention(q, k, v, LAYOUT, rule, return_map=True, backend="reference")

    q, k, v = leaves(dtype=torch.float64, heads=2, key_heads=1)
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0], (q, k, v), fast_mode=True)
    layout = vk.Layout(vk.Frames(2, 2), vk.Text(1))
    q, k, v = leaves(dtype=torch.float64, heads=1, key_heads=1, tokens=5)
    assert torch.autograd.gradgradcheck(
        lambda *x: vk.frame_attention(*x, layout, R.tar(1.0), backend="reference"), (q, k, v)
    )


def test_the_reference_keeps_no_maps_for_its_gradient(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 600)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    q, k, v = leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0), backend="reference")
    assert max(kept, default=0) <= 2 * LAYOUT.tokens * 4 * 4  # the output's size


# ---- the operator ----


@pytest.mark.parametrize("rule", ["none", "frame_max", "given", "trained by stat", "factors"])
@pytest.mark.parametrize("mean_map", ["none", "heads"])
def test_opcheck(rule, mean_map):
    call = check_call(
        *leaves(), LAYOUT, GRADIENT_RULES[rule](), return_map=mean_map != "none",
        map_heads=mean_map == "heads", key_lengths=torch.tensor([3, 20], dtype=torch.int32),
    )  # fmt: skip
    tensors = [getattr(call, f.name) for f in dataclasses.fields(call)[:-1]]
    tensors = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
    torch.library.opcheck(
        torch.ops.vstar_kernels.frame_attention, (*tensors, *call.options, "reference")
    )
    plain = [None if x is None else x.detach() for x in tensors]
    out, found = torch.ops.vstar_kernels.frame_attention(*plain, *call.options, "reference")
    wanted = [call.delta is not None, call.offset is not None, call.stat is not None]
    torch.library.opcheck(
        torch.ops.vstar_kernels.frame_attention_backward,
        (
            *plain, *call.options, "reference", out, found if mean_map != "none" else None, out,
            *wanted,
        ),
    )  # fmt: skip


def test_inference_does_without_the_operator(kernel):
    with torch.no_grad():
        vk.frame_attention(*leaves(), LAYOUT, R.tar(1.0))
    assert kernel == [("forward", False)]


def test_gradients_come_from_the_backend(kernel):
    q, k, v = leaves()
    rule, table = trained(stat="frame_max")
    out, mean_map = vk.frame_attention(q, k, v, LAYOUT, rule, return_map=True)
    found = torch.autograd.grad(out.sum() + mean_map.square().sum(), (q, k, v, table))
    assert kernel == [("forward", True), ("backward", 1, FrameWanted(True, False, False))]
    out, mean_map = vk.frame_attention(q, k, v, LAYOUT, rule, return_map=True, backend="reference")
    expected = torch.autograd.grad(out.sum() + mean_map.square().sum(), (q, k, v, table))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_wanted_has_a_gradient(kernel):
    q, k, v = inputs()
    vk.frame_attention(q, k.requires_grad_(), v, LAYOUT, R.tar(1.0)).sum().backward()
    assert k.grad is not None
    assert q.grad is None


def test_second_derivatives_are_refused(kernel):
    q, k, v = leaves()
    out = vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0))
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"frame_attention's kernels.*backend='reference'"
    ):
        gradient.sum().backward()


# ---- torch.compile ----


class Layer(torch.nn.Module):
    """A model that uses frame_attention as a processor does."""

    def __init__(self, rule, **options):
        super().__init__()
        self.project = torch.nn.Linear(12, 36)
        self.rule, self.options = rule, options

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 3, 4)).unbind(-3)
        return F.silu(vk.frame_attention(q, k, v, LAYOUT, self.rule, **self.options).flatten(-2))


COMPILED_RULES = {
    "none": lambda: None,
    "tar": lambda: R.tar(1.0),
    "everything": lambda: R.tar(1.0) + R.attenuate(0.4, 2, metric="token") + R.band(2)
    + R.window(1),
    "identity": R.identity,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "backend"),
    [("none", None), ("tar", "reference"), ("everything", None), ("identity", None)],
)
def test_compiled_in_one_graph(rule, backend, kernel):
    torch._dynamo.reset()
    layer = Layer(COMPILED_RULES[rule](), backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, LAYOUT.tokens, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_inductor_sees_another_rule(kernel):
    torch._dynamo.reset()
    layer = Layer(R.tar(1.0))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, LAYOUT.tokens, 12, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.rule = R.window(0) + R.tar(2.0)
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_two_layers_in_a_graph(kernel):
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        Layer(R.tar(1.0)), Layer(R.window(1)), Layer(R.tar(2.0)), Layer(R.window(1))
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, LAYOUT.tokens, 12, requires_grad=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_graph_is_of_one_rule_and_one_layout(kernel):
    """Also where another object lies where a deleted one lay, and so has its id."""
    torch._dynamo.reset()
    held = types.SimpleNamespace(layout=LAYOUT, rule=None)

    def step(q, k, v):
        return vk.frame_attention(q, k, v, held.layout, held.rule)

    q, k, v = (x.detach() for x in leaves())
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for sigma in (0.5, 1.0, 2.0):
        for layout in (LAYOUT, vk.Layout(vk.Frames(LAYOUT.tokens, 1))):
            held.layout, held.rule = layout, None
            held.rule = R.tar(sigma)
            torch.testing.assert_close(compiled(q, k, v), step(q, k, v))


@pytest.mark.parametrize("what", ["rule", "layout"])
def test_what_is_made_in_the_graph_is_refused(what, kernel):
    """What a graph makes has no value yet when the tables are made."""
    torch._dynamo.reset()

    def step(q, k, v):
        rule = R.tar(1.0) + R.window(1) if what == "rule" else None
        layout = vk.Layout(vk.Text(3), vk.Frames(3, 4)) if what == "layout" else LAYOUT
        return vk.frame_attention(q, k, v, layout, rule)

    with pytest.raises(Exception, match="made outside of the compiled function"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs())


def test_a_table_is_trained_in_a_graph(kernel):
    torch._dynamo.reset()
    rule, table = trained(stat="frame_max")
    rule = rule + R.window(1)

    def step(q, k, v):
        out, mean_map = vk.frame_attention(q, k, v, LAYOUT, rule, return_map=True)
        return out.square().sum() + mean_map.square().sum()

    tensors = leaves()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), (*tensors, table))
    torch.testing.assert_close(found, torch.autograd.grad(step(*tensors), (*tensors, table)))


@pytest.fixture
def forward_only(kernel, monkeypatch):
    """As kernel, but a backend that refuses a gradient, as it sees that one is required."""
    module = dispatch.FRAME_ATTENTION.backends["kernel"]

    def why_not(call):
        required = torch.is_grad_enabled() and call.requires_grad
        return ["computes no gradients"] * required

    monkeypatch.setattr(module, "why_not", why_not)
    return kernel


@pytest.mark.filterwarnings("ignore::vstar_kernels.SlowBackendWarning")
@pytest.mark.parametrize("rule", ["factors", "trained"])
def test_a_graph_has_gradients_that_the_backend_of_its_forward_pass_has_not(rule, forward_only):
    """What runs in a graph sees no tensor that requires a gradient."""
    torch._dynamo.reset()
    rule, tensors = GRADIENT_RULES[rule](), leaves()

    def step(q, k, v, backend=None):
        return vk.frame_attention(q, k, v, LAYOUT, rule, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), tensors)
    assert forward_only == [("forward", False)]
    torch.testing.assert_close(found, torch.autograd.grad(step(*tensors), tensors))
    with pytest.raises(ValueError, match=r"'kernel' cannot run this call:\n.*no gradients"):
        compiled(*tensors, "kernel").backward()


@torch._dynamo.config.patch(error_on_recompile=True)
def test_steps_do_not_recompile(kernel):
    torch._dynamo.reset()
    layer = Layer(R.tar(1.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, LAYOUT.tokens, 12, requires_grad=True)
        compiled(x).sum().backward()


# ---- torch.func ----


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_func_grad(kernel, backend):
    q, k, v = inputs()

    def loss(q, name):
        return vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0), backend=name).square().sum()

    found = torch.func.grad(loss)(q, backend)
    (expected,) = torch.autograd.grad(loss(q.requires_grad_(), "reference"), q)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (2, 0, None)])
@pytest.mark.parametrize("lengths", [False, True])
def test_vmap(kernel, dims, lengths):
    many = [inputs(seed=seed) for seed in range(3)]
    tensors = [torch.stack(x) for x in zip(*many, strict=True)]
    tensors = [x[0] if d is None else x.movedim(0, d) for x, d in zip(tensors, dims, strict=True)]
    counts = torch.tensor([7, 15], dtype=torch.int32) if lengths else None

    def run(q, k, v):
        options = {"key_lengths": counts, "return_map": True}
        return vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0), **options)

    out, mean_map = torch.func.vmap(run, in_dims=dims)(*tensors)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)]
        expected, expected_map = run(*one)
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(mean_map[i], expected_map)


def test_vmap_of_grad(kernel):
    many = [inputs(seed=seed) for seed in range(3)]
    tensors = [torch.stack(x) for x in zip(*many, strict=True)]

    def loss(q, k, v):
        return vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(*tensors)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.func.grad(loss)(*many[i]), rtol=1e-4, atol=1e-5)


def test_a_rule_first_seen_by_a_transform_serves_every_other(kernel):
    """What is kept of a rule's tables is no tensor of the transform that was on."""
    q, k, v = inputs()
    rule = R.tar(0.987) + R.window(1)
    torch.func.grad(lambda q: vk.frame_attention(q, k, v, LAYOUT, rule).sum())(q)
    with torch.inference_mode():
        expected = vk.frame_attention(q, k, v, LAYOUT, rule)
    rule = R.tar(0.986) + R.window(1)
    with torch.inference_mode():
        vk.frame_attention(q, k, v, LAYOUT, rule)
    q.requires_grad_()
    vk.frame_attention(q, k, v, LAYOUT, rule).sum().backward()
    torch.testing.assert_close(
        expected, vk.frame_attention(q, k, v, LAYOUT, R.tar(0.987) + R.window(1)).detach()
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_checkpoint(kernel, use_reentrant, backend):
    q, k, v = leaves()

    def attend(q, k, v):
        return vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0), backend=backend)

    expected = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    checkpoint(attend, q, k, v, use_reentrant=use_reentrant).square().sum().backward()
    for x, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)


# ---- autocast, fake and meta tensors ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(kernel, dtype):
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out = vk.frame_attention(q, k.to(dtype), v, LAYOUT, R.tar(1.0))
    assert out.dtype == dtype
    expected = vk.frame_attention(*(x.to(dtype) for x in (q, k, v)), LAYOUT, R.tar(1.0))
    assert torch.equal(out, expected)


def test_gradients_under_autocast_have_the_inputs_types(kernel):
    q, k, v = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_fake_tensors(kernel):
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, dtype=torch.bfloat16) for x in inputs())
        out, mean_map = vk.frame_attention(q, k, v, LAYOUT, R.tar(0.7) + R.band(1), return_map=True)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (mean_map.shape, mean_map.dtype) == ((2, 3, 4), torch.float32)


def test_meta_tensors(kernel):
    q, k, v = (x.to("meta") for x in inputs())
    out, mean_map = vk.frame_attention(q, k, v, LAYOUT, R.tar(1.0), return_map=True, map_heads=True)
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert mean_map.shape == (2, 4, 3, 4)
