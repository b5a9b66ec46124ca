import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.testing import assert_exact, inputs, largest_error


def test_not_finite_is_infinitely_wrong():
    good, bad = torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])
    assert largest_error(bad, good) == float("inf")
    assert largest_error(bad, bad) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_assert_exact_refuses_what_is_wrong(dtype):
    q, k, v = inputs(2, 16, 2, 8, dtype=dtype)
    bias = vk.GaussianBias(1.0)
    out = vk.reference.tar_attention(q, k, v, bias)
    assert_exact(out, q, k, v, bias)
    worse = out.clone()
    worse[0, 3, 1, 5] += 32 * torch.finfo(dtype).eps * max(1.0, worse.abs().max().item())
    with pytest.raises(AssertionError, match="allowed"):
        assert_exact(worse, q, k, v, bias)
    with pytest.raises(AssertionError, match="allowed"):
        assert_exact(out, q, k, v, vk.GaussianBias(1.1))
