"""Guidance in whole pipelines: what it does to latents and maps, and what it leaves alone."""

import copy
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers

from examples import tiny
from tests.methods.starvid.pipelines import FRAMES, LEFT, PLAN, PROMPT, RIGHT, STEPS, run
from vstar_kernels.methods.starvid import guidance
from vstar_kernels.methods.starvid.losses import map_distance
from vstar_kernels.methods.starvid.scheduler import _GUIDED, _GUIDING, goes_on
from vstar_kernels.models.columns import LeftEarly
from vstar_kernels.models.front_end import cross_layers
from vstar_kernels.models.hooks import Hooks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# The random weights' attention is weak: steps are large.
CONFIG = vk.GuidanceConfig(spatial=(0, 0.3), syntax=(0.3, 0.6), updates=2, step_size=1000.0)
ONE = replace(CONFIG, spatial=(0, 0.3), syntax=None, updates=1)
OFF = replace(CONFIG, lambdas=(0, 0))


@pytest.fixture(scope="module")
def pipe(one_thread):
    return tiny.text_to_video()


def guide(pipe, plan=PLAN, config=CONFIG, **settings):
    return vk.guide_latents(pipe, plan, config, backend="reference", **settings)


def guided(pipe, plan=PLAN, config=CONFIG, *, settings=None, **changes):
    """The latents under guidance, and the handle."""
    with guide(pipe, plan, config, **settings or {}) as handle:
        return run(pipe, **changes), handle


