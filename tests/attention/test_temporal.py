import numpy as np
import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.testing import inputs

BIAS = vk.GaussianBias(1.0)
Q, K, V = inputs(2, 6, 3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: vk.tar_attention(Q[0], K[0], V[0]),
            r"\(batch, frames, heads.*got shape \(6, 3, 8",
        ),
        (lambda: vk.tar_attention(Q, K[:, :5], V), r"key must have query's shape.*\(2, 5, 3, 8\)"),
        (lambda: vk.tar_attention(Q, K, V.half()), "value must have query's type.*float16"),
        (lambda: vk.tar_attention(Q, K.to("meta"), V), "key must be on query's device cpu.*meta"),
        (lambda: vk.tar_attention(Q.long(), K, V), "floating-point type, .*got torch.int64"),
        (lambda: vk.tar_attention(Q[:, :0], K[:, :0], V[:, :0]), "at least one frame"),
        (
            lambda: vk.tar_attention(*(x.to(torch.float8_e4m3fn) for x in (Q, K, V))),
            "query must be of a floating-point type, .*got torch.float8",
        ),
        (lambda: vk.tar_attention(Q, K.to_sparse(), V), "key must be an ordinary .*sparse_coo"),
        (
            lambda: vk.tar_attention(*(torch.nested.nested_tensor([*x]) for x in (Q, K, V))),
            "query must be an ordinary .*got a nested one",
        ),
        (lambda: vk.tar_attention(Q, K, V, scale=10**400), "scale must be finite.*of 1329 bits"),
        (lambda: vk.tar_attention(Q, K, V, scale=-(10**5000)), "scale must be finite.*16610 bits"),
        (lambda: vk.tar_attention(Q, K, V, scale=1e39), "scale must be finite, in float32 too"),
        (
            lambda: vk.tar_attention(Q, K, V, map_heads=True),
            "map_heads=True needs return_map=True",
        ),
        (lambda: vk.tar_attention(Q, K, V, map_block=0), "map_block must be at least 1.*got 0"),
        (lambda: vk.tar_attention(Q, K, V, map_block=-(10**5000)), "map_block must be.*16610 bits"),
        (lambda: vk.tar_attention(Q, K, V, scale=float("nan")), "scale must be finite"),
        (
            lambda: vk.tar_attention(Q, K, V, backend="gpu"),
            "'cpu', 'triton', 'reference'.*got 'gpu'",
        ),
        (
            lambda: vk.tar_attention(Q, K, V, vk.ToeplitzBias(torch.ones(5))),
            "reaches 5 frames.*asked for 6",
        ),
        (
            lambda: vk.tar_attention(Q, K, V, vk.ToeplitzBias(torch.ones(2, 6))),
            "2 heads.*query has 3",
        ),
        (lambda: vk.tar_attention(Q, K, V, vk.DenseBias(torch.ones(5, 5))), "5 frames.*for 6"),
        (
            lambda: vk.tar_attention(Q, K, V, vk.GaussianBias(1.0, stat=torch.ones(2, 6))),
            r"without head_dim, \(2, 6, 3\), got \(2, 6\)",
        ),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vk.tar_attention(Q.numpy(), K, V), "query must be a torch.Tensor, got ndarray"),
        (lambda: vk.tar_attention(Q, K, V, 1.0), "bias must be a GaussianBias.*got float"),
        (lambda: vk.tar_attention(Q, K, V, scale="1"), "scale must be a number, got str"),
        (
            lambda: vk.tar_attention(Q, K, V, scale=np.float32(1)),
            "scale must be a number, got float32",
        ),
        (
            lambda: vk.tar_attention(Q, K, V, backend=["cpu"]),
            "backend must be one of .* or None, got list",
        ),
        (lambda: vk.tar_attention(Q, K, V, backend=False), "backend must be .*got bool"),
        (
            lambda: vk.tar_attention(Q, K, V, return_map="no"),
            "return_map must be True or False, got str",
        ),
        (lambda: vk.backends.why_not(Q, K, V, map_heads=1), "map_heads must be True or False"),
        (lambda: vk.tar_attention(Q, K, V, map_block=2.0), "map_block must be an integer"),
        (lambda: vk.tar_attention(Q, K, V, map_block=True), "map_block must be an integer"),
        (lambda: vk.backends.why_not(Q, K, V, return_map=1), "return_map must be True or False"),
        (lambda: vk.tar_attention(Q, K, V, vk.GaussianBias), "bias must be a GaussianBias"),
    ],
)
def test_wrong_kinds(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_scale_zero_is_not_the_default():
    out = vk.tar_attention(Q, K, V, scale=0.0)
    torch.testing.assert_close(out, V.mean(1, keepdim=True).expand_as(V))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_integer_is_a_scale_however_large(backend):
    """Torch multiplies by no integer beyond int64."""
    found, expected = (
        vk.tar_attention(1e-20 * Q, K, V, scale=scale, backend=backend) for scale in (10**20, 1e20)
    )
    assert torch.equal(found, expected)


def test_map_comes_with_the_output():
    out, mean_map = vk.tar_attention(Q, K, V, BIAS, return_map=True, backend="reference")
    assert out.shape == Q.shape
    assert mean_map.shape == (2, 6, 6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_map_for_each_head(backend, block):
    options = {"return_map": True, "map_block": block, "backend": backend}
    for shape in ((2, 6, 3, 8), (2, 4, 6, 3, 8)):
        q, k, v = inputs(*shape)
        out, by_head = vk.tar_attention(q, k, v, BIAS, map_heads=True, **options)
        plain, mean_map = vk.tar_attention(q, k, v, BIAS, **options)
        assert by_head.shape == (2, 3, *mean_map.shape[1:])
        assert torch.equal(out, plain)
        torch.testing.assert_close(by_head.mean(1), mean_map)
        alone = (x[..., 1:2, :] for x in (q, k, v))  # the second head
        _, second = vk.tar_attention(*alone, BIAS, **options)
        torch.testing.assert_close(by_head[:, 1], second)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_block_beyond_all_frames_is_one_block(backend):
    expected = vk.tar_attention(Q, K, V, BIAS, return_map=True, map_block=6, backend=backend)[1]
    for block in (7, 2**62, 10**5000):
        found = vk.tar_attention(Q, K, V, BIAS, return_map=True, map_block=block, backend=backend)
        assert torch.equal(found[1], expected)


def test_output_is_allocated_like_the_query():
    q, k, v = (x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3) for x in (Q, K, V))
    for backend, problems in vk.backends.why_not(q, k, v, BIAS).items():
        if problems:
            continue
        out = vk.tar_attention(q, k, v, BIAS, backend=backend)
        assert out.stride() == torch.empty_like(q).stride()
