"""Route C: PyTorch's attention exchanged while a module of any class runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vstar_kernels as vk
from vstar_kernels.models.full3d.function_mode import ExchangedAttention, FunctionModeRoute
from vstar_kernels.models.full3d.masks import key_lengths
from vstar_kernels.models.full3d.seats import FrameChange, FrameLayer, Reading, seat_of

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = vk.Layout(vk.Text(3), vk.Frames(4, 2))
RULE = vk.FrameRule.tar(1.0)


class OwnAttention(nn.Module):
    """An attention module of nobody's: over the video with a mask, and then over a prompt."""

    def __init__(self, **options):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.options = options
        self.prompt = True

    def qkv(self, x):
        return self.project(x).unflatten(-1, (3, 2, 4)).unbind(2)  # (batch, tokens, heads, 4)

    def forward(self, x, mask=None, prompt=None):
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        if prompt is not None:
            _, k, v = (y.transpose(1, 2) for y in self.qkv(prompt))
            out = out + F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Control:
    """Says the same of every call."""

    def __init__(self, layout=LAYOUT, rule=RULE):
        self.found = FrameChange(rule, Reading(layout, "the test"), None, "0")

    def change(self):
        return self.found


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 11, 8)


def take(module, control):
    """Puts the route into a module, and returns the function that takes it out."""
    seat = seat_of(FrameLayer("own", 0, module))
    seat.controller = control
    seat.keep(FunctionModeRoute)

    def leave():
        seat.controller = None
        seat.release()

    return leave


def test_any_module_is_reached_and_left_as_it_was(x):
    module, prompt = OwnAttention(), torch.randn(2, 5, 8)
    cls, stock = type(module), module(x, prompt=prompt)
    leave = take(module, Control())
    query, key, value = module.qkv(x)
    attended = vk.frame_attention(query, key, value, LAYOUT, RULE, backend="reference")
    plain = vk.frame_attention(query, key, value, LAYOUT, backend="reference")
    expected = stock + (attended - plain).flatten(2)
    torch.testing.assert_close(module(x, prompt=prompt), expected)
    leave()
    assert type(module) is cls
    assert torch.equal(module(x, prompt=prompt), stock)


def test_a_mask_over_keys_is_a_length_of_keys(x):
    lengths = torch.tensor([11, 9], dtype=torch.int32)
    exists = (torch.arange(11) < lengths[:, None])[:, None, None]
    module = OwnAttention()
    query, key, value = module.qkv(x)
    expected = vk.frame_attention(query, key, value, LAYOUT, RULE, key_lengths=lengths).flatten(2)
    leave = take(module, Control())
    torch.testing.assert_close(module(x, exists), expected)
    torch.testing.assert_close(module(x, torch.where(exists, 0.0, -1e4)), expected)
    leave()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 11, 11, dtype=torch.bool), "masks pairs of tokens"),
        (torch.arange(11).ge(2).expand(2, 1, 1, 11), "in the middle"),
        (torch.linspace(0, 1, 11).expand(2, 1, 1, 11), "in the middle"),
        (torch.stack([torch.arange(11) < n for n in (11, 4)]).view(1, 2, 1, 11), "in the middle"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=rf"own .*{message}"):
        key_lengths(mask, "own")


@pytest.mark.parametrize(("options", "named"), [({"is_causal": True}, "is_causal=True"),
                                                ({"dropout_p": 0.5}, "dropout_p=0.5")])  # fmt: skip
def test_what_frame_attention_has_not_is_refused(x, options, named):
    module = OwnAttention(**options)
    leave = take(module, Control())
    with pytest.raises(ValueError, match=named):
        module(x)
    leave()


def test_a_module_that_does_not_reach_it_is_an_error(x):
    module = OwnAttention()
    leave = take(module, Control(layout=vk.Layout(vk.Frames(4, 2))))
    with pytest.raises(RuntimeError, match=r"own did not attend .* with 11 queries and 11 keys"):
        module(x)
    leave()


def test_the_mode_ends_with_the_call(x):
    module = OwnAttention()
    leave = take(module, Control())
    with pytest.raises(RuntimeError):
        module(x[..., :5])
    leave()
    seen = []
    with ExchangedAttention(lambda call: seen.append(call) or call.stock()):
        module(x)
    module(x)
    assert len(seen) == 1


def test_under_compile_it_runs_between_graphs_or_says_why_not(x):
    module = OwnAttention()
    leave = take(module, Control())
    expected = module(x)
    outer = nn.Sequential(module, nn.Identity())
    torch.testing.assert_close(torch.compile(outer, backend="eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="eager mode only"):
        torch.compile(outer, backend="eager", fullgraph=True)(x)
    leave()