def assert_stock(pipe, scheduler):
    assert type(pipe.scheduler) is scheduler
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
    assert {type(x.module.processor).__name__ for x in cross_layers(model)} == {"AttnProcessor2_0"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("make", [tiny.text_to_video, tiny.animatediff, tiny.i2vgen_xl, tiny.latte])
def test_each_pipeline(make):
    pipe = make()
    scheduler = type(pipe.scheduler)
    stock = run(pipe)
    out, handle = guided(pipe)
    assert out.isfinite().all()
    assert (out - stock).abs().max() > 10 * CLOSE["atol"]
    assert [(x.step, x.update) for x in handle.updates] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, second, third, fourth = handle.updates
    assert second.spatial < first.spatial
    assert second.mass > first.mass
    assert fourth.syntax < third.syntax
    assert (first.syntax, third.spatial) == (None, None)
    frames = out.shape[2]
    assert set(handle.maps) == {0, 1}
    assert [x.shape[:2] for x in handle.maps[0]] == [(frames, 4)]
    assert handle.words[0].texts == ("cat", "dog", "eats", "naps")
    assert_stock(pipe, scheduler)
    assert torch.equal(run(pipe), stock)
    assert torch.equal(guided(pipe, config=OFF)[0], stock)
    unguided, handle = guided(pipe, guidance_scale=1.0)
    assert not torch.equal(unguided, run(pipe, guidance_scale=1.0))
    assert handle.updates[1].spatial < handle.updates[0].spatial


def test_one_update_by_hand():
    """z − η √(1 − ᾱ) ∇, the gradient by autograd through a whole forward pass."""
    pipe = tiny.text_to_video()
    torch.manual_seed(1)
    latents = torch.randn(1, 4, FRAMES, 8, 8)
    pipe.scheduler.set_timesteps(3)
    timestep = pipe.scheduler.timesteps[0]
    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    words = [vk.find_tokens(pipe.tokenizer, PROMPT, word) for word in ("cat", "dog")]
    leaf = latents.clone().requires_grad_()
    with vk.capture_columns(
        pipe,
        words,
        layers=lambda layer: layer.level == 1,
        differentiable=True,
        backend="reference",
    ) as capture:
        pipe.unet(leaf, timestep, encoder_hidden_states=text)
        maps = capture.mean()[0]
    masks = guidance.plan_targets(
        PLAN, guidance.plan_words(pipe.tokenizer, PLAN), FRAMES, *maps.shape[-2:]
    ).masks
    loss = guidance.spatial_loss(maps, masks)
    (gradient,) = torch.autograd.grad(loss, leaf)
    alpha = pipe.scheduler.alphas_cumprod[int(timestep)]
    expected = latents - 1000 * (1 - alpha).sqrt() * gradient

    seen = []
    hooks = Hooks()
    hooks.before(pipe.unet, lambda model, args, kwargs: seen.append(args[0]))
    with guide(pipe, config=ONE) as handle:
        hooks.remove()
        hooks.before(pipe.unet, lambda model, args, kwargs: seen.append(args[0].detach()))
        run(pipe, latents=latents)
    hooks.remove()
    assert handle.updates[0].total == pytest.approx(loss.item(), rel=1e-5)
    outer = [sample for sample in seen if len(sample) == 2]
    moved = (outer[0] - latents).abs().max()
    assert moved > 1e-2
    torch.testing.assert_close(outer[0][0], expected[0], rtol=1e-3, atol=float(1e-3 * moved))
    assert torch.equal(outer[0][0], outer[0][1])


def test_the_planted_boxes_are_found():
    """Keys and queries by which the latents decide each word's map: guidance finds the boxes."""
    pipe = tiny.text_to_video()
    tiny.plant_words(pipe, PROMPT)
    config = vk.GuidanceConfig(
        spatial=(0, 1),
        syntax=(0, 1),
        lambdas=(1, 0.03),
        updates=24,
        step_size=3000.0,
        levels=(0,),
        size=0,
    )
    _, handle = guided(pipe, config=config, steps=1)
    assert handle.updates[0].mass < 0.5
    assert handle.updates[-1].mass >= 0.8
    maps = handle.maps[0][0]

    def distance(one, other):
        words = handle.words[0].texts
        return map_distance(maps[:, words.index(one)], maps[:, words.index(other)]).mean()

    for noun, verb, other in (("cat", "eats", "naps"), ("dog", "naps", "eats")):
        assert distance(noun, verb) < 0.8 * distance(noun, other)


@pytest.mark.filterwarnings("ignore:there are no words but")
def test_two_prompts_are_guided_as_each_by_itself(pipe):
    other = vk.Trajectory("dog sits", [vk.Subject("dog", "sits", boxes=RIGHT[:1])])
    config = replace(CONFIG, margin=1.0)
    prompts = [PROMPT, "dog sits"]
    both, handle = guided(pipe, [PLAN, other], config, prompt=prompts, seeds=[0, 1], steps=2)
    alone = [
        guided(pipe, plan, config, prompt=plan.prompt, seeds=seed, steps=2)[0]
        for seed, plan in enumerate((PLAN, other))
    ]
    torch.testing.assert_close(both, torch.cat(alone), **CLOSE)
    assert [x.shape[1] for x in handle.maps[0]] == [4, 2]
    with pytest.raises(ValueError, match="a batch of 2 with the same latents in both halves"):
        guided(pipe, [PLAN, other], config, steps=2)
    with pytest.raises(ValueError, match=r"need a batch that is a multiple of 4, .* with 2"):
        guided(pipe, [PLAN, other], config, steps=2, settings={"guidance": True})


def test_tar_frame_prompts_and_captures_beside_it(pipe):
    texts = ["cat eats dog naps", "cat eats a dog"]  # of which frame 1 has the second
    plan = vk.Trajectory(PROMPT, [vk.Subject("cat", "eats", boxes=LEFT)])
    embeddings, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    tar = vk.TARConfig(1.0, strength=20.0, steps=1)
    config = replace(CONFIG, syntax=None)
    plain, _ = guided(pipe, plan, config, settings={"texts": texts})
    results = []
    for order in (0, 1):
        handles = [
            lambda: vk.apply_tar(pipe, tar),
            lambda: vk.condition_frames(pipe, embeddings, guidance=True),
            lambda: vk.capture_maps(pipe),
        ]
        if order:
            handle = guide(pipe, plan, config, texts=texts)
        entered = [make() for make in handles]
        if not order:
            handle = guide(pipe, plan, config, texts=texts)
        results.append(run(pipe))
        assert {item.map.shape[0] for item in entered[-1].maps} == {2}  # the pipeline's calls only
        assert {item.calls for item in entered[-1].maps} == {1}
        assert handle.updates[1].spatial < handle.updates[0].spatial
        for one in (*entered, handle):
            one.remove()
    assert torch.equal(*results)
    assert (results[0] - plain).abs().max() > 10 * CLOSE["atol"]


def test_free_init_restarts(one_thread):
    pipe = tiny.animatediff()
    pipe.enable_free_init(num_iters=2)
    _, handle = guided(pipe, steps=3)
    assert [x.step for x in handle.updates] == [0, 0, 1, 1] * 2


SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
}


