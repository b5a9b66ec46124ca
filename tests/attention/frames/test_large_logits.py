"""Logits over frames up to 10³⁰, where one multiply-add of two logits' difference would overflow.

Interpreted, as ``test_triton.py`` is. Inputs are integers, whose products are exact in any order.
"""

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention import triton as backend

if not backend.interpreted() or backend.unavailable():
    pytest.skip("needs TRITON_INTERPRET=1 and triton", allow_module_level=True)

from tests.attention.contracting import contracting
from tests.attention.frames import cases
from vstar_kernels.attention.triton import configs, frames
from vstar_kernels.attention.triton.configs import FramesConfig

SMALL = FramesConfig(rows=16, keys=16, warps=4, stages=1, programs=3, shared=0)
# Two tiles of rows are enough, and the interpreter is slow.
LAYOUT = vk.Layout(vk.Text(4), vk.Frames(3, 8))
LARGEST = 1e30  # logit
R = vk.FrameRule
MASK = R.bias(cases.masked(cases.table(LAYOUT, None)))
RULES = {
    "none": None,
    "row_max": R.tar(1.0, 0.8, stat="row_max"),
    "row_max clamped, window": R.tar(1.0, -0.6, "row_max", True) + R.window(1),
    "frame_max": R.tar(1.0, 0.8),
    "frame_max masked": R.tar(1.0, -0.6) + MASK,
    "bias": R.bias(cases.table(LAYOUT, None, 2)),
    "factor, span": R.attenuate(0.6, 2, metric="token"),
    "band": R.band(3),
    "row_max, factor, bias": R.tar(1.0, stat="row_max") + R.attenuate(0.6, 1) + MASK,
    "frame_max, factor, band": R.tar(1.0) + R.attenuate(0.6, 1) + R.band(3),
    "given": R.tar(1.0, 0.8),
}


@pytest.fixture(autouse=True)
def multiply_adds(monkeypatch):
    monkeypatch.setattr(configs, "frames", lambda *key: SMALL)
    with contracting():
        yield
    frames._forward_plan.cache_clear()
    frames._backward_plan.cache_clear()


def ways(name):
    """How a rule's bias may come to the logits."""
    return ["split", "revisit"] if "_max" in name else ["known"]


def integers(size, *shape):
    return torch.randint(-size, size + 1, shape).float()


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(LARGEST, torch.float32), (-LARGEST, torch.float16), (1e6, torch.float16)],
)
@pytest.mark.parametrize(("name", "way"), [(name, way) for name in RULES for way in ways(name)])
def test_frame_attention(name, way, largest, dtype, monkeypatch):
    below = float("inf") if way == "revisit" else 0.0
    monkeypatch.setattr(configs, "revisit_below", lambda *key: below)
    torch.manual_seed(0)
    query, key = integers(500, 1, LAYOUT.tokens, 2, 16), integers(500, 1, LAYOUT.tokens, 1, 16)
    value, weight = integers(8, *key.shape), integers(8, *query.shape)
    map_weight = integers(8, 1, 2, LAYOUT.frames, LAYOUT.frames + 1)
    scale = largest / float((query.transpose(1, 2) @ key.transpose(1, 2).mT).abs().max())
    rule = RULES[name]
    if name == "given":
        stat = largest * torch.randn(query.shape[:-1])
        rule = vk.FrameRule(rule.terms, stat=stat)
    lengths = torch.tensor([17], dtype=torch.int32)  # part of the second frame, none of the third
    options = {"scale": scale, "key_lengths": lengths, "return_map": True, "map_heads": True}

    def results(dtype, backend):
        tensors = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        out, mean_map = vk.frame_attention(*tensors, LAYOUT, rule, **options, backend=backend)
        loss = (out * weight).double().sum() + (mean_map * map_weight).double().sum()
        return out, mean_map, *torch.autograd.grad(loss, tensors)

    # Each row's weights are all at one key, so that results are sums of the integers.
    for found, expected in zip(
        results(dtype, "triton"), results(torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-3)


ALIKE = {
    "bias": R.bias(
        torch.tensor([[-1e9] * 4, [0.0, 0.5, 0.25, 1.0], [1e9] * 4, [-1e9, 0, 1, -1e9]])
    ),
    "bias, row_max": R.tar(1.0, 0.8, stat="row_max") + R.bias(torch.full((4, 4), -1e9)),
    "bias, frame_max": R.tar(1.0, 0.8) + R.bias(torch.full((4, 4), -1e9)),
}


def test_a_large_bias_that_nothing_seen_has_changes_nothing():
    """The frame that has it is beyond the key lengths."""
    layout, table = vk.Layout(vk.Frames(4, 16)), torch.zeros(4, 4)
    table[:, 3] = 1e9
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, layout.tokens, 2, 16).unbind()]
    options = {"key_lengths": torch.tensor([48], dtype=torch.int32), "return_map": True}

    def results(rule):
        out, mean_map = vk.frame_attention(*tensors, layout, rule, **options, backend="triton")
        loss = out.square().sum() + mean_map[0, 0, 0]
        return out, mean_map, *torch.autograd.grad(loss, tensors)

    for found, expected in zip(results(R.bias(table)), results(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in ALIKE for way in ways(name)])
def test_a_large_bias_of_all_keys_of_a_row_changes_no_weight(name, way, monkeypatch):
    """Beside it the logits would be rounded away."""
    below = float("inf") if way == "revisit" else 0.0
    monkeypatch.setattr(configs, "revisit_below", lambda *key: below)
    layout = vk.Layout(vk.Frames(4, 16))
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, layout.tokens, 2, 16).unbind()]
    weight, map_weight = torch.randn(tensors[0].shape), torch.randn(1, 4, 5)

    def results(dtype, backend):
        cast = [x.to(dtype) for x in tensors]
        options = {"return_map": True, "backend": backend}
        out, mean_map = vk.frame_attention(*cast, layout, ALIKE[name], **options)
        loss = (out * weight).sum() + (mean_map * map_weight).sum()
        return out, mean_map, *torch.autograd.grad(loss, tensors)

    for found, expected in zip(
        results(torch.float32, "triton"), results(torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-5)
