"""FlopCounterMode counts the operators, as it counts SDPA, and what masks leave of it."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import vstar_kernels as vk
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.attention.frames.cost import kept_pairs
from vstar_kernels.testing import eager_frames

B, H, D = 2, 4, 16
LAYOUT = vk.Layout(vk.Text(3), vk.Frames(4, 5), vk.Frames(2, 3, first=2), vk.Text(2))
COUNTER = FlopCounterMode(display=False)  # made before any call


def counted(function, *tensors):
    with COUNTER:
        result = function(*tensors)
    return COUNTER.get_total_flops(), result


def tensors(tokens, key_heads=H, requires_grad=False):
    torch.manual_seed(0)
    query = torch.randn(B, tokens, H, D)
    key, value = torch.randn(2, B, tokens, key_heads, D)
    return [x.requires_grad_(requires_grad) for x in (query, key, value)]


def sdpa_flops(tokens, key_heads=H):
    shapes = [(B, heads, tokens, D) for heads in (H, key_heads, key_heads)]
    return sdpa_flop_count(*shapes), sdpa_backward_flop_count(shapes[0], *shapes)


@pytest.mark.parametrize(
    ("operation", "backend"), [("tar", "cpu"), ("frames", None), ("frames", "reference")]
)
def test_a_call_is_counted_as_sdpa_is(operation, backend):
    if reasons := backend and vk.backends.available()[backend]:
        pytest.skip("; ".join(reasons))
    tokens = 12 if operation == "tar" else LAYOUT.tokens

    def attention(query, key, value):
        if operation == "tar":
            return vk.tar_attention(query, key, value, vk.GaussianBias(1.0), backend=backend)
        rule = vk.FrameRule.tar(1.0)
        return vk.frame_attention(query, key, value, LAYOUT, rule, backend=backend)

    forward, backward = sdpa_flops(tokens)
    assert counted(attention, *tensors(tokens))[0] == forward
    swapped = [x.transpose(1, 2) for x in tensors(tokens)]
    with sdpa_kernel(SDPBackend.MATH):  # the one that is counted on a CPU
        assert counted(F.scaled_dot_product_attention, *swapped)[0] == forward
    leaves = tensors(tokens, requires_grad=True)
    found, (out, grads) = counted(
        lambda *x: (y := attention(*x), torch.autograd.grad(y.sum(), x)), *leaves
    )
    assert found == forward + backward
    expected = attention(*leaves)  # counting changes no result
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    for grad, x in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(grad, x, rtol=1e-5, atol=1e-6)


def test_maps_alone_are_one_product():
    query, key, _ = tensors(12)
    columns = torch.rand(B, 12, 3)
    forward, _ = sdpa_flops(12)

    def maps(*given):
        return vk.column_attention(*given, backend="reference")

    assert counted(maps, query, key, None, columns)[0] == forward // 2


def test_counting_does_not_outlive_the_mode():
    leaves = tensors(LAYOUT.tokens, requires_grad=True)
    assert "_Eager" in vk.frame_attention(*leaves, LAYOUT).grad_fn.name()
    with COUNTER:
        assert "_Eager" not in vk.frame_attention(*leaves, LAYOUT).grad_fn.name()


RULES = {
    "none": vk.FrameRule(),
    "window": vk.FrameRule.window(1),
    "causal": vk.FrameRule.causal(1),
    "band": vk.FrameRule.band(1),
    "band, window": vk.FrameRule.band(2, beyond=1) + vk.FrameRule.window(2),
    "by head": vk.FrameRule.bias(torch.stack([torch.zeros(4, 4), *[torch.eye(4).log()] * (H - 1)])),
}


@pytest.mark.parametrize("rule", RULES)
def test_masked_pairs_are_not_counted(rule):
    """Against the weights of the dense formula, of which none vanishes but what is masked."""
    query, key, value = tensors(LAYOUT.tokens, key_heads=2)
    call = check_call(query, key, value, LAYOUT, RULES[rule])
    each = torch.eye(LAYOUT.tokens)[None, :, None, :].repeat(B, 1, 2, 1)
    weights = eager_frames(query, key, each, LAYOUT, RULES[rule], scale=D**-0.5)
    visible = int((weights[0] > 0).sum())
    assert kept_pairs(call) == visible
    assert (rule == "none") == (visible == H * LAYOUT.tokens**2)
    found, _ = counted(lambda *x: vk.frame_attention(*x, LAYOUT, RULES[rule]), query, key, value)
    assert found == 4 * B * D * visible


def test_an_unbounded_band_keeps_everything():
    query, key, value = tensors(LAYOUT.tokens)
    call = check_call(query, key, value, LAYOUT, vk.FrameRule.band(2**29))
    call.band = torch.tensor([-(2**30), 2**30], dtype=torch.int32)[:, None, None].expand(2, 4, 4)
    assert kept_pairs(call) == H * LAYOUT.tokens**2
    call.band = -call.band.flip(0).abs()  # nothing is so far below
    text = LAYOUT.tokens**2 - 26**2
    assert kept_pairs(call) == H * text
