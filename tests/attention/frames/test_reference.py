"""The oracle itself: against the formula over all pairs of tokens, and against what is known."""

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.pairwise import pairwise
from vstar_kernels.attention.frames import reference
from vstar_kernels.testing import assert_frames, eager_frames


@pytest.mark.parametrize("case", pairwise(cases.OPTIONS), ids=cases.identify)
def test_options(case, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**13)  # several chunks, which end within frames
    arguments, options = cases.make(case)
    out = vk.frame_attention(*arguments, **options, backend="reference")
    assert_frames(out, *arguments, **options)
    double = [x.double() for x in arguments[:3]]
    exact = vk.frame_attention(*double, *arguments[3:], **options, backend="reference")
    expected = eager_frames(*double, *arguments[3:], **options)
    if not options["return_map"]:
        exact, expected = (exact,), (expected,)
    torch.testing.assert_close(exact[0], expected[0], rtol=1e-10, atol=1e-10)
    if len(exact) == 2:
        torch.testing.assert_close(exact[1], expected[1].float(), rtol=1e-6, atol=1e-7)
