"""The front door on tiny pipelines of full-3D transformers."""

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from examples import tiny_transformers as tiny
from tests.versions import is_before
from vstar_kernels.methods.pipelines import PipelineCall

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:CPU Autocast only supports"),
]
PROMPT = "a kite rises over a beach"
STAGES = ("a kite on the sand", "a kite low over a beach", "a kite high in the sky")
TAR = vk.FrameTAR(strength=20.0, steps=1)  # the random weights' attention is weak
FRAMES = 9
SETTINGS = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
APART = ("wan", "skyreels", "anyflow", "ltx", "allegro", "cosmos")
JOINT = ("cogvideox", "hunyuan", "mochi")


@pytest.fixture
def make(monkeypatch):
    """A tiny pipeline and the settings of its calls."""

    def make(name):
        if name == "anyflow" and is_before("diffusers", "0.39"):
            pytest.skip("diffusers has AnyFlow since 0.39")
        if name == "skyreels":  # whose pipeline needs a package for odd characters
            from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2 as module

            fixer = type("ftfy", (), {"fix_text": staticmethod(lambda text: text)})
            monkeypatch.setattr(module, "ftfy", fixer, raising=False)
        pipe = getattr(tiny, name)()
        pipe.set_progress_bar_config(disable=True)
        more = {"hunyuan": {}, "allegro": {"clean_caption": False, "max_sequence_length": 12}}
        return pipe, {**SETTINGS, **more.get(name, {"max_sequence_length": 12})}

    return make


def native(pipe, settings, prompt=PROMPT, num_frames=FRAMES):
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, generator=generator, num_frames=num_frames, **settings).frames[0]


@pytest.mark.parametrize("name", [*APART, *JOINT])
def test_each_pipeline(make, name):
    """One text is the pipeline's own way under TAR, and all is as it was afterwards."""
    pipe, settings = make(name)
    frames = 7 if name == "mochi" else FRAMES  # a latent frame of Mochi is of 6
    before = native(pipe, settings, num_frames=frames)
    with vk.apply_tar(pipe, TAR):
        expected = native(pipe, settings, num_frames=frames)
    single = vk.VSTAR(pipe, TAR)(PROMPT, num_frames=frames, seed=3, **settings)
    assert torch.equal(single.frames, expected)
    assert (expected - before).abs().max() > 1e-4
    assert single.config == TAR
    assert len(single.layers) == 2
    assert torch.equal(native(pipe, settings, num_frames=frames), before)


