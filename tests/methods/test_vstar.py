"""The front door, on tiny pipelines of every family."""

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from examples import tiny
from vstar_kernels.methods.pipelines import _text_model
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import models_with_temporal_attention, temporal_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PROMPT = "a kite rises over a beach"
STAGES = ("a kite on the sand", "a kite low over a beach", "a kite high in the sky")
SYNOPSIS = vk.Synopsis(PROMPT, STAGES)
# The random weights' attention is weak.
TAR = vk.TARConfig(1.0, strength=20.0, steps=1)
FRAMES = 5
SETTINGS = {"num_inference_steps": 3, "height": 16, "width": 16}
LATENTS = {**SETTINGS, "output_type": "latent"}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def options(pipe, settings=LATENTS):
    """What each pipeline needs in addition."""
    pipe.set_progress_bar_config(disable=True)
    more = {
        "I2VGenXLPipeline": {"image": Image.new("RGB", (16, 16), (90, 120, 30))},
        "LattePipeline": {"clean_caption": False, "negative_prompt": "blur"},
        "AnimateDiffPipeline": {"negative_prompt": "blur"},
    }
    return {**settings, **more.get(type(pipe).__name__, {})}


def frames_of(pipe):
    return 16 if type(pipe).__name__ == "LattePipeline" else FRAMES


def native(pipe, prompt, **changes):
    """The pipeline's own call."""
    name = "video_length" if type(pipe).__name__ == "LattePipeline" else "num_frames"
    settings = {**options(pipe), name: frames_of(pipe), **changes}
    torch.manual_seed(3)  # I2VGen-XL draws the image's latents without the generator
    with _text_model(pipe):
        return pipe(prompt, generator=torch.Generator().manual_seed(3), **settings).frames[0]


@pytest.mark.parametrize("make", [tiny.text_to_video, tiny.animatediff, tiny.i2vgen_xl, tiny.latte])
def test_each_pipeline(make):
    pipe = make()
    vstar = vk.VSTAR(pipe, TAR)
    settings = {"num_frames": frames_of(pipe), "seed": 3, **options(pipe)}
    # One text for all frames is the pipeline's own way.
    with vk.apply_tar(pipe, TAR):
        expected = native(pipe, PROMPT)
    single = vstar(PROMPT, **settings)
    torch.testing.assert_close(single.frames, expected, **CLOSE)
    assert (single.frames - native(pipe, PROMPT)).abs().max() > 10 * CLOSE["atol"]
    # Stages of which all are the same, too; others are not.
    same = vstar(vk.Synopsis(PROMPT, [PROMPT] * 3), **settings).frames
    torch.testing.assert_close(same, expected, **CLOSE)
    staged = vstar(SYNOPSIS, **settings)
    assert (staged.frames - expected).abs().max() > 10 * CLOSE["atol"]
    assert staged.synopsis is SYNOPSIS
    unguided = vstar(PROMPT, **settings | {"guidance_scale": 1.0})
    assert unguided.frames.isfinite().all()
    assert not torch.allclose(unguided.frames, expected, **CLOSE)
    assert_stock(pipe)


def assert_stock(pipe):
    """Nothing of ours is left in it."""
    assert (
        not hasattr(pipe.text_encoder, "text_model") or "text_model" in pipe.text_encoder._modules
    )
    for model in models_with_temporal_attention(pipe).values():
        for layer in temporal_layers(model):
            assert not isinstance(layer.module.processor, TARAttnProcessor)
        for module in model.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks


def test_stages_by_hand():
    """What it does is what its parts do, one by one."""
    pipe = tiny.text_to_video()
    synopsis = vk.Synopsis(PROMPT, STAGES, anchors=[0, 1, 4])
    texts, _ = pipe.encode_prompt(list(STAGES), "cpu", 1, False)
    embeddings = vk.interpolate_embeddings(texts, FRAMES, [0, 1, 4], "slerp")
    with vk.apply_tar(pipe, TAR), vk.condition_frames(pipe, embeddings, guidance=True):
        expected = native(pipe, PROMPT)
    vstar = vk.VSTAR(pipe, TAR, mode="slerp")
    out = vstar(synopsis, num_frames=FRAMES, seed=3, **options(pipe))
    torch.testing.assert_close(out.frames, expected, **CLOSE)
    even = vstar(SYNOPSIS, num_frames=FRAMES, seed=3, **options(pipe))
    assert not torch.allclose(even.frames, expected, **CLOSE)


def test_rounding():
    """Of 3 stages over 4 frames the second is at frame 1, or at the nearest to 1.5, 2."""
    pipe = tiny.text_to_video()
    for rounding, middle in (("down", 1), ("nearest", 2)):
        vstar = vk.VSTAR(pipe, TAR, mode="hold", rounding=rounding)
        settings = {"num_frames": 4, "seed": 3, **options(pipe), "num_inference_steps": 1}
        given = vstar(vk.Synopsis(PROMPT, STAGES, [0, middle, 3]), **settings)
        assert torch.equal(vstar(SYNOPSIS, **settings).frames, given.frames)


