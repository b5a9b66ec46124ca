"""The official code base, by a small model with its names and calls."""

import pytest
import torch
from torch import nn

import vstar_kernels as vk
from tests.models import eager
from tests.models.lvdm_model import CrossAttention, Downsample
from tests.models.models import call, make
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.lvdm import LvdmTARForward

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def step(model, index, **sizes):
    return call(model, "lvdm", step_index=index, **sizes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
def test_the_samplers_step_gates(batch, size):
    """At any batch size and aspect ratio, which the official code is silently off for."""
    model, oracle = make("lvdm"), make("lvdm")
    sizes = {"batch": batch, "size": size}
    stock = call(model, "lvdm", **sizes)
    with vk.apply_tar(model, vk.TARConfig({1: 2.0})) as handle:
        on, off = step(model, 13, **sizes), step(model, 14, **sizes)
        eager.put_in(oracle, [layer.name for layer in handle.layers], sigma=2.0)
        torch.testing.assert_close(on, call(oracle, "lvdm", **sizes), **CLOSE)
        torch.testing.assert_close(off, stock, **CLOSE)
        assert (on - off).abs().max() > 1e-3
        with pytest.raises(ValueError, match="needs the step"):
            call(model, "lvdm", **sizes)
        handle.step = 14  # the caller's word goes first
        assert torch.equal(step(model, 13, **sizes), off)
    assert torch.equal(call(model, "lvdm", **sizes), stock)
    assert all("forward" not in vars(layer.module) for layer in temporal_layers(model))


def test_presets_go_by_the_latents_width():
    model = make("lvdm")
    with vk.apply_tar(model, "12D1_6D8") as handle:
        step(model, 0, size=(5, 12))
        assert {(x.level, x.width, x.sigma) for x in handle.layers} == {(0, 12, 1.0), (1, 6, 8.0)}
        with pytest.raises(ValueError, match="width 6: the widths are 4, 8"):
            step(model, 0)


def test_downsampling_within_a_residual_block_ends_a_level():
    model = make("lvdm")
    levels = [layer.level for layer in temporal_layers(model)]
    inner = nn.Sequential(nn.Sequential(Downsample(16), Downsample(16)))
    model.input_blocks[2] = inner  # `resblock_updown` has one for the input and one for the skip
    assert [layer.level for layer in temporal_layers(model)] == levels


def test_a_forward_that_was_set_before_is_not_discarded():
    model = make("lvdm")
    module = temporal_layers(model)[4].module
    module.forward = lambda x, **kwargs: x
    with pytest.raises(ValueError, match=r"input_blocks.* cannot be regularized: its forward is"):
        vk.apply_tar(model, vk.TARConfig(1.0))
    assert not isinstance(temporal_layers(model)[0].module.forward, LvdmTARForward)


def test_something_that_takes_the_forward_away_does_not_turn_tar_off():
    model = make("lvdm")
    with vk.apply_tar(model, vk.TARConfig(1.0)):
        expected = step(model, 0)
        for layer in temporal_layers(model):
            del layer.module.forward
        assert torch.equal(step(model, 0), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": torch.zeros(2, 3, 16)}, r"cross-attention \(context of shape \(2, 3, 16\)\)"),
        ({"mask": torch.ones(2, 4, 4)}, r"a mask, got shape \(2, 4, 4\) \(causal attention\)"),
        ({"scale": 2.0}, "the arguments scale"),
    ],
)
def test_calls_it_would_compute_wrongly_are_refused(arguments, message):
    forward = LvdmTARForward(CrossAttention(16))
    with pytest.raises(ValueError, match=message):
        forward(torch.zeros(2, 4, 16), **arguments)
    with pytest.raises(ValueError, match=r"\(rows, frames, channels\), got shape \(2, 16\)"):
        forward(torch.zeros(2, 16))


def test_relative_positions_are_refused():
    module = CrossAttention(16)
    module.relative_position = True
    with pytest.raises(ValueError, match="relative positions"):
        LvdmTARForward(module)(torch.zeros(2, 4, 16))


def test_each_side_of_guidance_has_maps_of_its_own():
    """lvdm's samplers call the model with the prompt, then without, with the same latents."""
    model = make("lvdm")
    texts = [torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    latents = [
        torch.randn(1, 4, 6, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 4)
    ]

    def sample(text, videos=latents):
        for timestep in (500, 20):
            for video in videos:
                for context in text:
                    model(video.clone(), torch.tensor([timestep]), context=context)

    with vk.capture_maps(model) as both:
        sample(texts)
    alone = []
    for text in texts:
        with vk.capture_maps(model) as single:
            sample([text])
        alone.append({(item.layer, item.timestep): item.map for item in single.maps})
        assert {(item.branch, item.calls) for item in single.maps} == {(0, 2)}
    assert {(item.branch, item.calls) for item in both.maps} == {(0, 2), (1, 2)}
    for item in both.maps:
        assert torch.equal(item.map, alone[item.branch][item.layer, item.timestep])
    assert not torch.equal(both.mean(level=0), both.mean(level=0, branch=1))
    torch.testing.assert_close(
        both.mean(level=0, branch=None), (both.mean(level=0) + both.mean(level=0, branch=1)) / 2
    )
    means = vk.analysis.mean_maps(both)
    assert {item.branch for item in means} == {0, 1}
    assert next(item.label for item in means if item.branch).endswith("branch 1")
    with pytest.raises(ValueError, match=r"no map of branch 2 .*branches 0, 1"):
        both.mean(branch=2)
