"""``on_step`` in every method: it is told each step once, and what it raises ends the sampling."""

import gc
import weakref

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import nn

from examples import tiny, tiny_transformers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PROMPT = "a cat runs"
PLAN = vk.Trajectory(PROMPT, [vk.Subject("cat", boxes=[(0.0, 0.0, 0.5, 1.0)])])
STEPS = 3
SETTINGS = {"num_inference_steps": STEPS, "height": 16, "width": 16, "output_type": "latent"}
TOLD = [(step, STEPS) for step in range(STEPS)]


def vstar(pipe, **options):
    config = vk.FrameTAR() if hasattr(pipe, "transformer") else "8D1"
    config = vk.TARConfig(1.0) if type(pipe).__name__ == "LattePipeline" else config
    return vk.VSTAR(pipe, config)(PROMPT, **options)


def starvid(pipe, **options):
    return vk.StarVid(pipe, vk.GuidanceConfig(updates=2, size=2, lambdas=(1, 0)), tar="8D1")(
        PLAN, **options
    )


def grid(pipe, *, num_frames, **options):
    return vk.GridVideo(pipe, "8D1")(PROMPT, frames=num_frames, **options)


CASES = {
    "UNet": (tiny.text_to_video, vstar, 3),
    "StarVid": (tiny.text_to_video, starvid, 3),
    "Latte": (tiny.latte, vstar, 16),
    "grid": (tiny.stable_diffusion, grid, 4),
    "Wan": (lambda: tiny_transformers.wan(2), vstar, 5),
    "Cosmos": (tiny_transformers.cosmos, vstar, 9),  # its model is told no timestep
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A pipeline, its method, and the arguments of a call."""
    make, method, num_frames = CASES[request.param]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    settings = {**SETTINGS, "num_frames": num_frames, "seed": 3}
    if hasattr(pipe, "transformer") and type(pipe).__name__ != "LattePipeline":
        settings |= {"height": 32, "width": 32}
    if type(pipe).__name__ == "LattePipeline":
        settings["clean_caption"] = False
    return pipe, method, settings


def modules(pipe):
    return [
        x
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for x in part.modules()
    ]


def test_each_step_is_told_once_and_changes_nothing(case):
    pipe, method, settings = case
    told = []
    frames = method(pipe, **settings, on_step=lambda *step: told.append(step)).frames
    assert told == TOLD
    assert torch.equal(frames, method(pipe, **settings).frames)
    assert told == TOLD  # nobody is told afterwards


def test_what_it_raises_ends_the_sampling_and_leaves_the_pipeline(case):
    pipe, method, settings = case
    classes = [type(x) for x in modules(pipe)]
    hooks = [(len(x._forward_pre_hooks), len(x._forward_hooks)) for x in modules(pipe)]
    processors = [getattr(x, "processor", None) for x in modules(pipe)]
    scheduler = type(pipe.scheduler)
    expected = method(pipe, **settings).frames
    told = []

    def cancel(step, total):
        told.append((step, total))
        if step == 1:
            raise vk.Cancelled

    with pytest.raises(vk.Cancelled):
        method(pipe, **settings, on_step=cancel)
    assert told == TOLD[:2]
    assert [type(x) for x in modules(pipe)] == classes
    assert [(len(x._forward_pre_hooks), len(x._forward_hooks)) for x in modules(pipe)] == hooks
    assert [getattr(x, "processor", None) for x in modules(pipe)] == processors
    assert type(pipe.scheduler) is scheduler
    assert torch.equal(method(pipe, **settings).frames, expected)


def test_what_is_wrong_is_found_before_a_writer_is_paid(case):
    pipe, method, settings = case
    with pytest.raises(TypeError, match=r"on_step must be a callable of \(step, total\), got int"):
        method(pipe, **settings, on_step=3)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    return pipe(PROMPT, num_frames=2, **SETTINGS, generator=torch.Generator().manual_seed(0)).frames


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_steps_are_counted_not_calls(pipe, scheduler, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    told = []
    with vk.watch_steps(pipe, lambda *step: told.append(step)):
        sample(pipe)
        sample(pipe)
    assert told == TOLD * 2


def test_one_step_twice(pipe):
    told = []
    settings = {**SETTINGS, "num_inference_steps": 1, "num_frames": 2}
    with vk.watch_steps(pipe, lambda *step: told.append(step)):
        pipe(PROMPT, **settings)
        kept = pipe.scheduler.timesteps  # a run is known by these, whoever keeps them
        pipe(PROMPT, **settings)
        assert kept is not pipe.scheduler.timesteps
    assert told == [(0, 1)] * 2


class Small:
    """A pipeline of a model that is compiled in a moment."""

    def __init__(self):
        self.scheduler = DDIMScheduler()
        self.unet = torch.compile(Denoiser(), backend="eager")

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self):
        self.scheduler.set_timesteps(STEPS)
        sample = torch.zeros(1, 4)
        for timestep in self.scheduler.timesteps:
            sample = self.unet(sample, timestep)


class Denoiser(nn.Module):
    def forward(self, sample, timestep):
        return sample + timestep


def test_a_compiled_model():
    pipe, told = Small(), []
    pipe()
    with vk.watch_steps(pipe, lambda *step: told.append(step)):
        pipe()
    pipe()
    assert told == TOLD


def test_handle(pipe):
    def on_step(step, total):
        raise AssertionError

    watch = vk.watch_steps(pipe, on_step)
    watch.remove()
    watch.remove()
    sample(pipe)
    assert type(pipe.unet).__dict__.get("_vstar_kernels_change") is None
    # Nor does the model keep what watched it, or the other way round.
    gone = weakref.ref(watch)
    del watch
    gc.collect()
    assert gone() is None
    with pytest.raises(TypeError, match=r"a pipeline of diffusers, .* got UNet3D"):
        vk.watch_steps(pipe.unet, on_step)
    with pytest.raises(TypeError, match="got object"):
        vk.watch_steps(object(), on_step)
