import copy
import math
import sys

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import vstar_kernels as vk
from vstar_kernels import testing
from vstar_kernels.methods.gradients import checkpointed
from vstar_kernels.methods.vstar import noise
from vstar_kernels.methods.vstar.objective import MapObjective
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.front_end import temporal_layers

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from examples import tiny
from tests.models import eager, models

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIDE = 6, 8
SHAPE = (1, 4, FRAMES, SIDE, SIDE)
SIGMA, STRENGTH = 2.0, 1.5
TAR = vk.TARConfig(sigma=SIGMA, strength=STRENGTH, steps=None)


@pytest.fixture
def unet(one_thread):
    return models.make("UNet3DConditionModel")


@pytest.fixture
def scheduler(one_thread):
    scheduler = tiny._scheduler()
    scheduler.set_timesteps(4)
    return scheduler


def inputs(batch=1):
    return {"encoder_hidden_states": models.noise(batch, models.TOKENS, models.TEXT, seed=1)}


def reference():
    delta = vk.GaussianBias(0.7).matrix(FRAMES)
    return delta / delta.sum(-1, keepdim=True)


def optimize(unet, scheduler, maps=None, **options):
    options = {
        "iterations": 4,
        "learning_rate": 0.05,
        "progress": False,
        "checkpointing": False,
        **options,
    }
    options.setdefault("generator", torch.Generator().manual_seed(0))
    maps = reference() if maps is None else maps
    return vk.optimize_noise(unet, maps, SHAPE, inputs(), scheduler=scheduler, **options)


def objective(model, maps, scheduler, batch=1, **options):
    options = {"max_rows": 10**6, "checkpointing": True, **options}
    return MapObjective(
        model, maps, inputs(batch), batch=batch, num_frames=FRAMES, scheduler=scheduler, **options
    )


def eager_distance(unet, latents, timestep, target, regularized):
    """The distance from each layer's input in plain PyTorch, the package left out."""
    distances, hooks = [], []

    def watch(layer):
        def hook(module, args, kwargs, output):
            x = (args or list(kwargs.values()))[0]
            query, key = (
                project(x).double().unflatten(-1, (module.heads, -1))
                for project in (module.to_q, module.to_k)
            )
            bias = None
            if regularized and layer.level == 0:
                bias = vk.DenseBias(eager.gaussian(SIGMA, FRAMES), strength=STRENGTH)
            weights = testing.eager_weights(query, key, bias)
            maps = weights.unflatten(0, (len(latents), -1)).mean((1, 2))
            distances.append((target - maps).square().sum((1, 2)).sqrt().mean())

        return hook

    for layer in temporal_layers(unet):
        if layer.level != "init":
            hooks.append(layer.module.register_forward_hook(watch(layer), with_kwargs=True))
    if regularized:
        names = [layer.name for layer in temporal_layers(unet) if layer.level == 0]
        eager.put_in(unet, names, SIGMA, STRENGTH)
    unet(latents, timestep, **inputs(len(latents)))
    return torch.stack(distances).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("regularized", [False, True])
