"""NaN, infinities and huge values on the CPU; tests/attention/test_triton.py does the same."""

import math
import sys

import pytest
import torch

from tests.attention import not_finite
from tests.helpers import run_python
from vstar_kernels.attention import native

PLACES = [
    (place, name)
    for name in not_finite.BIASES
    for place in not_finite.PLACES
    if place != "stat" or name == "tensor"
]


@pytest.mark.parametrize(("place", "name"), PLACES)
@pytest.mark.parametrize("frames", [6, 40, 150])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_where_the_formula_has_it(isa, place, name, frames, bad):
    not_finite.assert_as_the_reference("cpu", frames, name, place, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [5, 128, 700])
def test_largest_values(isa, frames, dtype):
    not_finite.assert_largest_values("cpu", frames, dtype)
    not_finite.assert_largest_values("reference", frames, dtype)


@pytest.mark.parametrize("frames", [20, 140])
def test_infinities_in_delta_mask_keys(isa, frames):
    not_finite.assert_masks("cpu", frames)


PEAK = """
import resource, torch
import vstar_kernels as vk
torch.set_num_threads(2)
def call(frames, block):
    q, k, v = (torch.rand(1, frames, 2, 8, requires_grad=True) for _ in range(3))
    options = dict(return_map=True, map_heads={map_heads}, map_block=block, backend="cpu")
    out, m = vk.tar_attention(q, k, v, vk.GaussianBias(1.0), **options)
    {backward}
call(500, 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(8192, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux gives it")
@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
@pytest.mark.parametrize("map_heads", [False, True])
@pytest.mark.parametrize("backward", ["", "m.square().sum().backward()"])
def test_block_sums_take_no_whole_map(backward, map_heads):
    """A map of 8,192 frames takes 256 MiB; its sums over blocks take none of that."""
    run = run_python(PEAK.format(backward=backward, map_heads=map_heads))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 * 1024  # KiB
