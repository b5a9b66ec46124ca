"""The oracle itself: against the formula over all pairs of tokens, and against what is known."""

import math

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.pairwise import pairwise
from vstar_kernels.attention.frames import reference
from vstar_kernels.testing import assert_frames, eager_frames, inputs


@pytest.mark.parametrize(
    "case", pairwise(cases.OPTIONS | {"tokens": [1, 7, 30]}), ids=cases.identify
)
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


def test_a_given_statistic_of_both_signs():
    for clamp in (False, True):
        for name in ("text first", "grid"):
            layout = cases.LAYOUTS[name](3)
            q, k, v = inputs(2, layout.tokens, 3, 16)
            rule = cases.with_given_statistic(vk.FrameRule.tar(1.0, clamp_negative=clamp), q)
            out = vk.frame_attention(q, k, v, layout, rule, backend="reference")
            assert_frames(out, q, k, v, layout, rule)
            plain = vk.frame_attention(q, k, v, layout, backend="reference")
            assert (out - plain).abs().max() > 0.1


def test_by_loops():
    """The formula with numbers, for a frame of one size, text and a factor."""
    layout = vk.Layout(vk.Text(1), vk.Frames(3, 2))
    q, k, v = (x.double() for x in inputs(1, 7, 1, 4))
    rule = vk.FrameRule.tar(1.0, 0.7) + vk.FrameRule.attenuate(0.5, 2) + vk.FrameRule.window(1)
    frame = [-1, 0, 0, 1, 1, 2, 2]
    out, mean_map = vk.frame_attention(q, k, v, layout, rule, return_map=True, backend="reference")
    expected_map = [[0.0] * 4 for _ in range(3)]
    for i in range(7):
        phi = [float(q[0, i, 0] @ k[0, j, 0]) / 2 for j in range(7)]
        video = frame[i] >= 0
        seen = [j for j in range(7) if not video or frame[j] < 0 or abs(frame[i] - frame[j]) <= 1]
        means = []
        for g in range(3):
            keys = [j for j in seen if frame[j] == g]
            if keys:
                means.append(math.log(sum(math.exp(phi[j]) for j in keys) / len(keys)))
        total, terms = 0.0, {}
        for j in seen:
            bias = 0.0
            if video and frame[j] >= 0:  # no visible frame is far enough for the factor
                bias = 0.7 * max(means) * math.exp(-((frame[i] - frame[j]) ** 2) / 2)
            terms[j] = math.exp(phi[j] + bias)
            total += terms[j]
        found = sum(terms[j] / total * v[0, j, 0] for j in seen)
        torch.testing.assert_close(out[0, i, 0], found, rtol=1e-6, atol=1e-6)
        for j in seen if video else []:
            expected_map[frame[i]][frame[j]] += terms[j] / total / 2
    torch.testing.assert_close(mean_map[0].tolist(), expected_map, rtol=1e-5, atol=1e-6)


def test_non_finite_values_stay_where_they_are():
    """A NaN in a query stays in its row, one in a key or a value in its sequence and key head."""
    layout = vk.Layout(vk.Frames(3, 2))
    rule = vk.FrameRule.tar(1.0)
    clean = vk.frame_attention(*inputs(2, 6, 2, 4), layout, rule, backend="reference")
    for place in range(3):
        tensors = inputs(2, 6, 2, 4)
        tensors[place][0, 3, 1, 2] = float("nan")
        out = vk.frame_attention(*tensors, layout, rule, backend="reference")
        same = torch.ones_like(out, dtype=torch.bool)
        same[0, 3 if place == 0 else slice(None), 1] = False
        assert torch.equal(out[same], clean[same])
        assert out[0, 3, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bounds_refuse_what_is_wrong(dtype):
    layout = vk.Layout(vk.Text(2), vk.Frames(4, 5))
    q, k, v = inputs(2, layout.tokens, 3, 16, dtype=dtype)
    rule = vk.FrameRule.tar(1.0)
    call = {"return_map": True}
    out, mean_map = vk.frame_attention(q, k, v, layout, rule, **call, backend="reference")
    assert_frames((out, mean_map), q, k, v, layout, rule, **call)
    other = vk.frame_attention(
        q, k, v, layout, vk.FrameRule.tar(1.0, 0.6), **call, backend="reference"
    )
    missing = out.clone()
    missing[1, 3, 2, 0] = float("nan")
    for wrong in (
        (other[0], mean_map), (out, other[1]), (missing, mean_map), (out * 1.1, mean_map),
        (out, mean_map * (1 + 1e-5)), (out.double(), mean_map), (out, mean_map.double()),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_frames(wrong, q, k, v, layout, rule, **call)
