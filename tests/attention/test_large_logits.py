"""Logits up to 10³⁰, where one multiply-add of two logits' difference would overflow on a GPU.

Interpreted, as ``test_triton.py`` is.
"""

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention import triton as backend
from vstar_kernels.testing import inputs

if not backend.interpreted() or backend.unavailable():
    pytest.skip("needs TRITON_INTERPRET=1 and triton", allow_module_level=True)

import triton
import triton.language as tl

from tests.attention.contracting import contracting
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.attention.triton.primitives import load_normalizer, normalized
from vstar_kernels.testing import eager, eager_columns

SMALL = StreamConfig(queries=32, keys=16, warps=4, stages=1, shared=0)


@pytest.fixture(autouse=True)
def multiply_adds():
    with contracting():
        yield
    backend._forward_plan.cache_clear()
    backend._backward_plan.cache_clear()


@pytest.fixture(params=["tile", "stream"])
def frames(request, monkeypatch):
    if request.param == "stream":
        for table in ("tile", "tile_backward"):
            monkeypatch.setattr(configs, table, lambda *args: None)
        for table in ("stream", "stream_backward"):
            monkeypatch.setattr(configs, table, lambda *args: SMALL)
    return {"tile": 13, "stream": 40}[request.param]


@triton.jit
def multiply_add(x, y, z):
    """Stores x · y − z in the place of z, by way of a block."""
    i = tl.arange(0, 2)
    tl.store(z + i, tl.load(x + i) * tl.load(y + i) - tl.load(z + i))


def test_the_interpreter_contracts():
    x, y = torch.tensor([1 + 2**-23, 3.0]), torch.tensor([1 - 2**-23, 5.0])
    z = x * y
    multiply_add[(1,)](x, y, z)
    assert z.tolist() == [-(2**-46), 0]


@pytest.mark.parametrize(
    ("scale", "dtype", "bias"),
    [
        (1e8, torch.float16, vk.GaussianBias(1.0)),
        (-1e12, torch.float32, vk.GaussianBias(1.0, stat="map_max")),
        (1e28, torch.float32, None),
    ],
)
def test_tar_attention(frames, scale, dtype, bias):
    tensors = [x.to(dtype).requires_grad_() for x in inputs(1, frames, 2, 16)]
    options = {"bias": bias, "scale": scale, "return_map": True}
    out, mean_map = vk.tar_attention(*tensors, **options, backend="triton")
    expected, _ = eager(*(x.detach().double() for x in tensors), **options)
    # Each row's weights are all at one key, whose value is its output.
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert 0 <= mean_map.min() <= mean_map.max() <= 1
    gradients = torch.autograd.grad(out.float().sum(), tensors)
    if dtype == torch.float32:  # float16 cannot hold what roundings leave, times the scale
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(("scale", "keys"), [(1e28, 13), (-1e10, 13), (1e12, 150)])
def test_column_attention(scale, keys):
    query, (key, value, _) = inputs(1, 20, 2, 16)[0], inputs(1, keys, 2, 16)
    tensors, columns = [query, key, value], torch.rand(1, keys, 3)
    expected, _ = eager_columns(*(x.double() for x in tensors), columns.double(), scale=scale)
    tensors = [x.requires_grad_() for x in tensors]
    out, maps = vk.column_attention(*tensors, columns, scale=scale, backend="triton")
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert 0 <= maps.min() <= maps.max() <= 1
    gradients = torch.autograd.grad(out.sum() + maps.sum(), tensors)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("row", [0, 3])
def test_rows_whose_keys_share_a_large_bias(frames, row, saved, monkeypatch):
    """As where a mask is a large negative number: what is added to it is rounded away."""
    if not saved:  # as in a compiled graph
        backward = backend.backward
        monkeypatch.setattr(backend, "backward", lambda *args: backward(*args[:2], (), *args[3:]))
    table = torch.zeros(frames, frames)
    table[row] = -1e9
    leaves = [x.requires_grad_() for x in (*inputs(1, frames, 2, 16), table)]

    def results(backend):
        bias = vk.DenseBias(leaves[3], stat="none")
        out, mean_map = vk.tar_attention(*leaves[:3], bias, return_map=True, backend=backend)
        loss = out.square().sum() + (mean_map * torch.linspace(0, 1, frames)).sum()
        return out, mean_map, *torch.autograd.grad(loss, leaves)

    for found, expected in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@triton.jit
def weigh(s, normalizer, p):
    """Stores the weights of two logits with each of two rows' normalizers."""
    i = tl.arange(0, 2)
    b_s = tl.expand_dims(tl.load(s + i), 0) + tl.zeros((2, 2), tl.float32)
    b_p = normalized(b_s, load_normalizer(normalizer, i, i < 1), 1.0)
    tl.store(p + tl.expand_dims(i, 1) * 2 + i, b_p)


def test_no_weight_is_larger_than_that_of_the_maximum():
    """Logits that are computed again, in blocks of another shape, may be larger than it was."""
    logits, found = torch.tensor([1e9 + 64, 1e9]), torch.empty(2, 2)
    weigh[(1,)](logits, torch.tensor([[1e9, 3.0], [0.0, 0.0]]), found)
    assert found.tolist() == [[0.125, 0.125], [0.0, 0.0]]  # of a row that is masked, none
