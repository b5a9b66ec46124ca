"""The C++ backward and mean map against autograd of the float64 oracle, for every instruction set.

Through the operators themselves: what autograd puts around them is tested elsewhere.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.attention.cpu_call import Call, assert_gradients, assert_map
from tests.attention.test_cpu import layouts
from tests.helpers import on_threads
from tests.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATS = ["row_max", "map_max", "none", "tensor"]
pytestmark = pytest.mark.usefixtures("isa", "one_thread")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 130])
def test_frames(frames, dtype):
    call = Call(3, frames, 2, 40, dtype=dtype)
    assert_gradients(call)
    assert_map(call)


@pytest.mark.parametrize("frames", [257, 513])
def test_many_frames(frames):
    call = Call(1, frames, 2, 64)
    assert_gradients(call)
    assert_map(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 9, 31, 40, 64, 72, 80, 96, 128, 160, 200, 256])
def test_head_dims(head_dim, dtype):
    assert_gradients(Call(2, 19, 3, head_dim, dtype=dtype, form="dense"))


OPTIONS = {
    "form": ["signed", "dense"],
    "heads": [1, 4],
    "stat": STATS,
    "clamp": [False, True],
    "detach": [False, True],
    "frames": [13, 70],
}


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: "-".join(map(str, c.values())))
def test_options(case):
    """Pairs of them: bindings/tests/test_backward.cpp has all of their combinations."""
    form, heads, stat, clamp, detach, frames = case.values()
    call = Call(
        *(2, 3, frames, 4, 24),
        form=form,
        heads=heads,
        stat=stat,
        strength=-0.7 if clamp else 1.3,
        clamp=clamp,
        detach=detach,
        with_map=heads == 1,
    )
    assert_gradients(call)
    assert_map(call)


@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (2, 3, 37, 3, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_for_each_head(shape, dtype):
    call = Call(*shape, dtype=dtype, map_heads=True)
    assert_gradients(call)
    assert_map(call)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("frames", [1, 13, 70])
def test_symmetric_tables(heads, frames):
    """Both halves of the gradient over j − i are added up in the table over |j − i|."""
    assert_gradients(Call(2, 3, frames, 4, 24, form="symmetric", heads=heads))


def test_without_a_bias():
    assert_gradients(Call(2, 37, 3, 24, form="none", stat="none"))


@pytest.mark.parametrize("stat", ["row_max", "map_max", "tensor"])
def test_clamped_statistics(stat):
    """Below zero nothing passes; at zero it does, as through torch.clamp up to torch 2.13."""
    call = Call(2, 21, 3, 16, stat=stat, clamp=True)
    call.query[0] = call.query[0].abs()
    call.key = -call.key.abs()
    call.query[1, ::2] = 0.0  # statistics of exactly zero
    if stat == "tensor":
        call.stat_tensor[0], call.stat_tensor[1, ::2] = -1.0, 0.0
    assert_gradients(call)
    if stat == "tensor":
        stat_grad = call.gradients()["stat"]
        assert not stat_grad[0].any()
        assert stat_grad[1, ::2].all()


@pytest.mark.parametrize("stat", ["row_max", "map_max"])
@pytest.mark.parametrize("frames", [9, 40, 70])
def test_equal_logits(stat, frames):
    """The first of equal maxima takes the gradient."""
    call = Call(2, frames, 3, 16, stat=stat)
    call.query, call.key = (x.sign() for x in (call.query, call.key))
    call.query[0], call.key[0] = 1.0, 1.0  # all of them
    assert_gradients(call)


@pytest.mark.parametrize("scale", [0.0, 2.0, -0.3])
def test_scale(scale):
    assert_gradients(Call(2, 21, 3, 16, scale=scale))


@pytest.mark.parametrize("shape", [(3, 35, 2, 20), (2, 3, 17, 4, 16), (2, 5, 70, 2, 8)])
@pytest.mark.parametrize("layout", layouts((1,)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(shape, layout, dtype):
    """Gradients of the inputs' layouts: full_like keeps the strides of dense ones."""
    call = Call(*shape, dtype=dtype)
    expected = call.gradients()
    change = layouts(shape)[layout]
    for name in ("query", "key", "value", "grad_out"):
        setattr(call, name, change(getattr(call, name)))
        for which, grad in call.gradients().items():
            assert torch.equal(grad, expected[which]), f"{name}: {which}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [9, 40])
