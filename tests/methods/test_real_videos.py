from types import SimpleNamespace

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from examples import tiny
from tests.models import models
from tests.models.lvdm_model import LatentDiffusion
from vstar_kernels.methods.vstar.objective import MapObjective

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 6
SHAPE = (2, 4, FRAMES, 8, 8)


@pytest.fixture
def unet(one_thread):
    return models.make("UNet3DConditionModel")


def inputs():
    return {"encoder_hidden_states": models.noise(2, models.TOKENS, models.TEXT, seed=1)}


def scheduler(kind=DDIMScheduler, steps=5, **options):
    made = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", **options)
    made.set_timesteps(steps)
    return made


def capture(unet, schedule, latents=None, *, seed=3, **options):
    latents = models.noise(*SHAPE, seed=2) if latents is None else latents
    generator = torch.Generator().manual_seed(seed)
    options = {"steps": [0, 3], **options}
    return vk.capture_real_maps(
        unet, latents, inputs(), scheduler=schedule, generator=generator, **options
    )


def test_latents_are_noised_to_the_step(unet):
    schedule = scheduler()
    clean = 5 * torch.ones(SHAPE)
    noised = capture(unet, schedule, clean).noised
    assert list(noised) == [0, 3]
    for step, latents in noised.items():
        alpha = schedule.alphas_cumprod[schedule.timesteps[step]]
        assert float(latents.mean()) == pytest.approx(5 * float(alpha.sqrt()), abs=0.06)
        assert float(latents.std()) == pytest.approx(float((1 - alpha).sqrt()), rel=0.03)
    first, second = ((noised[s] - noised[s].mean()).flatten() for s in (0, 3))
    torch.testing.assert_close(  # the same noise at each step
        torch.dot(first, second) / first.norm() / second.norm(), torch.tensor(1.0)
    )


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_maps_are_those_of_one_forward_pass_each(unet, kind):
    schedule = scheduler(kind)
    calls = []
    hook = unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    found = capture(unet, schedule, max_rows=10**6)
    hook.remove()
    assert len(calls) == 2
    for step, (args, kwargs) in zip((0, 3), calls, strict=True):
        assert set(args[1].tolist()) == {float(schedule.timesteps[step])}
        scale = 1.0
        if kind is EulerDiscreteScheduler:
            scale = float((schedule.sigmas[step] ** 2 + 1) ** -0.5)
        torch.testing.assert_close(args[0], found.noised[step] * scale)
        with torch.no_grad(), vk.capture_maps(unet, max_rows=10**6) as again:
            unet(*args, **kwargs)
        own = [item for item in found.maps if item.step == step]
        assert [item.layer for item in own] == [item.layer for item in again.maps]
        for one, other in zip(own, again.maps, strict=True):
            assert torch.equal(one.map, other.map)
            torch.testing.assert_close(one.map.sum(-1), torch.ones(2, FRAMES))
    steps = {m.step: m.map for m in vk.analysis.mean_maps(found, by=["step"])}
    assert not torch.allclose(steps[0], steps[3], atol=1e-4)


