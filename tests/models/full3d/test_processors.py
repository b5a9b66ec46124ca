"""Route B: processors of ours in the place of models' own, and what is done to models meanwhile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.dense import Dense
from tests.models.full3d.tiny import TINY
from vstar_kernels.models.full3d.processors import PROCESSORS, FrameProcessor

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but"),  # Mochi's
]

RULE = vk.FrameRule.tar(1.0)
CLOSE = {"rtol": 0.0, "atol": 3e-6}
OWN = ("cogvideox", "consisid", "easyanimate", "mochi", "allegro", "cosmos", "hunyuan-1.5")


def processors(name, model):
    return [model.get_submodule(layer).processor for layer in TINY[name].layers]


@pytest.mark.parametrize("name", OWN)
def test_a_copy_has_the_models_own_processors(name):
    tiny = TINY[name]
    model = tiny.make()
    stock = tiny.run(model)
    with vk.apply_frames(model, RULE):
        assert all(isinstance(x, FrameProcessor) for x in processors(name, model))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for made in copies:
        assert not any(isinstance(x, FrameProcessor) for x in processors(name, made))
        with pytest.raises(RuntimeError, match="copy of one under apply_frames"):
            tiny.run(made)
        vk.apply_frames(made, RULE).remove()
        assert torch.equal(tiny.run(made), stock)


def test_cogvideox_is_fused_and_unfused_under_a_rule():
    tiny = TINY["cogvideox"]
    model = tiny.make()
    stock, expected = tiny.run(model), Dense(tiny, strength=1.0).run(model)
    with vk.apply_frames(model, RULE):
        model.fuse_qkv_projections()
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
        with vk.capture_maps(model) as capture:
            tiny.run(model)
        assert len(capture.maps) == 2
        model.unfuse_qkv_projections()  # which puts ours back
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
        model.fuse_qkv_projections()  # the model holds on to ours
    torch.testing.assert_close(tiny.run(model), stock, **CLOSE)
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.run(model), stock)
    with vk.apply_frames(model, RULE):
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
    assert not any(isinstance(x, FrameProcessor) for x in processors("cogvideox", model))


def test_a_mask_that_nothing_accounts_for_is_an_error():
    tiny = TINY["cogvideox"]
    model = tiny.make()
    inputs = tiny.call() | {"attention_kwargs": {"attention_mask": torch.zeros(2, 1, 23)}}
    handle = vk.apply_frames(model, RULE)
    for watching in (handle, vk.capture_maps(model)):
        with watching, pytest.raises(ValueError, match=r"0.attn1 masks its attention, and nothing"):
            model(**inputs)
        handle.remove()
    model(**inputs)


def test_a_processor_that_is_not_known_is_an_error():
    tiny = TINY["cosmos"]
    model = tiny.make()
    with vk.apply_frames(model, RULE):
        tiny.run(model)
        other = type("OtherProcessor", (), {"__call__": lambda *args, **kwargs: None})()
        model.transformer_blocks[1].attn1.set_processor(other)
        with pytest.raises(ValueError, match=r"blocks.1.attn1 has a OtherProcessor, .* known are"):
            tiny.run(model)
    assert processors("cosmos", model)[1] is other


def test_what_is_set_on_ours_is_the_models_own():
    """HunyuanVideo-1.5's attention backend, which its own attention asks for where no rule is."""
    tiny = TINY["hunyuan-1.5"]
    model = tiny.make()
    stock = tiny.run(model)
    before = processors("hunyuan-1.5", model)
    with vk.apply_frames(model, RULE, steps=0) as handle:
        model.set_attention_backend("_native_math")
        assert all(x._attention_backend.value == "_native_math" for x in before)
        ours = processors("hunyuan-1.5", model)
        assert all(x._attention_backend.value == "_native_math" for x in ours)
        handle.step = 1
        torch.testing.assert_close(tiny.run(model), stock, **CLOSE)
    model.reset_attention_backend()
    assert all(x._attention_backend is None for x in before)


def test_allegro_takes_padding_at_the_end_and_no_other():
    tiny = TINY["allegro"]
    model = tiny.make()
    inputs = tiny.call()
    inputs["attention_mask"][1, 2] = 0  # the last frame of one video
    with torch.no_grad(), vk.apply_frames(model, vk.FrameRule()):
        (found,) = model(**inputs)
        with vk.capture_maps(model) as capture:
            model(**inputs)
    with torch.no_grad():
        (expected,) = model(**inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(not item.map[1, :, 2].any() for item in capture.maps)
    inputs["attention_mask"][0, :, :, -2:] = 0  # the right side of the other
    refused = pytest.raises(ValueError, match=r"attn1 masks keys in the middle")
    with vk.apply_frames(model, vk.FrameRule()), refused:
        model(**inputs)


@pytest.mark.parametrize("valid", [[1, 0, 0, 1, 1, 0, 1, 0], [0] * 8, [1] * 8])
def test_mochi_takes_the_tokens_of_a_prompt_that_exist(valid):
    tiny = TINY["mochi"]
    model = tiny.make()
    inputs = tiny.call()
    inputs["encoder_attention_mask"][0] = torch.tensor(valid).bool()
    with torch.no_grad():
        (expected,) = model(**inputs)
        with vk.apply_frames(model, vk.FrameRule()):
            (found,) = model(**inputs)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["cogvideox", "allegro"])  # without a mask, and with one
def test_compiled_models_follow_the_rule(name):
    tiny = TINY[name]
    model = tiny.make(num_layers=1)
    with vk.apply_frames(model, RULE, steps=0) as handle:
        handle.step = 0
        expected = tiny.run(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(tiny.run(compiled), expected, **CLOSE)


def test_the_table_names_processors_of_diffusers():
    import diffusers.models.attention_processor as common
    from diffusers.models.transformers import (
        transformer_cosmos,
        transformer_easyanimate,
        transformer_hunyuan_video15,
    )

    rooms = (common, transformer_cosmos, transformer_easyanimate, transformer_hunyuan_video15)
    assert all(any(hasattr(room, name) for room in rooms) for name in PROCESSORS)