def test_latte_cuts_the_padding_as_its_pipeline_does():
    """Texts of several lengths: zeros after the shorter ones, as for several prompts at once."""
    pipe = tiny.latte()
    from vstar_kernels.methods.pipelines import PipelineCall

    call = PipelineCall(pipe, options(pipe))
    stages, negative, *_ = call.encode(("a kite", "a kite high up in the sky"))
    both, _ = pipe.encode_prompt(["a kite", "a kite high up in the sky"], False)
    torch.testing.assert_close(stages, both[:, : stages.shape[1]])
    assert both[:, stages.shape[1] :].abs().max() == 0
    assert stages.shape[1] == len(negative) < both.shape[1]
    _, single = pipe.encode_prompt("a kite high up in the sky", True, "blur")
    torch.testing.assert_close(negative, single[0])


def test_what_comes_back():
    pipe = tiny.text_to_video()
    vstar = vk.VSTAR(pipe, "8D1")
    out = vstar(SYNOPSIS, num_frames=4, seed=1, maps=[0, 2], **options(pipe, SETTINGS))
    assert [frame.size for frame in out.frames] == [(16, 16)] * 4
    assert (out.config, out.seed) == (vk.TARConfig.preset("8D1"), 1)
    assert {layer.sigma for layer in out.layers} == {1.0}
    assert {item.step for item in out.maps.maps} == {0, 2}
    assert out.maps.mean(level=0, step=2).shape == (2, 4, 4)
    every = vstar(SYNOPSIS, num_frames=4, seed=1, maps=True, **options(pipe, SETTINGS))
    assert {item.step for item in every.maps.maps} == {0, 1, 2}
    plain = vstar(PROMPT, num_frames=4, seed=1, **options(pipe, SETTINGS))
    assert plain.maps is None
    assert plain.synopsis == vk.Synopsis(PROMPT, [PROMPT])


@pytest.mark.parametrize("make", [tiny.text_to_video, tiny.animatediff])
def test_without_regularization(make):
    """The baseline is the pipeline's own video, whatever the number of positions."""
    pipe = make()
    settings = {"num_frames": FRAMES, "seed": 3, **options(pipe)}
    baseline = vk.VSTAR(pipe, None)(PROMPT, **settings, maps=[0])
    torch.testing.assert_close(baseline.frames, native(pipe, PROMPT), **CLOSE)
    assert baseline.config is None
    assert baseline.layers == []
    assert baseline.maps.maps
    prompted = vk.VSTAR(pipe, None)(SYNOPSIS, **settings)
    never = vk.TARConfig(1.0, steps=lambda step, timestep: False)
    expected = vk.VSTAR(pipe, never)(SYNOPSIS, **settings).frames
    torch.testing.assert_close(prompted.frames, expected, **CLOSE)
    assert not torch.allclose(prompted.frames, baseline.frames, **CLOSE)
    if make is tiny.animatediff:
        long = settings | {"num_frames": 34, "num_inference_steps": 1}
        out = vk.VSTAR(pipe, None, extend_positions=True)(PROMPT, **long)
        assert out.frames.shape[1] == 34
        assert out.layers == []
    assert_stock(pipe)