class Shift:
    """Adds 1 to the latents of one evaluation, as guidance would, or to none."""

    def __init__(self, at):
        self.at, self.calls, self.changed = at, -1, False

    def note(self, latents, scaled, timestep):
        self.calls += 1

    def latents_of_step(self, latents):
        is_changed = self.calls == self.at
        self.changed |= is_changed
        return latents + is_changed, is_changed


def shifted(scheduler, at):
    """What a sampler with fixed model outputs makes, one evaluation shifted; which are guided."""
    outputs = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    own = type(scheduler)
    scheduler.set_timesteps(4)
    shift, is_guided = Shift(at), []
    _GUIDED[scheduler] = lambda: shift
    _GUIDING.put_on(scheduler)
    torch.manual_seed(0)
    latents = torch.ones(1, 4, 4) * float(scheduler.init_noise_sigma)
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        is_guided.append(not goes_on(scheduler))
        latents = scheduler.step(outputs[index], timestep, latents).prev_sample
    _GUIDING.take_off(scheduler)
    assert type(scheduler) is own
    return latents, is_guided


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_from_the_updated_latents(name):
    """Where it is guided; Heun and others go on from another evaluation's, and are not guided."""

    def sample(at):
        return shifted(getattr(diffusers, name)(**SCHEDULERS[name]), at)

    stock, is_guided = sample(None)
    assert is_guided[0]
    assert sum(is_guided) >= len(is_guided) // 2
    # The last evaluation of a sampler that ends at a noise of 0 leaves nothing of the latents.
    for at in [index for index, found in enumerate(is_guided[:-1]) if found]:
        moved, _ = sample(at)
        assert (moved - stock).abs().mean() > 1e-3, at


def test_what_is_updated_is_not_corrected():
    """UniPC corrects latents by what it was at before, unless they have been updated since."""
    with_corrector = diffusers.UniPCMultistepScheduler()
    without = diffusers.UniPCMultistepScheduler(disable_corrector=[0])
    assert torch.equal(shifted(with_corrector, 1)[0], shifted(without, 1)[0])
    assert not torch.equal(shifted(with_corrector, None)[0], shifted(without, None)[0])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_an_update_means_the_same_for_latents_of_another_scale(pipe, name):
    """Euler's latents are σ-scaled: in the model's own scale they move as much as DDIM's."""
    before = pipe.scheduler
    moves = {}
    try:
        for kind in ("DDIMScheduler", name):
            pipe.scheduler = getattr(diffusers, kind).from_config(
                before.config, timestep_spacing="leading", steps_offset=1
            )
            seen = []
            hooks = Hooks()
            hooks.before(pipe.unet, lambda model, args, kwargs, to=seen: to.append(args[0]))
            with guide(pipe, config=OFF):
                run(pipe)
            stock = seen[0]
            seen.clear()
            hooks.remove()
            with guide(pipe, config=ONE) as handle:
                hooks.before(pipe.unet, lambda model, args, kwargs, to=seen: to.append(args[0]))
                run(pipe)
            hooks.remove()
            moves[kind] = next(x for x in seen if len(x) == 2) - stock
            assert handle.updates[0].step == 0
            assert {x.step for x in handle.updates} == {0}
    finally:
        pipe.scheduler = before
    assert moves[name].abs().max() > 1e-2
    ratio = moves[name].norm() / moves["DDIMScheduler"].norm()
    assert 0.5 < ratio < 2