def test_any_gradient_of_the_output(frames, dtype):
    """Expanded, as of a sum, or with head_dim not contiguous."""
    call = Call(2, 3, frames, 2, 20, dtype=dtype)
    wide = torch.cat([call.grad_out, call.grad_out], dim=-1)
    for grad in (
        torch.ones((), dtype=dtype).expand(call.query.shape),
        call.grad_out[..., :1].expand(call.query.shape),
        call.grad_out[:1, :, :1].expand(call.query.shape),
        call.grad_out.transpose(-1, 2).contiguous().transpose(-1, 2),
        wide[..., ::2],
    ):
        call.grad_out = grad.contiguous()
        expected = call.gradients()
        call.grad_out = grad
        for name, x in call.gradients().items():
            assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("frames", [9, 70])
def test_containment(frames):
    """NaN in one sequence stays out of the gradients of all others, which no sum unites."""
    clean = Call(2, frames, 3, 16)
    expected = clean.gradients()
    for name in ("query", "key", "value", "grad_out"):
        call = Call(2, frames, 3, 16)
        getattr(call, name)[1, 4, 2, 5] = math.nan
        grads = call.gradients()
        touched = torch.zeros_like(call.query, dtype=torch.bool)
        touched[1, :, 2] = True
        for which in ("query", "key", "value"):
            assert torch.equal(grads[which][~touched], expected[which][~touched])
        assert grads["query"][1, 4, 2].isnan().all()
        assert grads["delta"].isnan().any()
        if name != "grad_out":
            _, mean_map = call.forward()
            assert mean_map[0].isfinite().all()
            assert name == "value" or mean_map[1, 4].isnan().all()


def test_bits_do_not_depend_on_threads():
    cases = [
        (shape, form)
        for shape in [(1, 2, 300, 2, 40), (1, 520, 1, 24), (3, 50, 33, 3, 40), (97, 16, 5, 8)]
        for form in ("signed", "dense")
    ]
    # One thread alone stores the last one's gradients past the caches.
    for shape, form in [*cases, ((145, 16, 5, 64), "signed")]:
        call = Call(*shape, form=form)
        results = []
        for threads in (1, 2, 5):
            with on_threads(threads):
                results.append([*call.gradients().values(), *call.forward()])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_bits_repeat():
    call = Call(3, 70, 2, 64)
    first = [*call.gradients().values(), *call.forward()]
    for _ in range(20):
        assert all(map(torch.equal, [*call.gradients().values(), *call.forward()], first))


def test_the_map_does_not_change_the_output():
    for frames in (9, 40, 300):
        call = Call(2, 3, frames, 2, 20)
        arguments = call.forward_arguments(with_map=False)
        torch.ops.vstar_kernels.cpu_forward(*arguments)
        assert torch.equal(call.forward()[0], arguments[0])


def test_bits_do_not_depend_on_neighbours():
    whole = Call(4, 37, 3, 40, with_map=False)
    grads = whole.gradients()
    for b in range(4):
        for h in range(3):
            one = (slice(b, b + 1), slice(None), slice(h, h + 1))
            part = Call(1, 37, 1, 40, with_map=False)
            for name in ("query", "key", "value", "grad_out"):
                setattr(part, name, getattr(whole, name)[one])
            part.delta = whole.delta
            for name, x in part.gradients().items():
                assert name == "delta" or torch.equal(x, grads[name][one])


def test_long_sums_of_the_bias():
    """Over thousands of sequences, where one running sum would lose many bits."""
    assert_gradients(Call(40, 100, 5, 3, 8))


