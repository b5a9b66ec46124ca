"""NaN, infinities and huge values on the CPU; tests/attention/test_triton.py does the same."""

import itertools
import math
import sys

import pytest
import torch

from tests.attention import not_finite
from tests.helpers import run_python
from vstar_kernels.attention import native


@pytest.mark.parametrize("name", not_finite.BIASES)
@pytest.mark.parametrize("frames", [6, 40, 150])
def test_not_finite_is_where_the_formula_has_it(isa, name, frames):
    places = [x for x in not_finite.PLACES if x != "stat" or name == "tensor"]
    cases = itertools.product(places, (math.nan, math.inf, -math.inf))
    not_finite.assert_as_the_reference("cpu", frames, name, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [5, 128, 700])
def test_largest_values(isa, frames, dtype):
    not_finite.assert_largest_values("cpu", frames, dtype)
    not_finite.assert_largest_values("reference", frames, dtype)


@pytest.mark.parametrize("frames", [20, 140])
def test_infinite_keys_mask(isa, frames):
    not_finite.assert_infinite_keys_mask("cpu", frames)


@pytest.mark.parametrize("frames", [20, 140])
def test_infinities_in_delta_mask_keys(isa, frames):
    not_finite.assert_masks("cpu", frames)


PEAK = """
import resource, torch
import vstar_kernels as vk
torch.set_num_threads(2)
def call(frames, block, map_heads):
    q, k, v = (torch.rand(1, frames, 2, 8, requires_grad=True) for _ in range(3))
    options = dict(return_map=True, map_heads=map_heads, map_block=block, backend="cpu")
    out, m = vk.tar_attention(q, k, v, vk.GaussianBias(1.0), **options)
    m.square().sum().backward()
call(500, 100, True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for map_heads in (False, True):
    call(8192, 1024, map_heads)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux gives it")
@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
def test_block_sums_take_no_whole_map():
    """A map of 8,192 frames takes 256 MiB; its sums and their gradients take none of that."""
    run = run_python(PEAK)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 * 1024  # KiB