def test_checkpointing_and_leaving_early_change_no_gradient(pipe, monkeypatch):
    expected, _ = guided(pipe, config=ONE)
    out, _ = guided(pipe, config=ONE, settings={"checkpointing": False})
    torch.testing.assert_close(out, expected, **CLOSE)

    calls = []
    hooks = Hooks()
    hooks.before(pipe.unet.up_blocks[-1], lambda *_: calls.append(torch.is_grad_enabled()))
    guided(pipe, config=ONE)
    hooks.remove()
    assert calls == [False] * 3  # the pipeline's own calls alone come as far
    add = guidance.ColumnCapture.add

    def stay(capture, layer, maps):
        try:
            add(capture, layer, maps)
        except LeftEarly:
            capture._leaves = False

    monkeypatch.setattr(guidance.ColumnCapture, "add", stay)
    monkeypatch.setattr(guidance.ColumnCapture, "_end", lambda *_: None)
    whole, _ = guided(pipe, config=ONE)
    torch.testing.assert_close(whole, expected, **CLOSE)


def test_a_text_is_projected_once_for_all_frames(pipe, monkeypatch):
    expected, _ = guided(pipe, config=ONE)
    monkeypatch.setattr("vstar_kernels.models.text.FEWEST_ROWS", 1)
    rows = []
    layer = next(x for x in cross_layers(pipe.unet) if x.level == 1)
    hooks = Hooks()
    hooks.after(layer.module.to_k, lambda module, args, kwargs, output: rows.append(len(args[0])))
    out, _ = guided(pipe, config=ONE)
    hooks.remove()
    torch.testing.assert_close(out, expected, **CLOSE)
    assert rows.count(2 * FRAMES) == 3  # the pipeline's own calls, as without guidance
    assert set(rows) == {2 * FRAMES, 1}


def test_few_updates_where_the_loss_is_low(pipe):
    _, handle = guided(pipe, config=replace(CONFIG, syntax=None, updates=4, stop_below=99.0))
    assert [x.update for x in handle.updates] == [0]
    stock = run(pipe)
    assert torch.equal(guided(pipe, config=replace(ONE, stop_below=99.0))[0], stock)


def test_the_subject_is_there_in_half_of_the_frames(pipe):
    plan = vk.Trajectory(
        PROMPT,
        [vk.Subject("cat", "eats", boxes=[LEFT[0], None]), vk.Subject("dog", boxes=RIGHT)],
    )
    _, handle = guided(pipe, plan)
    assert all(math.isfinite(x.total) for x in handle.updates)
    assert handle.updates[1].total < handle.updates[0].total


def test_a_pipeline_that_is_dropped_under_guidance_is_freed():
    pipe = tiny.text_to_video()
    guide(pipe)
    assert type(copy.deepcopy(pipe.scheduler)) is diffusers.DDIMScheduler
    model, scheduler = weakref.ref(pipe.unet), weakref.ref(pipe.scheduler)
    del pipe
    gc.collect()
    assert model() is None
    assert scheduler() is None