def test_a_rule_between_frames(make):
    """At every step, as ``apply_frames`` puts it on."""
    pipe, settings = make("wan")
    rule = vk.FrameRule.window(1)
    before = native(pipe, settings)
    with vk.apply_frames(pipe, rule):
        expected = native(pipe, settings)
    found = vk.VSTAR(pipe, rule)(PROMPT, num_frames=FRAMES, seed=3, **settings)
    assert torch.equal(found.frames, expected)
    assert (expected - before).abs().max() > 1e-5
    assert found.config is rule
    assert len(found.layers) == 2
    assert torch.equal(native(pipe, settings), before)


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_stages_in_latent_frames(make, name, guidance_scale):
    """Stages that are all the same are the prompt; others are not, and the last frame has its own.

    By the parts, one by one: embeddings of frames 0, 4 and 8.
    """
    pipe, settings = make(name)
    settings["guidance_scale"] = guidance_scale
    expected = native(pipe, settings)
    vstar = vk.VSTAR(pipe, None)
    same = vstar(vk.Synopsis(PROMPT, [PROMPT] * 3), num_frames=FRAMES, seed=3, **settings)
    torch.testing.assert_close(same.frames, expected, rtol=1e-3, atol=1e-4)
    staged = vstar(vk.Synopsis(PROMPT, STAGES), num_frames=FRAMES, seed=3, **settings)
    assert (staged.frames - expected).abs().max() > 1e-5
    call = PipelineCall(pipe, settings)
    encoded = call.encode(STAGES)
    assert (encoded.mask is not None) == (name in ("ltx", "allegro"))
    assert call.frames_of_a_latent == 4
    embeddings = vk.interpolate_embeddings(encoded.embeddings, FRAMES)[::4]
    mask = None if encoded.mask is None else encoded.mask  # of 3 stages at 3 latent frames
    with vk.condition_frames(
        pipe,
        embeddings,
        guidance=call.guided,
        mask=mask,
        negative=None if encoded.negative is None else encoded.negative.expand(3, -1, -1),
        negative_mask=(
            None if encoded.negative_mask is None else encoded.negative_mask.expand(3, -1)
        ),
    ):
        by_hand = native(pipe, settings)
    torch.testing.assert_close(staged.frames, by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "asked", "near"),
    [
        ("wan", 16, "13 or 17"),
        ("skyreels", 6, "5 or 9"),
        ("ltx", 16, "13 or 17"),
        ("cosmos", 16, "13 or 17"),
        ("hunyuan", 16, "13 or 17"),
        ("mochi", 16, "13 or 19"),
        ("cogvideox", 13, "9 or 16"),  # 4 latent frames, which are decoded to 16
        ("cogvideox", 2, "1 or 8"),
        ("allegro", 7, "6 or 8"),  # 3 latent frames, of which the last is of none of the 7
    ],
)
def test_numbers_of_frames_that_are_not_made(make, name, asked, near):
    """Else the video has other frames than its stages were laid over."""
    pipe, settings = make(name)
    with pytest.raises(ValueError, match=rf"such as {near}, got {asked}: a latent frame is of"):
        vk.VSTAR(pipe, None)(PROMPT, num_frames=asked, seed=3, **settings)
    if name == "allegro":  # whose decoder takes 24 frames at least
        return
    call = PipelineCall(pipe, {**settings, "num_inference_steps": 2, "output_type": "pil"})
    assert len(call.sample(PROMPT, asked, 3)) != asked
    for allowed in map(int, near.split(" or ")):
        call.check_frames(allowed)
        assert len(call.sample(PROMPT, allowed, 3)) == allowed


@pytest.mark.parametrize("frames", [6, 8, 9])
def test_allegro_has_a_stage_for_each_latent_frame(make, frames):
    pipe, settings = make("allegro")
    staged = vk.VSTAR(pipe, None)(
        vk.Synopsis(PROMPT, STAGES), num_frames=frames, seed=3, **settings
    )
    assert staged.frames.shape[1] == -(-frames // 4)


@pytest.mark.parametrize("name", JOINT)
def test_joint_text_is_one_for_all_frames(make, name):
    pipe, settings = make(name)
    with pytest.raises(ValueError, match=r"has one text for the whole video.*got 3"):
        vk.VSTAR(pipe)(vk.Synopsis(PROMPT, STAGES), num_frames=25, seed=3, **settings)


def test_both_transformers_of_wan(make):
    """Wan 2.2 begins with one and finishes with the other: both follow."""
    pipe, settings = tiny.wan(2), {**SETTINGS, "max_sequence_length": 12}
    pipe.set_progress_bar_config(disable=True)
    synopsis, always = vk.Synopsis(PROMPT, STAGES), vk.FrameTAR(strength=20.0, steps=None)
    staged = vk.VSTAR(pipe, always)(synopsis, num_frames=FRAMES, seed=3, maps=True, **settings)
    assert {layer.model for layer in staged.layers} == {"transformer", "transformer_2"}
    assert {item.model for item in staged.maps.maps} == {"transformer", "transformer_2"}
    for model in (pipe.transformer, pipe.transformer_2):
        for module in model.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks


def test_its_own_default_is_a_frame_tar(make):
    pipe, settings = make("wan")
    assert vk.VSTAR(pipe)(PROMPT, num_frames=5, seed=0, **settings).config == vk.FrameTAR()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pipe: vk.VSTAR(pipe, "64D1"),
            "config must be a FrameTAR, a FrameRule or None, got TARConfig, for a Wan",
        ),
        (lambda pipe: vk.VSTAR(pipe, extend_positions=True), "extend_positions is for models with"),
    ],
)
def test_what_does_not_fit(make, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(make("wan")[0])


def test_a_frame_tar_is_for_full_3d_models():
    from examples import tiny as temporal

    with pytest.raises(TypeError, match="TARConfig, a preset or None, got FrameTAR, for a Text"):
        vk.VSTAR(temporal.text_to_video(), vk.FrameTAR())
