import collections

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from diffusers import UNet2DConditionModel

from tests.models.models import KINDS, make
from vstar_kernels.models.front_end import (
    FRONT_ENDS,
    find_front_end,
    models_with_temporal_attention,
    temporal_layers,
)


@pytest.mark.parametrize("name", KINDS)
def test_one_front_end_knows_each_kind_of_model(name):
    model = make(name)
    knowing = [found for found in FRONT_ENDS if next(found.layers(model), None)]
    assert len(knowing) == 1
    assert find_front_end(model) is knowing[0]


def places(model):
    return collections.Counter((layer.level, layer.place) for layer in temporal_layers(model))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_model(name):
    model = make(name)
    layers = temporal_layers(model)
    assert len(layers) == KINDS[name].layers
    assert {layer.level for layer in layers} - {"init"} == set(range(KINDS[name].levels))
    assert all(model.get_submodule(layer.name) is layer.module for layer in layers)


def test_levels_follow_the_resolution():
    for name in ("UNet3DConditionModel", "I2VGenXLUNet", "lvdm"):
        assert places(make(name)) == {
            ("init", "init"): 2,
            (0, "down"): 2,
            (1, "down"): 2,
            (1, "mid"): 2,
            (1, "up"): 4,
            (0, "up"): 4,
        }


SIZES = {
    "UNet3DConditionModel": ([10, 10, 10, 2], 2),
    "I2VGenXLUNet": ([10, 10, 10, 2], 2),
    "UNetMotionModel": ([10, 10, 10, 12], 0),
    "SparseControlNetModel": ([2, 2, 2, 2], 0),
    "UNetSpatioTemporalConditionModel": ([5, 5, 5, 1], 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    levels = [layer.level for layer in temporal_layers(model)]
    by_level, init = SIZES[name]
    assert [levels.count(level) for level in range(4)] == by_level
    assert levels.count("init") == init


def test_cross_attention_is_left_alone():
    """SVD's temporal attn2 attends to the image; I2VGenXL's encoder is not of the UNet's layers."""
    names = [layer.name for layer in temporal_layers(make("UNetSpatioTemporalConditionModel"))]
    assert all(name.endswith("attn1") for name in names)
    names = [layer.name for layer in temporal_layers(make("I2VGenXLUNet"))]
    assert not any("image_latents_temporal_encoder" in name for name in names)


def test_a_compiled_model_is_unwrapped():
    model = make("UNetMotionModel")
    compiled = torch.compile(model, backend="eager")
    assert temporal_layers(compiled) == temporal_layers(model)
    assert models_with_temporal_attention(compiled) == {"": model}


def test_a_model_without_temporal_attention_is_refused():
    model = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel has no temporal self-attention"):
        temporal_layers(model)
    with pytest.raises(
        ValueError, match="UNet2DConditionModel has no temporal self-attention"
    ) as e:
        models_with_temporal_attention(model)
    assert all(front_end.models in str(e.value) for front_end in FRONT_ENDS)


def test_what_a_pipeline_holds():
    class Pipeline:
        def __init__(self, **components):
            self.components = components

    unet, controlnet = make("UNetMotionModel"), make("SparseControlNetModel")
    parts = {"vae": nn.Linear(1, 1), "unet": unet, "controlnet": controlnet, "scheduler": object()}
    assert models_with_temporal_attention(Pipeline(**parts)) == {
        "unet": unet,
        "controlnet": controlnet,
    }
    with pytest.raises(
        ValueError, match=r"Pipeline holds no model .* it holds vae, known are UNet"
    ):
        models_with_temporal_attention(Pipeline(vae=nn.Linear(1, 1)))
    with pytest.raises(TypeError, match=r"pipe_or_model must be .* got str"):
        models_with_temporal_attention("unet")


def test_a_motion_module_that_attends_to_the_prompt():
    """As ``double_self_attention=False`` with a ``cross_attention_dim`` makes its attn2."""
    model = make("UNetMotionModel")
    layers = temporal_layers(model)
    for layer in layers:
        layer.module.is_cross_attention = layer.name.endswith("attn2")
    assert temporal_layers(model) == [layer for layer in layers if layer.name.endswith("attn1")]


def test_a_motion_adapter_is_no_model():
    """It carries AnimateDiff's motion modules into a UNet, and has no forward."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16,), motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    with pytest.raises(ValueError, match="MotionAdapter has no temporal self-attention"):
        temporal_layers(adapter)