def test_seeds():
    pipe = tiny.i2vgen_xl()  # which draws from the global generator, too
    vstar = vk.VSTAR(pipe, TAR)
    settings = {"num_frames": 2, **options(pipe), "num_inference_steps": 2}
    before = torch.get_rng_state()
    first = vstar(PROMPT, seed=5, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    assert torch.equal(vstar(PROMPT, seed=5, **settings).frames, first.frames)
    drawn = vstar(PROMPT, **settings)
    assert not torch.equal(drawn.frames, first.frames)
    assert torch.equal(vstar(PROMPT, seed=drawn.seed, **settings).frames, drawn.frames)
    assert 0 <= drawn.seed < 2**32


def test_more_frames_than_positions():
    pipe = tiny.animatediff()
    settings = {"num_frames": 34, "seed": 0, **options(pipe), "num_inference_steps": 1}
    with pytest.raises(ValueError, match="extend_positions=True"):
        vk.VSTAR(pipe, TAR)(SYNOPSIS, **settings)
    assert_stock(pipe)
    out = vk.VSTAR(pipe, TAR, extend_positions=True)(SYNOPSIS, **settings)
    assert out.frames.shape[1] == 34


class Counted(vk.SynopsisWriter):
    """Counts what it is asked for."""

    def __init__(self, path):
        self.asked = []
        super().__init__(vk.SynopsisWriter.from_file(path)._source)

    def write(self, prompt, **settings):
        self.asked.append(settings)
        return super().write(prompt, **settings)


@pytest.fixture
def writer(tmp_path):
    SYNOPSIS.save(tmp_path / "synopsis.json")
    return Counted(tmp_path / "synopsis.json")


def test_a_writer(writer):
    pipe = tiny.text_to_video()
    vstar = vk.VSTAR(pipe, TAR, writer=writer)
    out = vstar(PROMPT, num_frames=3, num_stages=3, seed=0, **options(pipe))
    assert out.synopsis == SYNOPSIS
    given = vstar(SYNOPSIS, num_frames=3, seed=0, **options(pipe))
    assert torch.equal(given.frames, out.frames)
    assert writer.asked == [{"num_stages": 3, "refresh": False}]
    with pytest.raises(vk.methods.vstar.writer.SynopsisError, match="no synopsis of 'a dog'"):
        vstar("a dog", **options(pipe))
    assert_stock(pipe)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": None}, TypeError, "prompt must be a text or a Synopsis, got NoneType"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"num_frames": 4.0}, TypeError, "num_frames must be an integer, got float"),
        ({"seed": 2**32}, ValueError, "seed must be from 0 to 4294967295"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"prompt": SYNOPSIS, "num_stages": 3}, ValueError, "num_stages .* got a Synopsis"),
        ({"prompt": SYNOPSIS, "refresh": True}, ValueError, "refresh .* got a Synopsis"),
        ({"refresh": "no"}, TypeError, "refresh must be True or False, got str"),
        ({"video_length": 3}, ValueError, "video_length is set here: give num_frames"),
        ({"generator": None}, ValueError, "generator is set here: give seed"),
        ({"prompt_embeds": None}, ValueError, "prompt_embeds is set here"),
        ({"num_inference_step": 3}, TypeError, "no argument 'num_inference_step'"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": "3"}, TypeError, "num_inference_steps must be an integer"),
        ({"guidance_scale": "a"}, TypeError, "guidance_scale must be a number, got str"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite"),
        ({"maps": "all"}, TypeError, "maps must be True, False or indices .* got str"),
        ({"maps": 1}, TypeError, "maps must be True, False or indices .* got int"),
        ({"maps": ["a"]}, TypeError, "maps must be True, False or indices .* one of 'a'"),
        ({"maps": [-1]}, ValueError, "maps counts from 0, .* got -1"),
        ({"maps": [99]}, ValueError, "maps must be of steps below num_inference_steps, .* 99"),
    ],
)
def test_wrong_calls_are_found_before_a_synopsis_is_paid_for(writer, arguments, error, message):
    pipe = tiny.text_to_video()
    vstar = vk.VSTAR(pipe, TAR, writer=writer)
    with pytest.raises(error, match=message):
        vstar(**{"prompt": PROMPT, **arguments})
    with pytest.raises(ValueError, match="level 7"):
        vk.VSTAR(pipe, vk.TARConfig({7: 1.0}), writer=writer)(PROMPT)
    assert writer.asked == []


def test_wrong_arguments():
    pipe = tiny.text_to_video()
    for arguments, error, message in (
        (([],), TypeError, r"one of diffusers' TextToVideoSDPipeline, .* got list; with others"),
        ((pipe.unet,), TypeError, "got UNet3DConditionModel"),
        ((pipe, "D1"), ValueError, "preset"),
        ((pipe, 3), TypeError, "config must be a TARConfig, a preset or None, got int"),
    ):
        with pytest.raises(error, match=message):
            vk.VSTAR(*arguments)
    with pytest.raises(TypeError, match="extend_positions must be True or False, got str"):
        vk.VSTAR(pipe, extend_positions="no")
    with pytest.raises(TypeError, match="writer must be a SynopsisWriter, got str"):
        vk.VSTAR(pipe, writer="llama")
    with pytest.raises(ValueError, match=r"mode must be .* got 'cubic'"):
        vk.VSTAR(pipe, mode="cubic")
    with pytest.raises(ValueError, match=r"rounding must be 'down' or 'nearest', got 1"):
        vk.VSTAR(pipe, rounding=1)
    with pytest.raises(ValueError, match=r"num_stages .* got no writer"):
        vk.VSTAR(pipe)(PROMPT, num_stages=3)
    with pytest.raises(ValueError, match=r"refresh .* got no writer"):
        vk.VSTAR(pipe)(PROMPT, refresh=True)
    with pytest.raises(ValueError, match=r"anchors must be below num_frames, 4"):
        vk.VSTAR(pipe)(vk.Synopsis(PROMPT, STAGES, [0, 2, 9]), num_frames=4)
    with pytest.raises(TypeError, match="got StableVideoDiffusionPipeline"):
        vk.VSTAR(tiny.stable_video_diffusion())
    assert_stock(pipe)
