"""Meta tensors, and calls under whatever changes what torch makes: they leave nothing behind."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vstar_kernels as vk
from tests.helpers import default_dtype
from vstar_kernels.attention import native
from vstar_kernels.attention.bias import gaussian_table
from vstar_kernels.testing import inputs

SHAPE = (2, 6, 3, 8)
native_library = pytest.mark.skipif(bool(native.load().problems), reason="no native library")


def parameter(*shape, device):
    return torch.rand(shape, device=device).requires_grad_()


BIASES = {
    "none": lambda device: None,
    "gaussian": lambda device: vk.GaussianBias(1.0),
    "table by head": lambda device: vk.ToeplitzBias(parameter(3, 8, device=device)),
    "matrix and statistic": lambda device: vk.DenseBias(
        parameter(6, 6, device=device), stat=parameter(2, 6, 3, device=device)
    ),
}


def results(device, dtype, form, transposed, map_block):
    """Shape, type and strides of a call's results and gradients."""
    tensors = [x.to(dtype) for x in inputs(*SHAPE)]
    if transposed:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    tensors = [x.to(device).requires_grad_() for x in tensors]
    bias = BIASES[form](device)
    options = {"return_map": True, "map_block": map_block} if map_block else {}
    outs = vk.tar_attention(*tensors, bias, **options)
    outs = outs if map_block else (outs,)
    leaves = [*tensors, *(getattr(bias, "delta", None), getattr(bias, "table", None))]
    leaves = [x for x in (*leaves, getattr(bias, "stat", None)) if isinstance(x, torch.Tensor)]
    gradients = torch.autograd.grad([x.sum() for x in outs], leaves)
    assert all(x.device.type == device for x in (*outs, *gradients))
    return [(x.shape, x.dtype, x.stride()) for x in (*outs, *gradients)]


@native_library
@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("map_block", [0, 1, 4])
@pytest.mark.filterwarnings("error")
def test_meta_results_are_as_those_of_the_cpu(form, transposed, map_block):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (dtype, form, transposed, map_block)
        assert results("meta", *arguments) == results("cpu", *arguments)


@pytest.mark.filterwarnings("error")
def test_meta_tensors_under_autocast_and_torch_func():
    q, k, v = (x.to("meta") for x in inputs(*SHAPE))
    for backend in (None, "reference"):
        call = functools.partial(vk.tar_attention, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(q, k, v, vk.GaussianBias(1.0)).dtype == torch.float32
        assert torch.func.grad(lambda x, c=call: c(x, k, v).sum())(q).shape == SHAPE
    assert vk.backends.why_not(q, k, v)["cpu"] == ["takes CPU tensors, query is on meta"]
    with torch.autocast("cpu", torch.bfloat16):
        assert vk.backends.why_not(q, k, v)["reference"] == []
    with pytest.raises(ValueError, match="takes CPU tensors, query is on meta"):
        vk.tar_attention(q, k, v, backend="cpu")


def test_numbers_do_not_come_from_the_meta_device():
    here, meta = inputs(*SHAPE), [x.to("meta") for x in inputs(*SHAPE)]
    with pytest.raises(ValueError, match="bias is on the meta device and holds no numbers"):
        vk.tar_attention(*here, vk.ToeplitzBias(torch.ones(6, device="meta")))
    with pytest.raises(ValueError, match="the bias, on cpu, has no gradient"):
        vk.tar_attention(*meta, vk.ToeplitzBias(torch.ones(6).requires_grad_()))
    assert vk.tar_attention(*meta, vk.ToeplitzBias(torch.ones(6))).device.type == "meta"


# ---- what a call may be made under ----


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def plain(backend, bias):
    vk.tar_attention(*inputs_made_before(), bias, backend=backend)


def inputs_made_before():
    return [x.clone() for x in INPUTS]


INPUTS = inputs(*SHAPE)


def of_fake_tensors(backend, bias):
    with FakeTensorMode():
        vk.tar_attention(*(torch.rand(SHAPE) for _ in range(3)), bias, backend=backend)


def under_vmap(backend, bias):
    q, k, v = (torch.stack([x, x]) for x in INPUTS)
    torch.func.vmap(lambda *tensors: vk.tar_attention(*tensors, bias, backend=backend))(q, k, v)


def under_grad(backend, bias):
    _, k, v = INPUTS
    torch.func.grad(lambda x: vk.tar_attention(x, k, v, bias, backend=backend).sum())(INPUTS[0])


MODES = {
    "with torch.device": (lambda: torch.device("meta"), plain),
    "set_default_device": (default_device, plain),
    "set_default_dtype": (functools.partial(default_dtype, torch.float64), plain),
    "inference_mode": (torch.inference_mode, plain),
    "fake tensors": (contextlib.nullcontext, of_fake_tensors),
    "vmap": (contextlib.nullcontext, under_vmap),
    "grad": (contextlib.nullcontext, under_grad),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_under_a_mode_leaves_nothing_to_later_ones(mode, backend):
    """Δ's numbers are kept for a σ; a tensor kept would be the mode's, for every later call."""
    if backend == "cpu" and native.load().problems:
        pytest.skip("no native library")
    bias = vk.GaussianBias(0.7 + list(MODES).index(mode) / 64 + len(backend) / 8)  # of this test
    context, call = MODES[mode]
    expected_delta = torch.tensor(
        [[torch.exp(torch.tensor(-((j - i) ** 2) / (2 * bias.sigma**2))) for j in range(6)]
         for i in range(6)]
    )  # fmt: skip
    with context():
        call(backend, bias)
    tensors = [x.clone().requires_grad_() for x in INPUTS]
    out = vk.tar_attention(*tensors, bias, backend=backend)
    expected = vk.tar_attention(*tensors, vk.DenseBias(expected_delta), backend=backend)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out.sum(), tensors),
        torch.autograd.grad(expected.sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_the_gaussian_table_is_a_tensor_of_its_call():
    with torch.device("meta"), torch.inference_mode():
        table = gaussian_table(0.123, 5)
        assert (table.device.type, table.dtype) == ("cpu", torch.float32)
    again = gaussian_table(0.123, 5)
    assert again is not table
    assert not again.is_inference()