def test_a_seed_replays(unet):
    schedule = scheduler()
    one, other, different = (capture(unet, schedule, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(one.maps, other.maps, different.maps, strict=True):
        assert torch.equal(a.map, b.map)
        assert not torch.equal(a.map, c.map)


@pytest.mark.parametrize("kind", [PNDMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_steps_are_those_of_the_schedule_which_stays_as_it_was(unet, kind):
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    schedule = scheduler(kind, **options)
    if kind is EulerDiscreteScheduler:
        schedule.set_begin_index(2)  # a pipeline has used it
    before = {name: str(value) for name, value in vars(schedule).items()}
    found = capture(unet, schedule, steps=[0, 1, 4])
    assert {name: str(value) for name, value in vars(schedule).items()} == before
    times = sorted({float(t) for t in schedule.timesteps}, reverse=True)
    steps = {item.step: item.timestep for item in found.maps}
    assert steps == {step: times[step] for step in (0, 1, 4)}
    with pytest.raises(ValueError, match="steps of this schedule are 0 to 4, got 5"):
        capture(unet, schedule, steps=[5])


def test_layers_and_tar_are_seen(unet):
    schedule = scheduler()
    options = {"layers": lambda layer: layer.place == "mid", "max_rows": 10**6}
    plain = capture(unet, schedule, **options)
    assert {item.place for item in plain.maps} == {"mid"}
    with vk.apply_tar(unet, vk.TARConfig(sigma={1: 1.0}, steps=0), scheduler=schedule):
        regularized = capture(unet, schedule, **options)
    on = [vk.analysis.diagonalness(m.map).mean() for m in regularized.maps if m.step == 0]
    off = [vk.analysis.diagonalness(m.map).mean() for m in plain.maps if m.step == 0]
    assert min(on) > max(off) + 0.1
    after = regularized.maps[-1].map, plain.maps[-1].map  # step 3
    torch.testing.assert_close(*after, rtol=0, atol=1e-5)


def test_frames_are_encoded_as_the_model_expects():
    pipe = tiny.text_to_video()
    video = torch.rand(3, 3, 16, 16)
    latents = vk.encode_frames(pipe.vae, video)
    assert latents.shape == (1, 4, 3, 8, 8)
    with torch.no_grad():
        expected = (
            pipe.vae.encode(2 * video - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        )
        decoded = pipe.decode_latents(latents)
    torch.testing.assert_close(latents[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
    assert decoded.shape == (1, 3, 3, 16, 16)


def test_wrong_arguments_are_refused(unet):
    with pytest.raises(ValueError, match="needs scheduler="):
        capture(unet, None)
    with pytest.raises(ValueError, match="at least one step, got none"):
        capture(unet, scheduler(), steps=[])
    with pytest.raises(TypeError, match="got dict"):
        capture({}, scheduler())


LVDM_SHAPE = (1, *SHAPE[1:])
TIMES = SimpleNamespace(timesteps=torch.tensor([751, 501, 251, 1]))  # as lvdm's sampler visits them


@pytest.fixture
def diffusion(one_thread):
    torch.manual_seed(0)
    return LatentDiffusion().requires_grad_(False)


def context(seed=1):
    return {"context": models.noise(1, models.TOKENS, models.TEXT, seed=seed)}


def test_videocrafters_own_noising_is_taken(diffusion):
    """Its scaled signal, where a scheduler's would be 1.43 times as strong."""
    given = []
    unet = diffusion.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    options = {"steps": [0, 2], "scheduler": TIMES, "max_rows": 10**6}
    real = vk.capture_real_maps(diffusion, 5 * torch.ones(LVDM_SHAPE), context(), **options)
    hook.remove()
    for step, sample in zip((0, 2), given, strict=True):
        assert torch.equal(real.noised[step], sample)
        time = TIMES.timesteps[step]
        alpha = diffusion.alphas_cumprod[time].sqrt()
        expected = 5 * float(alpha) * {0: 0.7, 2: 1 - 0.3 * 251 / 399}[step]
        assert float(sample.mean()) == pytest.approx(expected, abs=0.1)
    assert {item.step for item in real.maps} == {0, 2}
    steps = {item.step: item.timestep for item in real.maps}
    assert steps == {0: 751, 2: 251}


def test_a_noising_of_ones_own(unet):
    schedule = scheduler()
    seen = []

    def noising(latents, noise, timesteps):
        seen.append((timesteps.shape, noise.shape))
        return 0.5 * latents + 2 * noise

    latents = models.noise(*SHAPE, seed=2)
    found = capture(unet, schedule, latents, noising=noising)
    assert seen == [((2,), SHAPE)] * 2
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for noised in found.noised.values():
        torch.testing.assert_close(noised, 0.5 * latents + 2 * noise)
    own = capture(unet, schedule, latents, noising=schedule.add_noise)
    for one, other in zip(own.maps, capture(unet, schedule, latents).maps, strict=True):
        assert torch.equal(one.map, other.map)
    with pytest.raises(TypeError, match=r"noising must be a function .*, got float"):
        capture(unet, schedule, noising=0.7)


def test_lvdms_unet_alone_needs_a_noising(diffusion):
    unet, latents = diffusion.model.diffusion_model, torch.ones(LVDM_SHAPE)
    with pytest.raises(ValueError, match="noising must be given for UNetModel by itself"):
        vk.capture_real_maps(unet, latents, context(), steps=[0], scheduler=scheduler())
    options = {"steps": [0], "scheduler": scheduler(), "noising": scheduler().add_noise}
    assert vk.capture_real_maps(unet, latents, context(), **options).maps
    with pytest.raises(ValueError, match="noising must be given for UNetModel by itself"):
        search(unet, torch.eye(FRAMES), at_step=1)


def search(model, maps, **options):
    return vk.optimize_noise(
        model, maps, LVDM_SHAPE, context(), scheduler=TIMES, iterations=2, progress=False, **options
    )


def sample(diffusion, noise, scale):
    """DDIM with η = 0 as VideoCrafter2's sampler has it, from its formulas; to the third step."""
    unet = diffusion.model.diffusion_model
    alphas, scales = diffusion.alphas_cumprod, diffusion.scale_arr
    x = noise
    for step in range(3):
        time, after = TIMES.timesteps[step], TIMES.timesteps[step + 1]
        with_prompt, without = (unet(x, time.expand(1), **context(seed)) for seed in (1, 2))
        output = without + scale * (with_prompt - without)
        clean = (x - (1 - alphas[time]).sqrt() * output) / alphas[time].sqrt() / scales[time]
        x = alphas[after].sqrt() * scales[after] * clean + (1 - alphas[after]).sqrt() * output


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_noise_search_samples_as_videocrafter_does(diffusion, scale):
    noise = models.noise(*LVDM_SHAPE, seed=5)
    with vk.capture_maps(
        diffusion.model.diffusion_model, scheduler=TIMES, max_rows=10**6
    ) as capture:
        sample(diffusion, noise, scale)
    assert {(item.step, item.branch, item.calls) for item in capture.maps} == {
        (step, branch, 1) for step in range(3) for branch in (0, 1)
    }
    aim = MapObjective(
        diffusion,
        torch.eye(FRAMES),
        context(),
        batch=1,
        num_frames=FRAMES,
        at_step=[0, 2],
        negative_inputs=None if scale == 1 else context(2),
        guidance_scale=scale,
        scheduler=TIMES,
        max_rows=10**6,
        checkpointing=True,
    )
    expected = {(item.layer, item.step): item for item in capture.maps if item.branch == 0}
    found = aim.maps([noise])
    assert {item.step for item in found} == {0, 2}
    for item in found:
        torch.testing.assert_close(item.map, expected[item.layer, item.step].map)
    distance = [
        (torch.eye(FRAMES) - item.map).square().sum().sqrt()
        for item in expected.values()
        if item.step in (0, 2) and item.level != "init"
    ]
    value = float(aim.distance(noise))
    assert value == pytest.approx(float(sum(distance) / len(distance)), rel=1e-4)


def test_noise_is_found_for_videocrafter(diffusion):
    options = {"steps": [1], "scheduler": TIMES}
    real = vk.capture_real_maps(diffusion, models.noise(*LVDM_SHAPE), context(), **options)
    found = search(diffusion, real, at_step=1, kl_weight=0, learning_rate=0.05)
    assert found.losses[1].distance < found.losses[0].distance
    diffusion.parameterization = "v"
    with pytest.raises(ValueError, match="predicts epsilon or sample, got prediction_type 'v'"):
        search(diffusion, real, at_step=1)
