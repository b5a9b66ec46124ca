"""The C++ kernels' gradients against autograd of the reference, on each instruction set."""

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.helpers import on_threads
from tests.pairwise import pairwise
from vstar_kernels.attention import native
from vstar_kernels.attention.frames import cpu, reference
from vstar_kernels.attention.frames.call import FrameWanted, check_call
from vstar_kernels.testing import assert_gradients

pytestmark = pytest.mark.usefixtures("several_threads", "poison")
R = vk.FrameRule
NAMES = ("query", "key", "value")


class Call:
    """A call's gradients, by the kernels and by autograd of the reference."""

    def __init__(self, arguments, options, *, seed=1):
        self.tensors, self.rest, self.options = arguments[:3], arguments[3:], options
        self.call = check_call(*arguments, **options)
        generator = torch.Generator().manual_seed(seed)
        query = self.call.query
        self.grad_out = torch.randn(query.shape, generator=generator).to(query.dtype)
        self.grad_map = None
        if options.get("return_map"):  # as large as the other gradients, in spite of the mean
            shape = self.call.map_shape
            self.grad_map = 10 * torch.randn(shape, generator=generator)

    def gradients(self):
        wanted = FrameWanted(delta=False, offset=False, stat=False)
        out = self.call.query
        found = cpu.backward(self.call, out, (), self.grad_out, self.grad_map, wanted)
        return dict(zip(NAMES, found, strict=False))

    def autograd(self, change):
        leaves = [change(x.detach()).requires_grad_() for x in self.tensors]
        results = reference.frame_attention(*leaves, *self.rest, **self.options)
        grads = [self.grad_out]
        if self.grad_map is None:
            results = (results,)
        else:
            grads.append(self.grad_map)
        grads = [change(g).to(x) for g, x in zip(grads, results, strict=True)]
        found = torch.autograd.grad(results, leaves, grads)
        return dict(zip(NAMES, found, strict=True))

    def check(self, **bounds):
        assert_gradients(self.gradients(), self.autograd, **bounds)


OPTIONS = {
    **cases.OPTIONS,
    "rule": [name for name in cases.RULES if "attenuate" not in name and name != "reference"],
    "tokens": [1, 7, 20],
    "head_dim": [16, 23],
    "dtype": [torch.float32, torch.bfloat16],
    "strides": [name for name in cases.STRIDES if name != "expanded"],
}


@pytest.mark.parametrize(
    ("case", "isa_in_turn"),
    [(case, i) for i, case in enumerate(pairwise(OPTIONS))],
    indirect=["isa_in_turn"],
    ids=lambda x: cases.identify(x) if isinstance(x, dict) else str(x),
)
@pytest.mark.usefixtures("isa_in_turn")
def test_options(case):
    # A query that sees one key has no gradient: what is left is rounding.
    Call(*cases.make(case)).check(vanishing=1e-5)


def inputs(layout, heads=2, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, layout.tokens, heads, head_dim)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


@pytest.mark.parametrize("head_dim", [1, 7, 40, 130])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_head_dims(head_dim, dtype, isa):
    layout = vk.Layout(vk.Frames(3, 13))
    arguments = (*inputs(layout, head_dim=head_dim, dtype=dtype), layout, R.tar(1.0))
    Call(arguments, {"return_map": True}).check()


@pytest.mark.parametrize("stat", ["row_max", "frame_max"])
@pytest.mark.parametrize("clamp", [False, True])
def test_negative_statistics(stat, clamp, isa):
    layout = vk.Layout(vk.Frames(3, 13))
    q, k, v = inputs(layout)
    rule = R.tar(1.0, 0.8, stat, clamp)
    Call((q.abs(), -k.abs(), v, layout, rule), {}).check()


@pytest.mark.parametrize("layout", ["sizes differ", "grid"])
def test_ties_go_to_the_first_key(layout, isa):
    """Keys come in equal pairs, of several frames, so every maximum is there twice."""
    layout = cases.LAYOUTS[layout](10)
    q, k, v = inputs(layout)
    half = layout.tokens // 2
    k[:, half : 2 * half] = k[:, :half]
    Call((q, k, v, layout, R.tar(1.0, stat="row_max")), {}).check()


def test_long():
    layout = vk.Layout(vk.Text(20), vk.Frames(4, 150))
    q, k, v = inputs(layout, head_dim=32)
    Call((q[:1], k[:1], v[:1], layout, R.tar(1.0)), {"return_map": True}).check()


def test_given_statistic():
    layout = vk.Layout(vk.Frames(3, 20), vk.Text(2))
    q, k, v = inputs(layout)
    rule = cases.with_given_statistic(R.tar(1.0), q)
    Call((q, k, v, layout, rule), {}).check()


def test_autograd():
    layout = vk.Layout(vk.Frames(3, 20))
    rule = R.tar(1.0)
    found = {}
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs(layout)]
        out, mean_map = vk.frame_attention(*leaves, layout, rule, return_map=True, backend=backend)
        (out.square().sum() + mean_map.square().sum()).backward()
        found[backend] = [x.grad for x in leaves]
    for kernels, expected in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(kernels, expected, rtol=1e-4, atol=1e-5)


def test_bits_do_not_depend_on_threads():
    layout = vk.Layout(vk.Frames(4, 100))
    call = Call((*inputs(layout), layout, R.tar(1.0)), {"return_map": True})
    results = []
    for threads in (1, 2, 5):
        with on_threads(threads):
            results.append(call.gradients())
    for name in NAMES:
        assert torch.equal(results[1][name], results[0][name])
        assert torch.equal(results[2][name], results[0][name])


def test_refused():
    layout = vk.Layout(vk.Frames(2, 4))
    q, k, v = inputs(layout)
    call = check_call(q, k, v, layout, R.attenuate(0.6, 0))
    with pytest.raises(NotImplementedError, match="rules with factors"):
        cpu.backward(call, q, (), q, None, FrameWanted(False, False, False))
    call = check_call(q, k, v, layout, R.tar(1.0))
    with pytest.raises(NotImplementedError, match="its tables"):
        cpu.backward(call, q, (), q, None, FrameWanted(True, False, False))