def test_inputs_are_not_written():
    call = Call(2, 40, 3, 24, stat="tensor")
    names = ("query", "key", "value", "grad_out", "grad_map", "delta", "stat_tensor")
    copies = {name: getattr(call, name).clone() for name in names}
    call.gradients()
    assert all(torch.equal(getattr(call, name), copy) for name, copy in copies.items())


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 8)])
def test_empty(shape):
    call = Call(*shape, stat="tensor")
    grads = call.gradients()
    assert not grads["delta"].any()
    assert grads["query"].shape == shape
    _, mean_map = call.forward()
    assert mean_map.isnan().all()  # the mean of nothing


@pytest.mark.parametrize("test_utils", [("test_schema",), ("test_faketensor",)])
@pytest.mark.parametrize("stat", ["row_max", "tensor"])
def test_opcheck(stat, test_utils):
    call = Call(2, 6, 3, 8, stat=stat)
    for operator, arguments in (
        (torch.ops.vstar_kernels.cpu_backward, call.backward_arguments()),
        (torch.ops.vstar_kernels.cpu_forward, call.forward_arguments()),
    ):
        torch.library.opcheck(operator, arguments, test_utils=test_utils)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad_out", torch.rand(2, 6, 3, 7), "grad_out must have query's shape"),
        ("grad_out", torch.rand(2, 6, 3, 8).half(), "grad_out must have query's type"),
        ("grad_map", torch.rand(2, 6, 5), r"grad_map must be \(batch, blocks, blocks\)"),
        ("grad_map", torch.rand(2, 3, 6, 6), r"grad_map must be \(batch, blocks, blocks\)"),
        ("grad_map", torch.rand(2, 6, 6).mT, "grad_map must be a contiguous float32"),
        ("key", torch.rand(2, 5, 3, 8), "key must have query's shape"),
    ],
)
def test_direct_calls_cannot_leave_their_tensors(name, value, message):
    call = Call(2, 6, 3, 8)
    setattr(call, name, value)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vstar_kernels.cpu_backward(*call.backward_arguments())


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 1, 6, 6), (2, 3, 5, 6), (1, 3, 6, 6)])
def test_a_map_for_each_head_cannot_be_another(shape):
    call = Call(2, 6, 3, 8, map_heads=True)
    call.grad_map = torch.rand(shape)
    with pytest.raises(RuntimeError, match=r"grad_map must be \(batch, heads, blocks, blocks\)"):
        torch.ops.vstar_kernels.cpu_backward(*call.backward_arguments())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.rand(2, 6, 3, 9), "grad_query must have query's shape"),
        (1, torch.rand(2, 6, 8, 3).mT, "grad_key must be contiguous in head_dim"),
        (2, torch.rand(2, 6, 3, 8).half(), "grad_value must have query's type"),
        (3, torch.rand(1, 13), "grad_delta must have delta's shape"),
        (3, torch.rand(1, 15).double(), "grad_delta must be a contiguous float32"),
        (4, torch.rand(2, 6, 3), "grad_stat goes with stat_tensor"),
    ],
)
def test_gradients_must_fit(index, value, message):
    arguments = list(Call(2, 6, 3, 8).backward_arguments())
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vstar_kernels.cpu_backward(*arguments)


@given(
    batch=st.integers(1, 3),
    space=st.integers(0, 3),
    frames=st.integers(1, 90),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(["signed", "symmetric", "dense", "none"]),
    stat=st.sampled_from(STATS),
    # Δ's gradient is in proportion to it, and has fewer digits below float32's normal numbers.
    strength=st.floats(-1, 2, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0),
    clamp=st.booleans(),
    detach=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
# PyTorch is lucky here: on inputs that differ by one rounding it errs as much as the kernel does.
@example(
    batch=1,
    space=0,
    frames=2,
    heads=1,
    head_dim=1,
    dtype=torch.float32,
    form="signed",
    stat="row_max",
    strength=0.0,
    clamp=False,
    detach=False,
    seed=0,
)
def test_anything(batch, space, frames, heads, head_dim, dtype, form, stat, **options):
    shape = (batch, *([space] if space else []), frames, heads, head_dim)
    stat = "none" if form == "none" else stat
    scale = head_dim**-0.5
    assert_gradients(Call(*shape, dtype=dtype, form=form, stat=stat, scale=scale, **options))
