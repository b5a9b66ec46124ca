"""Layouts that are read from a call, where shapes alone do not tell them."""

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import HEIGHT, PLACES, TINY, WIDTH
from vstar_kernels.models.full3d import layouts
from vstar_kernels.models.full3d.families import find_family

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
RULE = vk.FrameRule.tar(1.0)


def read(name, model=None, **changes):
    tiny = TINY[name]
    model = tiny.make() if model is None else model
    call = layouts.Call(model, (), tiny.call() | changes)
    return find_family(model).read(call)


@pytest.mark.parametrize("rate", [24.0, 25.0, 30.0])
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_coordinates_of_ltx_are_latent_frames(rate, frames):
    from diffusers import LTXConditionPipeline as Pipeline

    ids = Pipeline._prepare_video_ids(2, frames, HEIGHT // 2, WIDTH // 2)
    coordinates = Pipeline._scale_video_ids(ids).float()
    coordinates[:, 0] = coordinates[:, 0] * (1.0 / rate)
    reading = read("ltx", video_coords=coordinates, num_frames=None)
    assert reading.layout == vk.Layout(vk.Frames(frames, PLACES))


def test_conditions_of_ltx_have_the_time_that_they_show():
    """A keyframe before the video: at the pixel frame where the third latent frame begins."""
    from diffusers import LTXConditionPipeline as Pipeline

    ids = Pipeline._prepare_video_ids(2, 6, HEIGHT // 2, WIDTH // 2)
    one = Pipeline._prepare_video_ids(2, 1, HEIGHT // 2, WIDTH // 2)
    video = Pipeline._scale_video_ids(ids).float()
    for pixel, time in ((0, 0), (9, 2), (13, 2.5)):
        condition = Pipeline._scale_video_ids(one, frame_index=pixel).float()
        coordinates = torch.cat([condition, video], dim=2)
        coordinates[:, 0] /= 25.0
        layout = read("ltx", video_coords=coordinates).layout
        assert layout == vk.Layout(vk.Frames(1, PLACES, first=time), vk.Frames(6, PLACES))
        assert layout.frames == 6 + (pixel == 13)


def test_conditions_of_ltx_take_part():
    tiny = TINY["ltx"]
    model, inputs = tiny.make(), tiny.call(4)
    layout = vk.Layout(vk.Frames(1, PLACES, first=2), vk.Frames(3, PLACES))
    times = torch.tensor(layout.coordinates)[[run.frame for run in layout.runs]]
    seconds = ((times * 8 - 7).clamp(min=0) / 24).repeat_interleave(PLACES)
    inputs["video_coords"] = torch.stack([seconds] * 3).expand(2, -1, -1)
    with torch.no_grad(), vk.apply_frames(model, RULE):
        out = model(**inputs)[0]
    with torch.no_grad(), vk.apply_frames(model, RULE, layout=layout):
        assert torch.equal(model(**inputs)[0], out)


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_coordinates_of_ltx_2_are_latent_frames(frames):
    model = TINY["ltx-2"].make()
    coordinates = model.rope.prepare_video_coords(2, frames, HEIGHT // 2, WIDTH // 2, "cpu", 25.0)
    reading = read("ltx-2", model, video_coords=coordinates)
    assert reading.layout == vk.Layout(vk.Frames(frames, PLACES))


def test_a_chrono_edit_of_an_image_has_the_time_between():
    tiny = TINY["chronoedit"]
    call = layouts.Call(tiny.make(), (), tiny.call(2))
    assert layouts.chronoedit(call).layout == vk.Layout(vk.Frames(2, PLACES, step=7))


def test_patches_round_down():
    inputs = TINY["wan"].call()
    odd = torch.nn.functional.pad(inputs["hidden_states"], (0, 1, 0, 1))
    assert read("wan", hidden_states=odd).layout == vk.Layout(vk.Frames(3, PLACES))


def test_the_prompt_of_one_framepack_video_is_cut_off():
    """The model leaves the prompt's padding out where the batch is one."""
    tiny = TINY["framepack"]
    model = tiny.make()
    inputs = {
        name: x[1:] if isinstance(x, torch.Tensor) and x.ndim > 1 else x
        for name, x in tiny.call().items()
    }
    for name in ("timestep", "guidance"):
        inputs[name] = inputs[name][1:]
    with torch.no_grad(), vk.apply_frames(model, RULE):
        one = model(**inputs)[0]
        both = tiny.run(model)
    torch.testing.assert_close(one, both[1:], rtol=0.0, atol=1e-5)


def test_history_that_is_left_out():
    tiny = TINY["framepack"]
    without = {
        f"{name}_{length}": None
        for name in ("latents_history", "indices_latents_history")
        for length in ("2x", "4x")
    }
    layout = read("framepack", **without).layout
    assert layout.coordinates == (0.0, 7.0, 8.0, 9.0, 10.0)
    history = tiny.layout(3).tokens - layout.tokens
    assert history == 3


def test_an_unknown_model_has_no_layout():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"what a Linear is called with: give the layout="):
        layouts.no_layout(layouts.Call(model, (), {}))


def test_layers_of_their_own_sequence_are_known_where_blocks_are_compiled():
    """torch.compile(block) puts a part into the names of the block's modules."""
    motif, rule = TINY["motif"], vk.FrameRule.window(1)
    model = motif.make()
    with torch.no_grad():
        with vk.apply_frames(model, rule):
            expected = motif.run(model)
        blocks = model.single_transformer_blocks
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block, backend="eager")
        with vk.apply_frames(model, rule) as handle:
            assert handle.layers[-1].name == "single_transformer_blocks.1._orig_mod.attn"
            torch.testing.assert_close(motif.run(model), expected)


def test_kandinsky_6_without_positions_is_a_video_alone():
    """Its text-to-video calls tell none; the model counts the frames then."""
    assert read("kandinsky-6", visual_rope_pos=None).layout == vk.Layout(vk.Frames(3, PLACES))


def test_videos_of_cosmos_3_are_of_the_same_time():
    """As in its transfer, where frame t of a control is at the time of the target's frame t."""
    both = read("cosmos-3", vision_token_shapes=[(1, 2, 3), (2, 2, 3)])
    layout = vk.Layout(vk.Frames(1, PLACES), vk.Frames(2, PLACES), vk.Text(4))
    assert both.layout == layout
    assert both.layout.coordinates == (0.0, 1.0)
    assert both.key_layout == vk.Layout(vk.Text(5), *layout.segments)


def test_where_the_video_of_cosmos_3_is_its_indices_say():
    places = TINY["cosmos-3"].call()["vision_sequence_indexes"]
    after = read("cosmos-3", vision_sequence_indexes=places + 4)
    assert after.layout == vk.Layout(vk.Text(4), vk.Frames(3, PLACES))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 300.0),
        ({"vision_timesteps": torch.zeros(0), "sound_timesteps": torch.full((4,), 7.0)}, 7.0),
        (
            {
                "vision_timesteps": torch.zeros(0),
                "sound_timesteps": None,
                "action_timesteps": torch.full((2,), 5.0),
            },
            5.0,
        ),
        ({"vision_timesteps": torch.zeros(0), "sound_timesteps": None}, None),
    ],
)
def test_cosmos_3_is_told_the_timestep_of_what_it_denoises(changes, expected):
    """Where the video is given whole, that is its sound, or the actions in it."""
    model = TINY["cosmos-3"].make()
    call = layouts.Call(model, (), TINY["cosmos-3"].call() | changes)
    assert find_family(model).read_timestep(call) == expected


def test_lengths_of_cosmos_3_may_be_tensors():
    tiny = TINY["cosmos-3"]
    lengths = {name: torch.tensor(tiny.call()[name]) for name in ("und_len", "sequence_length")}
    assert read("cosmos-3", **lengths).layout == read("cosmos-3").layout


@pytest.mark.parametrize("apply", [lambda *x, **y: vk.apply_frames(*x, RULE, **y), vk.capture_maps])
def test_cosmos_3_takes_no_layout_as_its_keys_are_others(apply):
    model = TINY["cosmos-3"].make()
    with pytest.raises(ValueError, match="layout must be None for a Cosmos3OmniTransformer"):
        apply(model, layout=vk.Layout(vk.Frames(4, PLACES)))
    assert not model._forward_pre_hooks


def test_a_layout_that_does_not_fit_is_not_asked_for_again():
    tiny = TINY["wan"]
    model, layout = tiny.make(), vk.Layout(vk.Frames(1, 1))
    with vk.apply_frames(model, RULE, layout=layout), pytest.raises(ValueError) as error:
        model(**tiny.call())
    assert "but the layout= of apply_frames says 1: " in str(error.value)
    assert "Give the layout=" not in str(error.value)
