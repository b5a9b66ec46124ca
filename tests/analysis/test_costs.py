import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vstar_kernels as vk
from vstar_kernels.analysis import attention_cost, receptive_field


def test_the_operations_are_those_that_pytorch_counts():
    batch, tokens, channels = 3, 5, 8
    x, weight = torch.randn(batch, tokens, channels), torch.randn(channels, channels)
    with FlopCounterMode(display=False) as counter:
        q, k, v = (x @ weight for _ in range(3))
        (q @ k.mT).softmax(-1) @ v
    cost = attention_cost(tokens, channels, batch)
    assert counter.get_total_flops() == cost.operations
    assert cost.operations == 2 * batch * tokens * channels * (3 * channels + 2 * tokens)
    assert cost.parameters == 3 * channels**2


@pytest.mark.parametrize(("channels", "ratio"), [(4, 15.6), (320, 8.4)])
def test_the_ratio_of_a_1_3(channels, ratio):
    """16 frames of 32 × 32: the paper's H = W = 128 is the grid's side."""
    grid = attention_cost(16 * 1024, channels)
    factorised = attention_cost(1024, channels, 16) + attention_cost(16, channels, 1024)
    assert grid.operations / factorised.operations == pytest.approx(ratio, abs=0.05)
    assert factorised.parameters == 2 * grid.parameters


def test_the_receptive_field_of_a_window_is_the_window():
    video = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    layout = vk.Layout(vk.Frames(5, 3))

    def attend(x, rule=None):
        tokens = x.flatten(1, 2)[:, :, None]
        out = vk.frame_attention(tokens, tokens, tokens, layout, rule, backend="reference")
        return out.squeeze(2).unflatten(1, (5, 3))

    assert (receptive_field(attend, video) > 0).all()
    frame = torch.arange(5)
    near = (frame[:, None] - frame).abs() <= 1
    seen = receptive_field(lambda x: attend(x, vk.FrameRule.window(1)), video)
    assert torch.equal(seen > 0, near)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention_cost(0, 4), ValueError, "tokens must be at least 1, got 0"),
        (lambda: attention_cost(4, 2.5), TypeError, "channels must be an integer, got float"),
        (lambda: receptive_field(lambda x: x.sum(), torch.ones(1, 2)), ValueError, r"shape \(\)"),
        (lambda: receptive_field(lambda x: 3, torch.ones(1, 2)), ValueError, "got int"),
        (lambda: receptive_field(torch.ones_like, torch.ones(1, 2)), ValueError, "differentiable"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
