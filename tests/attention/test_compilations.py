"""How many kernels Triton compiles for the calls of whole models: none for each number of heads.

Nothing is compiled, and no GPU is needed: see :mod:`tests.attention.stub_gpu`.
"""

import collections
import json
import os
from pathlib import Path

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.call import Wanted, check_call

pytest.importorskip("triton")
from tests.attention.stub_gpu import OnGpu, StubGpu

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
    pytest.mark.usefixtures("one_thread"),
]
WORKLOADS = json.loads(
    (Path(__file__).parents[2] / "benchmarks/workloads.json").read_text(encoding="utf-8")
)
HEADS = (1, 5, 8, 10, 20, 32)


@pytest.fixture
def gpu():
    with StubGpu().installed() as stub:
        yield stub


def on_gpu(*shape, dtype=torch.bfloat16):
    return OnGpu(torch.empty(shape, dtype=dtype, device="meta"))


def packed(rows, frames, heads, head_dim):
    """As a projection leaves them where frames come before the space."""
    return on_gpu(rows, frames, heads, head_dim)


def strided(rows, frames, heads, head_dim):
    """As one leaves them where the space comes before the frames."""
    return on_gpu(2, frames, rows // 2, heads, head_dim).transpose(1, 2)


def sliced(rows, frames, heads, head_dim):
    """A part of one product for queries, keys and values."""
    return on_gpu(rows, frames, 3, heads, head_dim)[:, :, 1]


BIASES = {
    "none": lambda frames, heads: None,
    "gaussian": lambda frames, heads: vk.GaussianBias(1.0),
    "table": lambda frames, heads: vk.ToeplitzBias(on_gpu(frames, dtype=torch.float32)),
    "by head": lambda frames, heads: vk.ToeplitzBias(
        on_gpu(heads, 2 * frames - 1, dtype=torch.float32), signed=True
    ),
    "matrices": lambda frames, heads: vk.DenseBias(
        on_gpu(heads, frames, frames, dtype=torch.float32)
    ),
}


@pytest.mark.parametrize(
    ("layout", "bias"),
    [*((packed, bias) for bias in BIASES), (strided, "matrices"), (sliced, "gaussian")],
)
def test_a_pair_of_frames_and_head_size_is_compiled_once(gpu, layout, bias):
    """Of all calls of eight UNets at several lengths; again for tensors beyond 2³¹ elements."""
    compiled, levels = collections.Counter(), set()
    for model in WORKLOADS["models"].values():
        for frames in {*WORKLOADS["frames"], model["native_frames"]}:
            levels |= {(x["rows"], frames, x["heads"], x["head_dim"]) for x in model["levels"]}
    for rows, frames, heads, head_dim in levels:
        before = len(gpu.compiled)
        query, key, value = (layout(rows, frames, heads, head_dim) for _ in range(3))
        vk.tar_attention(query, key, value, BIASES[bias](frames, heads))
        is_large = sum((n - 1) * x for n, x in zip(query.shape, query.stride(), strict=True)) >> 31
        compiled[frames, head_dim, bool(is_large)] += len(gpu.compiled) - before
    assert sum(not is_large for *_, is_large in compiled) == 27
    assert set(compiled.values()) <= {0, 1}  # 0: a stream's for other frames serves these too
    assert len(levels) > 100
    assert len(gpu.launched) == len(levels)


@pytest.mark.parametrize("frames", [16, 200])
@pytest.mark.parametrize("bias", BIASES)
def test_gradients_are_compiled_once_for_any_heads(gpu, frames, bias):
    compiled = []
    for heads in HEADS:
        gpu.compiled.clear()
        tensors = [strided(64, frames, heads, 64) for _ in range(3)]
        call = check_call(*tensors, BIASES[bias](frames, heads), return_map=True, map_block=4)
        operation = dispatch.TAR_ATTENTION
        out, mean_map, saved = operation.run("triton", call, save=True)
        wanted = Wanted(bias not in ("none", "gaussian"), stat=False)
        operation.run_backward(
            "triton", call, out, saved, torch.ones_like(out), torch.ones_like(mean_map), wanted
        )
        compiled.append(len(gpu.compiled))
    assert compiled[0] >= 2
    assert compiled[1:] == [0] * len(HEADS[1:])


def test_the_other_operations_are_compiled_once_for_any_heads(gpu):
    layout, rule = vk.Layout(vk.Frames(4, 8), vk.Text(5)), vk.FrameRule.tar(1.0)
    for heads in HEADS:
        query, key, value = (on_gpu(2, layout.tokens, heads, 40) for _ in range(3))
        vk.frame_attention(query, key, value, layout, rule)
        vk.column_attention(query, key, value, on_gpu(2, layout.tokens, 4, dtype=torch.float32))
        assert len(gpu.compiled) == 2