def test_what_it_refuses(pipe):
    subject = vk.Subject("cat", boxes=LEFT)
    for plan, error, message in (
        ("a cat", TypeError, "plan must be a Trajectory or a list of them, got str"),
        ([], ValueError, "plan must hold at least one Trajectory, got none"),
        ([3], TypeError, "plan must be of Trajectories, got int"),
        (vk.Trajectory("a dog", [subject]), ValueError, "'cat' is not in the prompt 'a dog'"),
        (vk.Trajectory("a cat", [subject]), ValueError, "no subject of 'a cat' has a verb"),
        (
            vk.Trajectory("a dog walks and cat", [subject]),
            ValueError,
            "token 15 of the prompt, and the text encoder takes 16",
        ),
    ):
        with pytest.raises(error, match=message):
            guide(pipe, plan)
    with pytest.raises(TypeError, match="config must be a GuidanceConfig, got dict"):
        guide(pipe, PLAN, {})
    with pytest.raises(TypeError, match="checkpointing must be True or False, got int"):
        guide(pipe, checkpointing=1)
    with pytest.raises(TypeError, match="texts must be a list of texts, got str"):
        guide(pipe, texts=PROMPT)
    plan = vk.Trajectory(PROMPT, [vk.Subject("cat", "eats", boxes=LEFT)])
    with pytest.raises(ValueError, match=r"'eats' is at different tokens .*\[4, .*\[6, .*: begin"):
        guide(pipe, plan, texts=[PROMPT, "cat it eats"])
    with pytest.raises(TypeError, match=r"pipe must be a pipeline of diffusers .* UNet3DCondition"):
        guide(pipe.unet)
    with pytest.raises(TypeError, match=r"a tokenizer and a scheduler, got StableVideoDiffusion"):
        guide(tiny.stable_video_diffusion())
    with pytest.raises(ValueError, match="no cross-attention has level 7: the levels are 0, 1"):
        guide(pipe, config=replace(CONFIG, levels=(7,)))
    with guide(pipe), pytest.raises(ValueError, match="under guide_latents already"):
        guide(pipe)
    assert torch.equal(run(pipe), run(pipe))
    assert_stock(pipe, diffusers.DDIMScheduler)


def test_what_it_refuses_while_it_samples(pipe):
    scheduler = pipe.scheduler
    config = replace(CONFIG, spatial=(0.6, 0.7), syntax=(0.7, 0.8))
    with pytest.raises(ValueError, match=r"guide none of the steps 0 to 1: they are shares"):
        guided(pipe, config=config, steps=2)
    with guide(pipe) as handle:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
        with pytest.raises(RuntimeError, match="has the pipeline another scheduler now"):
            run(pipe)
        pipe.scheduler = scheduler
        handle.remove()
    with pytest.raises(ValueError, match=r"guidance=True was given .* without classifier"):
        guided(pipe, settings={"guidance": True}, guidance_scale=1.0)
    assert_stock(pipe, diffusers.DDIMScheduler)


def test_prompts_that_are_not_the_plans(pipe):
    message = r"called with 'dog naps', where the words of the plan are not at the tokens"
    with pytest.raises(ValueError, match=message):
        guided(pipe, prompt="dog naps")
    with pytest.raises(ValueError, match=message):
        guided(pipe, prompt=[PROMPT, "dog naps"], seeds=[0, 1])
    with pytest.raises(ValueError, match=message):
        guided(pipe, [PLAN, PLAN], prompt=[PROMPT, "dog naps"], seeds=[0, 1])
    longer, _ = guided(pipe, config=ONE, prompt=f"{PROMPT} z")  # its words are where they were
    assert longer.isfinite().all()
    prompts = [PROMPT, "dog naps"]
    text, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": negative}
    with pytest.raises(ValueError, match="the 2 videos of a plan have different texts"):
        guided(pipe, seeds=[0, 1], **given)
    same = {name: None if x is None else x[:1].repeat(2, 1, 1) for name, x in given.items()}
    assert guided(pipe, config=ONE, seeds=[0, 1], **same)[0].isfinite().all()
    assert_stock(pipe, diffusers.DDIMScheduler)


