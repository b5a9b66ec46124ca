"""Keys and values that come by descriptors, as on sm_90 and sm_100, interpreted on the CPU.

On a GPU of theirs, ``test_triton_gpu.py`` runs the same kernels, with descriptors in 16 bits.
"""

import sys

import pytest
import torch

import vstar_kernels as vk
from tests.attention.described import between_nans, ways_of
from tests.attention.kernel_lines import watched
from tests.pairwise import pairwise
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.call import make_call
from vstar_kernels.testing import assert_as_exact_as_eager, inputs

if not backend.interpreted():
    pytest.skip("says that the CPU is a GPU", allow_module_level=True)

from vstar_kernels.attention.triton import configs, descriptors, devices, plan, stream
from vstar_kernels.attention.triton.configs import StreamConfig
from vstar_kernels.attention.triton.descriptors import DescribedLaunch

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.bfloat16, torch.float16]
HOPPER = devices.Device("sm_90", sys.maxsize, 1)
pytestmark = pytest.mark.usefixtures("poison", "hopper")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU with descriptors, where short sequences stream."""
    small = StreamConfig(queries=32, keys=16, warps=4, stages=1, shared=0)
    monkeypatch.setattr(devices, "device_of", lambda device: HOPPER)
    monkeypatch.setattr(configs, "tile", lambda *args: None)
    monkeypatch.setattr(configs, "stream", lambda *args: small)
    backend._forward_plan.cache_clear()
    yield
    backend._forward_plan.cache_clear()


@pytest.fixture
def taken(monkeypatch):
    """Which way each launch takes: "descriptors" or "pointers"."""
    return ways_of(stream.stream_kernel, monkeypatch)


def tar(*tensors, bias=None, **options):
    return vk.tar_attention(*tensors, bias, backend="triton", **options)


def without_descriptors(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descriptors, "ARCHITECTURES", ())
        backend._forward_plan.cache_clear()
        found = run()
    backend._forward_plan.cache_clear()
    return found


def heads_outermost(x):
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def frames_outermost(x):
    return x.transpose(1, -3).contiguous().transpose(1, -3)


BIASES = {
    "none": lambda n, h, **o: None,
    "gaussian": lambda n, h, **o: vk.GaussianBias(1.5, **o),
    "signed": lambda n, h, **o: vk.ToeplitzBias(torch.rand(2 * n + 5), signed=True, **o),
    "dense by head": lambda n, h, **o: vk.DenseBias(torch.rand(h, n, n), **o),
}
OPTIONS = {
    "dtype": DTYPES,
    "frames": [1, 16, 33],
    "head_dim": [8, 40, 64, 160],
    "bias": list(BIASES),
    "stat": ["row_max", "map_max", "none", "tensor"],
    "layout": [lambda x: x, heads_outermost, frames_outermost, between_nans],
    "scale": [None, -0.2],
    "five": [False, True],
}


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: f"{c['frames']}-{c['bias']}")
def test_descriptors_compute_what_pointers_do(case, taken):
    frames = case["frames"]
    shape = (1, 2, frames, 2) if case["five"] else (2, frames, 1)
    q, k, v = (case["layout"](x) for x in inputs(*shape, case["head_dim"], dtype=case["dtype"]))
    torch.manual_seed(1)
    stat = torch.randn(shape) if case["stat"] == "tensor" else case["stat"]
    bias = BIASES[case["bias"]](frames, shape[-1], stat=stat)

    def run():
        return tar(q, k, v, bias=bias, scale=case["scale"])

    found = run()
    assert_as_exact_as_eager(found, q, k, v, bias, scale=case["scale"])
    assert torch.equal(found, without_descriptors(run))
    assert taken == ["descriptors", "pointers"]


@pytest.mark.parametrize(("sigma", "keys"), [(0.4, 16), (2.0, 16), (1e6, 16), (0.4, 64)])
def test_window(sigma, keys, monkeypatch, taken):
    """Windows that end within, at and beyond blocks of keys and the sequence.

    The largest logits are those of the first key and of the last, outside of most rows' windows.
    """
    config = StreamConfig(queries=16, keys=keys, warps=4, stages=3, shared=0)
    monkeypatch.setattr(configs, "stream", lambda *args: config)
    tensors = inputs(1, 50, 1, 16, dtype=torch.bfloat16)
    tensors[1][:, 0] *= 4
    tensors[1][:, -1] = -tensors[1][:, 0]
    bias = vk.GaussianBias(sigma, strength=2.0)
    assert_as_exact_as_eager(tar(*tensors, bias=bias), *tensors, bias)
    assert taken == ["descriptors"]


def test_infinities_in_delta_mask_keys(taken):
    """Whichever block of them comes first, and none of what they hold is seen."""
    frames, half = 33, 17
    masked = torch.arange(frames) >= half
    for mask in (masked, ~masked):
        tensors = inputs(1, frames, 1, 40, dtype=torch.bfloat16)
        for _ in range(2):
            bias = vk.DenseBias(torch.zeros(frames, frames).masked_fill(mask, -INF), stat="none")
            kept = [tensors[0], *(x[:, ~mask] for x in tensors[1:])]
            found = tar(*tensors, bias=bias)
            expected = eager_sdpa(*kept)
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)
            tensors[2][:, mask] = 1e4
    assert set(taken) == {"descriptors"}


def eager_sdpa(*tensors):
    """Attention of every query to fewer keys."""
    q, k, v = (x.float().transpose(1, 2) for x in tensors)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def test_what_is_not_a_number_stays_in_its_sequence(taken):
    tensors = inputs(2, 33, 2, 40, dtype=torch.bfloat16)
    clean = tar(*tensors, bias=vk.GaussianBias(1.0))
    for x in tensors[1:]:
        x[1, 3, 1] = NAN
    found = tar(*tensors, bias=vk.GaussianBias(1.0))
    assert found[1, :, 1].isnan().all()
    found[1, :, 1] = clean[1, :, 1]
    assert torch.equal(found, clean)
    assert set(taken) == {"descriptors"}


def test_tensors_that_are_not_aligned_come_by_pointers(taken):
    tensors = inputs(2, 33, 2, 40, dtype=torch.bfloat16)
    aligned = tar(*tensors, bias=vk.GaussianBias(1.0))
    for i in range(3):
        moved = list(tensors)
        moved[i] = torch.empty(1 + moved[i].numel(), dtype=torch.bfloat16)[1:].view(2, 33, 2, 40)
        moved[i].copy_(tensors[i])
        assert torch.equal(tar(*moved, bias=vk.GaussianBias(1.0)), aligned)
    # A query is not described.
    assert taken == ["descriptors", "descriptors", "pointers", "pointers"]


def plan_key(*tensors):
    return plan.forward_key(make_call(*tensors, None, 1.0, 0), tensors[0])


def described(*tensors, device=HOPPER):
    """Whether keys and values come by descriptors, if they are aligned."""
    made = stream.make_plan(plan_key(*tensors)._replace(device=device))
    assert not isinstance(made.pointers, DescribedLaunch)
    return isinstance(made.attention, DescribedLaunch)


def test_where_descriptors_are_possible():
    q, k, v = inputs(2, 16, 3, 40, dtype=torch.bfloat16)
    assert described(q, k, v)
    for architecture, expected in (("sm_100", True), ("sm_80", False), ("gfx942", False)):
        assert described(q, k, v, device=HOPPER._replace(architecture=architecture)) is expected
    assert not described(*inputs(2, 16, 3, 40))
    gaps = torch.nn.functional.pad(k, (0, 4))[..., :-4]  # rows of 88 bytes
    expanded = k[:1].expand_as(k)
    for other in (gaps, expanded):
        assert not described(q, other, v)
        assert not described(q, k, other)
        assert described(other, k, v)
    one = k[:1].expand(1, 16, 3, 40)  # of a single element, no stride matters
    assert described(q[:1], one.as_strided(one.shape, (7, *k.stride()[1:])), v[:1])


def test_every_line_of_load_block_runs():
    tensors = inputs(1, 20, 1, 40, dtype=torch.bfloat16)
    with watched(descriptors) as not_run:
        tar(*tensors)
        without_descriptors(lambda: tar(*tensors))
    assert not not_run()


def test_a_descriptor_is_what_triton_would_make():
    """Its own constructor checks it again at every call."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensors = inputs(2, 16, 3, 40, dtype=torch.bfloat16)
    launch = stream.make_plan(plan_key(*tensors)).attention
    given = launch.needed._replace(q=tensors[0], k=tensors[1], v=tensors[2])
    _, *made, _, _, _, _, _, _ = launch.call_arguments(given)
    assert [x.block_shape for x in made] == [[1, 1, 1, 16, 32], [1, 1, 1, 16, 16]] * 2
    for x, tensor in zip(made, [tensors[1]] * 2 + [tensors[2]] * 2, strict=True):
        assert x == TensorDescriptor(
            tensor, [2, 1, 3, 16, 40], [16 * 120, 8, 40, 120, 1], x.block_shape
        )
        assert x.base is tensor
