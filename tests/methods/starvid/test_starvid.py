"""The front door, on tiny pipelines of every family."""

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from examples import tiny
from tests.methods.starvid.pipelines import FRAMES, LEFT, PLAN, PROMPT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CONFIG = vk.GuidanceConfig(spatial=(0, 0.3), syntax=(0.3, 0.6), updates=1, step_size=1000.0)
LATENTS = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(one_thread):
    made = tiny.text_to_video()
    made.set_progress_bar_config(disable=True)
    return made


def starvid(pipe, config=CONFIG, **settings):
    return vk.StarVid(pipe, config, backend="reference", **settings)


@pytest.mark.parametrize("make", [tiny.animatediff, tiny.i2vgen_xl, tiny.latte])
def test_each_pipeline(make):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    more = {
        "I2VGenXLPipeline": {"image": Image.new("RGB", (16, 16), (90, 120, 30))},
        "LattePipeline": {"clean_caption": False},
    }.get(type(pipe).__name__, {})
    frames = 16 if more.get("clean_caption") is False else FRAMES
    settings = {"num_frames": frames, "seed": 3, **LATENTS, "num_inference_steps": 2, **more}
    out = starvid(pipe)(PLAN, **settings)
    assert out.frames.isfinite().all()
    assert [update.step for update in out.updates] == [0, 1]
    assert out.guided_maps[0].shape[:2] == (frames, 4)


def test_it_is_its_parts(pipe):
    tar = vk.TARConfig(1.0, strength=20.0, steps=1)
    out = starvid(pipe, tar=tar)(PLAN, num_frames=FRAMES, seed=3, maps=[0, 2], **LATENTS)
    with (
        vk.guide_latents(pipe, PLAN, CONFIG, backend="reference") as guided,
        vk.apply_tar(pipe, tar),
        vk.capture_columns(pipe, guided.words[0].tokens, steps=[0, 2], backend="reference"),
    ):
        generator = torch.Generator().manual_seed(3)
        frames = pipe(PROMPT, num_frames=FRAMES, generator=generator, **LATENTS).frames[0]
    assert torch.equal(out.frames, frames)
    assert out.updates == guided.updates
    assert (out.plan, out.config, out.tar, out.seed) == (PLAN, CONFIG, tar, 3)
    assert out.words.texts == ("cat", "dog", "eats", "naps")
    assert {item.step for item in out.maps.maps} == {0, 2}
    assert out.maps.mean(step=2).shape[:3] == (1, FRAMES, 4)


def test_a_synopsis_for_its_frames(pipe):
    stages = vk.Synopsis(PROMPT, ["cat eats", "cat eats rat"])
    plan = vk.Trajectory("cat eats", [vk.Subject("cat", "eats", boxes=LEFT)])
    config = vk.GuidanceConfig(spatial=(0, 0.5), lambdas=(1, 0), updates=1)
    settings = {"num_frames": FRAMES, "seed": 3, **LATENTS}
    plain = starvid(pipe, config)(plan, **settings)
    staged = starvid(pipe, config)(plan, synopsis=stages, **settings)
    assert not torch.equal(staged.frames, plain.frames)
    other = vk.Synopsis(PROMPT, ["cat eats", "a cat eats"])
    with pytest.raises(ValueError, match="'cat' is at different tokens"):
        starvid(pipe, config)(plan, synopsis=other, **settings)


def test_a_writer_plans(pipe, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    writer = vk.TrajectoryWriter.from_file(tmp_path / "plan.json")
    settings = {"num_frames": FRAMES, "seed": 3, **LATENTS}
    made = starvid(pipe, writer=writer)(PROMPT, key_frames=2, **settings)
    assert made.plan == PLAN
    drawn = starvid(pipe)(PLAN, **settings | {"seed": None, "num_inference_steps": 1})
    assert 0 <= drawn.seed < 2**32
    with pytest.raises(ValueError, match="a prompt needs a writer of plans"):
        starvid(pipe)(PROMPT, **settings)
    with pytest.raises(ValueError, match="key_frames is for a prompt and a writer, got a Traj"):
        starvid(pipe, writer=writer)(PLAN, key_frames=2, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": "64D1"}, "config must be a GuidanceConfig or None, got str"),
        ({"writer": print}, "writer must be a TrajectoryWriter, got builtin"),
        ({"tar": 1.0}, "tar must be a TARConfig, a preset or None, got float"),
        ({"checkpointing": 1}, "checkpointing must be True or False, got int"),
    ],
)
def test_wrong_settings(pipe, settings, message):
    with pytest.raises(TypeError, match=message):
        starvid(pipe, **settings)


def test_wrong_calls(pipe):
    for arguments, error, message in (
        ({"prompt": 3}, TypeError, "prompt must be a text or a Trajectory, got int"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be from 0 to"),
        ({"refresh": True}, ValueError, "refresh is for a prompt and a writer, got a Trajectory"),
        ({"refresh": 1}, TypeError, "refresh must be True or False, got int"),
        ({"synopsis": "x"}, TypeError, "synopsis must be a Synopsis or None, got str"),
        ({"steps": 3}, TypeError, "takes no argument 'steps'"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": "a"}, TypeError, "guidance_scale must be a number, got str"),
        ({"maps": "all"}, TypeError, "maps must be True, False or indices .* got str"),
        ({"maps": [50]}, ValueError, "maps must be of steps below num_inference_steps, 50"),
    ):
        given = {"prompt": PLAN, **arguments}
        with pytest.raises(error, match=message):
            starvid(pipe)(given.pop("prompt"), **given)
    with pytest.raises(TypeError, match="pipe must be one of diffusers'"):
        vk.StarVid(pipe.unet)