@pytest.mark.parametrize(
    ("guidance", "scale", "seeds", "message"),
    [
        (False, 9.0, 0, "guidance=False was given .* under classifier-free guidance"),
        (True, 1.0, [0, 1], "guidance=True was given .* without classifier-free guidance"),
    ],
)
def test_guidance_that_is_not_the_pipelines(pipe, guidance, scale, seeds, message):
    prompt = PROMPT if seeds == 0 else [PROMPT] * 2
    with (
        guide(pipe, guidance=guidance) as handle,
        pytest.raises(ValueError, match=message),
    ):
        run(pipe, prompt, seeds=seeds, guidance_scale=scale)
    assert handle.updates == []


def test_a_step_that_has_begun_is_finished(pipe):
    """Removed while the model evaluates the second step, the last one that is guided."""
    expected, _ = guided(pipe)
    handle, calls = guide(pipe), []

    def remove(*_):
        calls.append(0)
        if len(calls) == 2:
            handle.remove()

    hook = pipe.unet.register_forward_hook(remove)
    found = run(pipe)
    hook.remove()
    assert torch.equal(found, expected)
    assert len(calls) == STEPS
    assert len(handle.updates) == 4
    assert_stock(pipe, diffusers.DDIMScheduler)
    assert pipe.scheduler not in _GUIDED


def test_an_interrupt_before_the_step_leaves_the_scheduler_stock(pipe):
    def interrupt(*_):
        raise KeyboardInterrupt

    stock = run(pipe)
    hook = pipe.unet.register_forward_hook(interrupt)
    with guide(pipe), pytest.raises(KeyboardInterrupt):
        run(pipe)
    hook.remove()
    assert_stock(pipe, diffusers.DDIMScheduler)
    assert type(pipe.scheduler).step is diffusers.DDIMScheduler.step
    assert torch.equal(run(pipe), stock)


def test_a_handle_removed_within_an_update(pipe):
    stock, handle = run(pipe), guide(pipe)
    hook = pipe.unet.conv_in.register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(RuntimeError, match="guide_latents was removed from this pipeline while it"):
        run(pipe)
    hook.remove()
    assert_stock(pipe, diffusers.DDIMScheduler)
    assert torch.equal(run(pipe), stock)


def test_a_loss_that_is_not_finite(pipe):
    with pytest.raises(FloatingPointError, match=r"(loss|gradient) of update 1 at step 0"):
        guided(pipe, config=replace(CONFIG, step_size=1e38))
    assert_stock(pipe, diffusers.DDIMScheduler)
    with pytest.raises(ValueError, match='decay="noise" needs a scheduler with alphas_cumprod'):
        _without_alphas(pipe, "noise")
    assert _without_alphas(pipe, "auto")


def _without_alphas(pipe, decay):
    before = pipe.scheduler
    pipe.scheduler = diffusers.IPNDMScheduler()
    try:
        return guided(pipe, config=replace(CONFIG, decay=decay))[1].updates
    finally:
        pipe.scheduler = before


def test_updates_that_are_not_made_are_not_counted(pipe):
    """Below ``stop_below`` only the loss is measured, and the latents are the plain run's."""
    out, handle = guided(pipe, config=replace(ONE, updates=2, stop_below=1e9))
    assert torch.equal(out, run(pipe))
    assert [(x.step, x.update, x.applied) for x in handle.updates] == [(0, 0, False)]
    assert set(handle.maps) == {0}
    _, handle = guided(pipe, config=replace(ONE, updates=2, stop_below=-1e9))
    assert [x.applied for x in handle.updates] == [True, True]


def test_inference_mode_is_refused(pipe):
    """At the first evaluation of the model, and not where the first update would be."""
    config = replace(CONFIG, spatial=None, syntax=(0.6, 1.0))
    message = r"takes gradients, which torch.inference_mode\(\) forbids"
    with (
        guide(pipe, config=config) as handle,
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=message),
    ):
        run(pipe)
    assert not handle.updates
    assert_stock(pipe, type(pipe.scheduler))