def test_the_gradient_is_that_of_an_eager_implementation(
    unet, scheduler, regularized, checkpointing
):
    """Of μ, β and γ, through the sample, the model, its maps and the divergence."""
    batch, weight = 2, 0.3
    standard = models.noise(batch, *SHAPE[1:], seed=4)
    start = (0.1 * models.noise(1, *SHAPE[1:], seed=5), *torch.tensor([1.2, 0.3]).double())

    parameters = [p.clone().requires_grad_() for p in start]
    mean, beta, gamma = parameters
    frame = torch.arange(FRAMES)
    distance = (frame[:, None] - frame).abs()
    covariance = torch.where(distance == 0, beta, gamma**distance)
    factor = torch.linalg.cholesky(covariance)
    x = mean + torch.einsum("ij,bcjhw->bcihw", factor.float(), standard)
    plain = copy.deepcopy(unet)
    loss = eager_distance(plain, x, scheduler.timesteps[0], reference(), regularized)
    pixels = mean.movedim(2, -1).reshape(-1, FRAMES).double()
    normals = MultivariateNormal(pixels, covariance), MultivariateNormal(0 * pixels, torch.eye(6))
    expected_loss = loss + weight * kl_divergence(*normals).mean()
    expected = torch.autograd.grad(expected_loss, parameters)

    parameters = [p.clone().requires_grad_() for p in start]
    handle = vk.apply_tar(unet, TAR, backend="reference") if regularized else None
    aim = objective(unet, reference(), scheduler, batch, checkpointing=checkpointing)
    value = aim.distance(noise.correlate(standard, *parameters))
    value = value + weight * noise.kl_to_standard_normal(*parameters, FRAMES)
    found = torch.autograd.grad(value, parameters)
    if handle:
        handle.remove()
    assert float(value.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    for name, one, other in zip(("mean", "beta", "gamma"), found, expected, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_the_loss_falls_and_the_best_is_returned(unet, scheduler):
    with vk.apply_tar(unet, TAR):
        found = optimize(unet, scheduler, iterations=6, kl_weight=0.05, draws=2)
        aim = objective(unet, reference(), scheduler, max_rows=256)
        maps = aim.maps(found.noise.split(1))
        distance = sum(float(aim.distance(x)) for x in found.noise.split(1)) / 2
    totals = [loss.total for loss in found.losses]
    assert len(totals) == 6
    assert totals[-1] < totals[0] - 0.02
    assert totals[found.best] == min(totals)
    best = found.losses[found.best]
    assert best.total == pytest.approx(best.distance + 0.05 * best.kl, rel=1e-6)
    assert best.kl == pytest.approx(found.prior.kl(FRAMES), rel=1e-5)
    assert best.kl > 0 == found.losses[0].kl
    # What is returned is what that loss was of.
    assert best.distance == pytest.approx(distance, rel=1e-5)
    assert found.noise.shape == (2, *SHAPE[1:])
    assert {item.calls for item in found.maps} == {2}
    for one, other in zip(found.maps, maps, strict=True):
        torch.testing.assert_close(one.map, other.map, rtol=0, atol=1e-6)
    assert not any(item.map.requires_grad for item in found.maps)
    assert found.prior.sample(SHAPE).shape == SHAPE


def test_all_parameters_move_and_stay_where_the_covariance_is_definite(unet, scheduler):
    found = optimize(unet, scheduler, learning_rate=0.7, kl_weight=0, iterations=4, patience=None)
    assert found.prior.beta != 1
    assert found.prior.gamma != 0
    assert found.prior.mean.shape == SHAPE
    assert found.prior.mean.abs().min() > 0
    found.prior.covariance(64)
    begun = optimize(unet, scheduler, initial=vk.NoisePrior(1.3, 0.4), mean="frame", iterations=2)
    assert abs(begun.prior.beta - 1.3) < 0.2
    assert abs(begun.prior.gamma - 0.4) < 0.2
    assert begun.prior.mean.shape == (1, 1, FRAMES, 1, 1)


def test_steps_that_are_too_long_end_where_the_covariance_is_definite(unet, scheduler):
    # γ goes to −5 or 5 by the first, where no β within reach would do.
    found = optimize(unet, scheduler, learning_rate=5, kl_weight=1, iterations=3, patience=None)
    assert len(found.losses) == 3
    assert all(math.isfinite(loss.kl) for loss in found.losses)
    # And where the loss rises, the best is what there was before.
    assert min(found.losses[1].total, found.losses[2].total) > found.losses[0].total
    assert found.best == 0
    assert (found.prior.beta, found.prior.gamma) == (1, 0)
    assert not found.prior.mean.any()


def test_iterations_are_adams(unet, scheduler):
    """Each with the gradient of its own loss, averaged over the draws."""
    weight, rate = 0.3, 0.05
    found = optimize(
        unet, scheduler, iterations=3, learning_rate=rate, kl_weight=weight, draws=2, max_rows=10**6
    )
    generator = torch.Generator().manual_seed(0)
    standard = [torch.randn(SHAPE, generator=generator) for _ in range(2)]
    start = torch.zeros(SHAPE), torch.tensor(1.0).double(), torch.tensor(0.0).double()
    parameters = [value.clone().requires_grad_() for value in start]
    adam = torch.optim.Adam(parameters, lr=rate)
    aim = objective(unet, reference(), scheduler, checkpointing=False)
    for expected in found.losses:
        distance = sum(aim.distance(noise.correlate(x, *parameters)) for x in standard) / 2
        loss = distance + weight * noise.kl_to_standard_normal(*parameters, FRAMES)
        assert expected.total == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()


def test_an_initial_mean_must_fit(unet, scheduler):
    start = vk.NoisePrior(mean=torch.zeros(FRAMES, SIDE, SIDE))
    optimize(unet, scheduler, initial=start, iterations=1)
    with pytest.raises(
        ValueError, match=r"broadcast to \(1, 1, 6, 1, 1\) .*, got shape \(6, 8, 8\)"
    ):
        optimize(unet, scheduler, initial=start, mean="frame")


def test_divergence_alone_leads_back_to_white_noise(unet, scheduler):
    start = vk.NoisePrior(1.5, 0.5, 0.3)
    found = optimize(
        unet,
        scheduler,
        initial=start,
        mean="frame",
        kl_weight=1e4,
        iterations=20,
    )
    assert found.prior.kl(FRAMES) < 0.1 * start.kl(FRAMES)


def test_it_stops_early(unet, scheduler):
    found = optimize(unet, scheduler, learning_rate=1e-9, iterations=50, patience=2)
    assert found.stopped_early
    assert len(found.losses) == 1 + 2
    assert not optimize(unet, scheduler, iterations=2).stopped_early
    patient = optimize(unet, scheduler, learning_rate=1e-9, iterations=4, patience=None)
    assert len(patient.losses) == 4


def test_the_same_seed_gives_the_same_noise(unet, scheduler):
    one, other = (optimize(unet, scheduler, iterations=2).noise for _ in range(2))
    assert torch.equal(one, other)
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(one, optimize(unet, scheduler, iterations=2, generator=generator).noise)


@pytest.mark.parametrize("at_step", [0, 2])
def test_checkpointing_keeps_little_and_changes_nothing(unet, scheduler, monkeypatch, at_step):
    kept = {}
    results = {}
    for checkpointing in (False, True):
        sizes = []
        aim = objective(unet, reference(), scheduler, checkpointing=checkpointing, at_step=at_step)
        x = models.noise(*SHAPE).requires_grad_()

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        run = aim._run

        def counted(latents, capture, run=run, pack=pack):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return run(latents, capture)

        monkeypatch.setattr(aim, "_run", counted)
        (results[checkpointing],) = torch.autograd.grad(aim.distance(x), x)
        kept[checkpointing] = sum(sizes)
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-7)
    assert results[True].abs().max() > 1e-4
    assert kept[True] < (0.3 if at_step == 0 else 0.12) * kept[False]


@pytest.mark.parametrize("regularized", [False, True])
def test_gradient_checkpointing_runs_the_layers_again(unet, regularized):
    sample = models.noise(2, *SHAPE[1:]).requires_grad_()
    handle = vk.apply_tar(unet, vk.TARConfig(sigma=2.0, steps=None)) if regularized else None
    gradients = []

    def run():
        unet(sample, 10, **inputs(batch=len(sample)))

    for blocks in (False, True):
        with vk.capture_maps(unet, differentiable=True) as capture:
            if blocks:
                with checkpointed(unet):
                    run()
            else:
                run()
            loss = sum(item.map.square().sum() for item in capture.maps)
            gradients.append(torch.autograd.grad(loss, sample)[0])
            assert {item.calls for item in capture.maps} == {1}
        hooked = any(x._forward_hooks or x._forward_pre_hooks for x in unet.modules())
        assert regularized or not hooked
    if handle:
        handle.remove()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_nothing_is_kept_for_gradients_of_the_model(unet, scheduler):
    unet.requires_grad_(True)
    trainable = []
    unet.conv_in.register_forward_hook(
        lambda *_: trainable.extend(p.requires_grad for p in unet.parameters())
    )
    objective(unet, reference(), scheduler).distance(models.noise(*SHAPE))
    assert trainable
    assert not any(trainable)


def test_the_model_is_left_as_it_was(unet, scheduler):
    unet.requires_grad_(True)
    unet.conv_in.requires_grad_(False)
    before = [p.requires_grad for p in unet.parameters()]
    offloaded = unet.mid_block.forward
    unet.mid_block.forward = offloaded  # as offloading replaces it

    def check():
        assert [p.requires_grad for p in unet.parameters()] == before
        assert all(p.grad is None for p in unet.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
        assert [m for m in unet.modules() if "forward" in m.__dict__] == [unet.mid_block]
        assert unet.mid_block.forward is offloaded

    optimize(unet, scheduler, iterations=1, checkpointing=True)
    check()
    with pytest.raises(TypeError, match="nonsense"):
        vk.optimize_noise(
            unet,
            reference(),
            SHAPE,
            {**inputs(), "nonsense": 1},
            scheduler=scheduler,
            progress=False,
        )
    check()


@pytest.mark.parametrize("name", ["UNetMotionModel", "LatteTransformer3DModel", "lvdm", "LaVie"])
def test_other_models(name, scheduler):
    model = models.make(name)
    more = models.KINDS[name].inputs(models.noise(*SHAPE))
    more = dict(list(more.items())[1:])  # without the latents
    aim = MapObjective(
        model,
        reference(),
        more,
        batch=1,
        num_frames=FRAMES,
        scheduler=scheduler,
        max_rows=64,
        checkpointing=True,
    )
    x = models.noise(*SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(aim.distance(x), x)
    direction = gradient / gradient.norm()
    step = 0.05
    x = x.detach()
    slope = (aim.distance(x + step * direction) - aim.distance(x - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_a_real_videos_maps_into_a_pipeline():
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(3)
    shape = (1, 4, FRAMES, 8, 8)
    text = {"encoder_hidden_states": pipe.encode_prompt("a cat", "cpu", 1, False)[0]}
    real = vk.capture_real_maps(
        pipe, models.noise(*shape), text, steps=[0], layers=lambda layer: layer.level == 0
    )
    given = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: given.append(args))
    with vk.apply_tar(pipe, vk.TARConfig(sigma=1.0, steps=0)):
        found = vk.optimize_noise(
            pipe, real, shape, text, at_step=0, iterations=2, progress=False, checkpointing=False
        )
        hook.remove()
        used = pipe.scheduler.timesteps[0]
        sigma = pipe.scheduler.sigmas[0]
        video = pipe(
            "a cat",
            num_frames=FRAMES,
            height=16,
            width=16,
            num_inference_steps=2,
            latents=found.noise,
            output_type="np",
        ).frames
    assert {item.layer for item in found.maps} == {item.layer for item in real.maps}
    assert {item.level for item in found.maps} == {0}
    sample, timestep = given[-1]  # the best noise, as the pipeline's first step gives it
    expected = found.noise * pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    assert timestep == used
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    assert video.shape[:2] == (1, FRAMES)


def test_references_by_level_and_by_layer(unet, scheduler):
    aim = objective(unet, {1: reference(), "init": reference()}, scheduler)
    maps = aim.maps([models.noise(*SHAPE)])
    assert {item.level for item in maps} == {"init", 1}
    everything = objective(unet, reference(), scheduler).maps([models.noise(*SHAPE)])
    assert {item.level for item in everything} == {0, 1}
    own = objective(unet, everything[3:5], scheduler)
    assert [m.layer for m in own.maps([models.noise(*SHAPE)])] == [m.layer for m in everything[3:5]]
    assert float(own.distance(models.noise(*SHAPE))) < 1e-5


SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
    HeunDiscreteScheduler,
]


def make_scheduler(kind, steps=4):
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    made = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", **options)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("kind", [x for x in SCHEDULERS if x is not HeunDiscreteScheduler])
def test_maps_at_a_step_are_those_of_the_pipelines_sampling(kind):
    """With guidance, TAR's steps, and a scheduler that has sampled before."""
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(kind)
    text, negative = (
        {"encoder_hidden_states": x} for x in pipe.encode_prompt("a cat", "cpu", 1, True)
    )
    noise = models.noise(*SHAPE)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16}
    with vk.apply_tar(pipe, vk.TARConfig(1.0, strength=20.0, steps=1)):
        with capture_maps(pipe, steps=[1, 2], max_rows=10**6) as sampled:
            pipe("a cat", num_frames=FRAMES, latents=noise, output_type="latent", **options)
        reference = {layer.name for layer in temporal_layers(pipe.unet) if layer.level != "init"}
        aim = MapObjective(
            pipe,
            torch.eye(FRAMES),
            text,
            batch=1,
            num_frames=FRAMES,
            at_step=[1, 2],
            negative_inputs=negative,
            guidance_scale=5.0,
            scheduler=None,
            max_rows=10**6,
            checkpointing=True,
        )
        found = {(item.layer, item.step): item for item in aim.maps([noise])}
    assert found.keys() == {(name, step) for name in reference for step in (1, 2)}
    for item in sampled.maps:
        # PNDM visits step 1 twice, of which the second visit is none of the maps here.
        if item.layer in reference and item.calls == 1:
            own = found[item.layer, item.step]
            assert (own.timestep, own.calls) == (item.timestep, 1)
            torch.testing.assert_close(own.map[0], item.map[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_gradient_goes_through_the_steps_before(unet, kind):
    """Against the same steps in a loop of plain PyTorch, kept whole."""
    steps = [1, 2] if kind is DDIMScheduler else [2]
    x = models.noise(*SHAPE).requires_grad_()
    schedule = make_scheduler(kind)
    order = schedule.order
    starts = [place for place in range(len(schedule.timesteps)) if place % order == 0]
    if kind is PNDMScheduler:  # it visits the second timestep twice
        starts = [0, 1, 3, 4]
    latents, distances = x * schedule.init_noise_sigma, []
    for place in range(starts[2] + 1):
        timestep = schedule.timesteps[place]
        given = schedule.scale_model_input(latents, timestep)
        if place in [starts[step] for step in steps]:
            plain = copy.deepcopy(unet)
            distances.append(eager_distance(plain, given, timestep, reference(), False))
        output = unet(given, timestep, **inputs()).sample
        latents = schedule.step(output, timestep, latents).prev_sample
    expected = sum(distances) / len(distances)
    (gradient,) = torch.autograd.grad(expected, x)
    aim = objective(unet, reference(), make_scheduler(kind), at_step=steps[0:2])
    value = aim.distance(x)
    (found,) = torch.autograd.grad(value, x)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert (found - gradient).norm() < 2e-3 * gradient.norm()


def test_steps_that_draw_noise_draw_the_same(unet):
    aim = objective(unet, reference(), make_scheduler(EulerAncestralDiscreteScheduler), at_step=2)
    x = models.noise(*SHAPE)
    torch.manual_seed(1)
    first = float(aim.distance(x))
    torch.manual_seed(2)
    assert float(aim.distance(x)) == first


def test_the_loss_falls_at_a_later_step(unet):
    real = vk.capture_real_maps(
        unet,
        models.noise(*SHAPE, seed=8),
        inputs(),
        steps=[1],
        scheduler=make_scheduler(DDIMScheduler),
    )
    found = optimize(
        unet, make_scheduler(DDIMScheduler), real, at_step=1, kl_weight=0, checkpointing=True
    )
    assert found.losses[-1].distance < found.losses[0].distance
    assert {item.step for item in found.maps} == {1}


def test_references_of_another_step_are_refused(unet, scheduler):
    real = vk.capture_real_maps(
        unet, models.noise(*SHAPE), inputs(), steps=[0, 2], scheduler=scheduler
    )
    one = [item for item in real.maps if item.step == 2]
    for at_step, maps, message in (
        (0, real, "has maps of step 2, and at_step is 0: maps are compared at the same step"),
        ([0, 1], one, "has maps of step 2, and at_step is 0, 1"),
        ([2, 3], one, "there is no map of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize(unet, scheduler, maps, at_step=at_step)
    objective(unet, real, scheduler, at_step=[0, 2])


@pytest.mark.parametrize(
    ("at_step", "error", "message"),
    [
        (4, ValueError, "at_step: steps of this schedule are 0 to 3, got 4"),
        (-1, ValueError, "at_step must be at least 0, got -1"),
        ([], ValueError, "at_step must name at least one step"),
        (1.0, TypeError, "at_step must be a step or a list of steps, got float"),
        ([True], TypeError, "at_step must be of step indices, got True"),
    ],
)
def test_wrong_steps_are_refused(unet, scheduler, at_step, error, message):
    with pytest.raises(error, match=message):
        optimize(unet, scheduler, at_step=at_step)


def test_wrong_schedules_and_guidance_are_refused(unet, scheduler):
    with pytest.raises(ValueError, match="negative_inputs and a guidance_scale other than 1"):
        optimize(unet, scheduler, guidance_scale=3.0)
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"):
        optimize(unet, scheduler, guidance_scale=math.nan, negative_inputs=inputs())
    scheduler.timesteps = scheduler.timesteps - 1
    with pytest.raises(ValueError, match=r"are not those that set_timesteps\(4\) gives"):
        optimize(unet, scheduler, at_step=1)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.eye(5), r"must have shape \(6, 6\) or \(1, 6, 6\), got \(5, 5\)"),
        ({7: torch.eye(6)}, "reference_maps: no layer has level 7, only 0, 1, init"),
        ([], "there is no map"),
    ],
)
def test_references_that_do_not_fit_are_refused(unet, scheduler, maps, message):
    with pytest.raises(ValueError, match=message):
        optimize(unet, scheduler, maps)


def test_maps_of_several_steps_or_another_model_are_refused(unet, scheduler):
    maps = objective(unet, reference(), scheduler).maps([models.noise(*SHAPE)])
    with pytest.raises(ValueError, match=r"several maps of .*attn1 at step 0: keep one"):
        optimize(unet, scheduler, maps + maps)
    maps[0].layer = "elsewhere"
    with pytest.raises(ValueError, match="the model has no layer elsewhere"):
        optimize(unet, scheduler, maps)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", "pixel", '"element" or "frame", got \'pixel\''),
        ("kl_weight", -1, "at least 0, got -1"),
        ("kl_weight", math.nan, "at least 0, got nan"),
        ("learning_rate", 0, "positive, got 0"),
        ("iterations", 0, "at least 1, got 0"),
        ("draws", 0, "at least 1, got 0"),
        ("patience", 0, "at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(unet, scheduler, name, value, message):
    with pytest.raises(ValueError, match=f"{name} must be .*{message}"):
        optimize(unet, scheduler, **{name: value})
    with pytest.raises(ValueError, match="needs scheduler="):
        optimize(unet, None)


def test_a_loss_that_is_not_finite_raises(unet, scheduler):
    with pytest.raises(FloatingPointError, match="loss of iteration 0 is nan"):
        optimize(unet, scheduler, reference() * math.nan)


def test_progress(unet, scheduler, capsys, monkeypatch):
    optimize(unet, scheduler, iterations=2)
    assert capsys.readouterr().err == ""
    optimize(unet, scheduler, iterations=2, progress=True)
    shown = capsys.readouterr().err
    assert "optimize_noise: 100%" in shown
    assert "loss=" in shown
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        optimize(unet, scheduler, progress=True)


def test_gradients_are_enabled_for_it(unet, scheduler):
    with torch.no_grad():
        assert len(optimize(unet, scheduler, iterations=2).losses) == 2
    assert torch.is_grad_enabled()
