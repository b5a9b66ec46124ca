"""Masks over all pairs of tokens, which some models make, are not made where a rule is on."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vstar_kernels as vk
from tests.models.full3d.dense import Dense
from tests.models.full3d.tiny import TINY

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = vk.FrameRule()
MASKING = {"hunyuan-1.5": 12, "skyreels-v2-ar": 16}  # and how many frames tell S × S from the rest


class Pairs(TorchDispatchMode):
    """Notes the operations that make a tensor with an element for each pair of tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.pairs = tokens**2
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() and x.numel() % self.pairs == 0:
                self.found.append(func)
        return out


@pytest.fixture(params=MASKING)
def tiny(request):
    return TINY[request.param]


@pytest.fixture
def frames(request, tiny):
    return next(n for name, n in MASKING.items() if TINY[name] is tiny)


def test_no_tensor_of_pairs_is_made(tiny, frames):
    model = tiny.make()
    tokens = tiny.layout(frames).tokens
    with Pairs(tokens) as stock:
        expected = tiny.run(model, frames)
    assert stock.found
    with vk.apply_frames(model, PLAIN), Pairs(tokens) as ours:
        found = tiny.run(model, frames)
    assert not ours.found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.isfinite().all()


def test_what_is_stock_is_masked_as_before(tiny, frames):
    """In steps and layers that no rule is on."""
    model = tiny.make()
    expected = tiny.run(model)
    with vk.apply_frames(model, vk.FrameRule.tar(1.0), steps=0) as handle:
        handle.step = 1
        assert torch.equal(tiny.run(model), expected)
    first = tiny.layers[:1]
    regularized = Dense(tiny, strength=1.0, layers=first).run(model)
    with vk.apply_frames(model, vk.FrameRule.tar(1.0), layers=[0]):
        torch.testing.assert_close(tiny.run(model), regularized, rtol=0, atol=3e-6)


def test_padding_of_any_length_is_hidden():
    """Of a prompt of HunyuanVideo-1.5: none of it, some, all but an image."""
    tiny = TINY["hunyuan-1.5"]
    model = tiny.make()
    whole, some, none = ([6, 6], [4, 4], 1.0), ([4, 0], [0, 1], 0.0), ([0, 0], [0, 0], 1.0)
    for first, second, image in (whole, some, none):
        inputs = tiny.call()
        for name, counts in (("", first), ("_2", second)):
            mask = inputs[f"encoder_attention_mask{name}"]
            of = torch.arange(mask.shape[1])
            inputs[f"encoder_attention_mask{name}"] = (of < torch.tensor(counts)[:, None]).float()
        inputs["image_embeds"] = torch.full_like(inputs["image_embeds"], image)
        with torch.no_grad():
            (expected,) = model(**inputs)
            with vk.apply_frames(model, PLAIN):
                (found,) = model(**inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_skyreels_reads_its_own_configuration_again():
    model = TINY["skyreels-v2-ar"].make()
    own, cls = model.config, type(model)
    with vk.apply_frames(model, PLAIN):
        assert model.config is own
        assert model.config.num_frame_per_block == 2
    assert model.config is own
    assert type(model) is cls


def test_a_compiled_skyreels_makes_its_mask_where_no_rule_is_on():
    tiny = TINY["skyreels-v2-ar"]
    model = tiny.make(num_layers=1)
    with vk.apply_frames(model, vk.FrameRule.tar(1.0), steps=0) as handle:
        expected = []
        for step in (0, 1):
            handle.step = step
            expected.append(tiny.run(model))
        made = []

        def backend(graph, inputs):
            made.append("causal_mask" in graph.code)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for step in (0, 1, 0):
            handle.step = step
            found = tiny.run(compiled)
            torch.testing.assert_close(found, expected[step], rtol=0, atol=1e-6)
    assert made == [False, True]
