"""``apply_tar`` on every kind of model computes what the formula says, where it is told to."""

import copy
import gc
import weakref

import pytest
import torch

import vstar_kernels as vk
from tests.models import eager

pytest.importorskip("diffusers")
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor

from tests.models.models import KINDS, call, make
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import temporal_layers

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
everywhere = pytest.mark.parametrize("name", KINDS)
# Latte takes one resolution.
SIZES = {name: (8, 8) if name == "LatteTransformer3DModel" else (7, 10) for name in KINDS}


def always(sigma=1.0, **more):
    return vk.TARConfig(sigma, steps=None, **more)


def processors(model):
    return {layer.name: layer.module.processor for layer in temporal_layers(model)}


@everywhere
@pytest.mark.parametrize("batch", [1, 2])
def test_strength_0_everywhere_is_the_stock_model(name, batch):
    model = make(name)
    stock = call(model, name, batch=batch, size=SIZES[name])
    with vk.apply_tar(model, always(strength=0.0)):
        torch.testing.assert_close(call(model, name, batch=batch, size=SIZES[name]), stock, **CLOSE)
    assert torch.equal(call(model, name, batch=batch, size=SIZES[name]), stock)


@everywhere
@pytest.mark.parametrize(
    ("batch", "frames"), [(1, 6), (2, 6), (1, 19)], ids=["one video", "two", "beyond training"]
)
def test_tar_is_the_formula_in_float64(name, batch, frames):
    model, oracle = make(name), make(name)
    level = KINDS[name].levels - 1
    sizes = {"batch": batch, "frames": frames, "size": SIZES[name]}
    with vk.apply_tar(model, always({level: 2.0}, strength=1.5), extend_positions=True) as handle:
        out = call(model, name, **sizes)
        names = [layer.name for layer in handle.layers]
    assert names == [layer.name for layer in temporal_layers(model) if layer.level == level]
    with vk.apply_tar(model, always(strength=0.0), extend_positions=True):
        plain = call(model, name, **sizes)
    if frames > 16:
        oracle = with_positions(oracle, name, frames)
    eager.put_in(oracle, names, sigma=2.0, strength=1.5)
    expected = call(oracle, name, **sizes)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (plain - out).abs().max() > 100 * (out - expected).abs().max()


def with_positions(model, name, frames):
    """The model made for so many frames, with the same weights."""
    setting = {
        "UNetMotionModel": "motion_max_seq_length",
        "SparseControlNetModel": "motion_max_seq_length",
        "LatteTransformer3DModel": "video_length",
    }.get(name)
    if setting is None:
        return model
    longer = KINDS[name].make(**{setting: frames}).eval().requires_grad_(False)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("pos_embed.pe")}
    longer.load_state_dict(weights, strict=False)
    return longer


UNET = "UNet3DConditionModel"


@pytest.fixture
def scheduler():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(25)
    return scheduler


@everywhere
def test_step_13_is_regularized_and_step_14_is_the_baseline_bit_for_bit(name, scheduler):
    model = make(name)
    timesteps = scheduler.timesteps[[13, 14]]
    with vk.apply_tar(model, always(strength=0.0)):
        baseline = [call(model, name, batch=2, timestep=t) for t in timesteps]
    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler):
        out = [call(model, name, batch=2, timestep=t) for t in timesteps]
        again = call(model, name, batch=2, timestep=timesteps[0])
    assert (out[0] - baseline[0]).abs().max() > 1e-3
    assert torch.equal(out[1], baseline[1])
    assert torch.equal(again, out[0])


@everywhere
def test_stock_elsewhere_leaves_other_steps_and_layers_stock(name, scheduler):
    model = make(name)
    timesteps = scheduler.timesteps[[13, 14]]
    stock = [call(model, name, timestep=t) for t in timesteps]
    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler):
        kernels = call(model, name, timestep=timesteps[0])
    calls = []
    for layer in temporal_layers(model):
        watch(layer.module, calls, layer.level)
    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler, stock_elsewhere=True):
        torch.testing.assert_close(call(model, name, timestep=timesteps[0]), kernels, **CLOSE)
        assert len(calls) == sum(layer.level != 0 for layer in temporal_layers(model))
        assert 0 not in calls
        assert torch.equal(call(model, name, timestep=timesteps[1]), stock[1])


def watch(module, calls, level):
    """Note the calls of the module's own attention."""
    if hasattr(module, "processor"):
        # An instance of a class that may be replaced.
        processor = copy.copy(module.processor)
        original = type(processor).__call__

        class AttnProcessor2_0:  # noqa: N801
            def __call__(
                self,
                attn,
                hidden_states,
                encoder_hidden_states=None,
                attention_mask=None,
                temb=None,
            ):
                calls.append(level)
                return original(
                    processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb
                )

        module.set_processor(AttnProcessor2_0())
    else:
        own = type(module)

        class CrossAttention(own):
            def forward(self, *args, **kwargs):
                calls.append(level)
                return super().forward(*args, **kwargs)

        module.__class__ = CrossAttention


def inputs_and_outputs(model, layer, run):
    seen = []
    module = model.get_submodule(layer.name)
    hook = module.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(
            ((args or [kwargs.get("hidden_states")])[0], out)
        ),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return module, *seen[0]


@everywhere
@pytest.mark.parametrize("kind", ["identity", "uniform"])
def test_identity_and_uniform_maps(name, kind):
    model = make(name)
    level = KINDS[name].levels - 1
    with vk.apply_tar(model, vk.TARConfig(override={level: kind}, steps=None)) as handle:
        layer = handle.layers[-1]
        module, x, out = inputs_and_outputs(model, layer, lambda: call(model, name, batch=2))
    assert (layer.level, layer.override, layer.sigma, layer.strength) == (level, kind, None, None)
    value = module.to_v(x)
    if kind == "uniform":
        value = value.mean(1, keepdim=True).expand_as(value)
    torch.testing.assert_close(out, module.to_out[0](value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["toeplitz", "dense"])
def test_other_forms_of_the_same_matrix(form):
    model, frames = make(UNET), 6
    matrix = eager.gaussian(1.5, frames).float()
    bias = {"toeplitz": vk.ToeplitzBias(matrix[0]), "dense": vk.DenseBias(matrix)}[form]
    with vk.apply_tar(model, always({0: 1.5, 1: 1.5}, strength={0: 1.0, 1: 0.5})):
        gaussian = call(model, UNET)
    with vk.apply_tar(
        model, always(None, bias={0: bias, 1: bias}, strength={0: 1.0, 1: 0.5})
    ) as handle:
        torch.testing.assert_close(call(model, UNET), gaussian, **CLOSE)
        assert {layer.strength for layer in handle.layers} == {1.0, 0.5}
        assert type(bias).__name__ in handle.describe()
        with pytest.raises(ValueError, match="6 frames"):
            call(model, UNET, frames=7)


def test_the_statistic_reaches_the_kernel():
    model = make(UNET)
    outs = []
    for more in ({}, {"stat": "map_max"}, {"stat": "none"}, {"clamp_negative": True}):
        with vk.apply_tar(model, always(**more)) as handle:
            outs.append(call(model, UNET))
            assert all(
                (layer.bias.stat, layer.bias.clamp_negative)
                == (more.get("stat", "row_max"), more.get("clamp_negative", False))
                for layer in handle.layers
            )
    assert all((outs[0] - out).abs().max() > 1e-4 for out in outs[1:3])


@everywhere
def test_widths_are_those_of_the_sample(name):
    model, size = make(name), SIZES[name]
    finest = 4 if name == "LatteTransformer3DModel" else 10
    preset = "4D1" if name == "LatteTransformer3DModel" else "10D1_5D8"
    sigma = {0: 1.0} if name == "LatteTransformer3DModel" else {0: 1.0, 1: 8.0}
    with vk.apply_tar(model, always(sigma)):
        expected = call(model, name, size=size)
    with vk.apply_tar(model, preset) as handle:
        assert handle.layers == []
        assert "widths at a forward pass" in handle.describe()
        handle.step = 0
        assert torch.equal(call(model, name, size=size), expected)
        assert {(x.level, x.width, x.sigma, x.strength) for x in handle.layers} == {
            (level, -(-finest // 2**level), s, 1.0) for level, s in sigma.items()
        }
        if name != "LatteTransformer3DModel":
            with pytest.raises(ValueError, match="width 5: the widths are 6, 12"):
                call(model, name, size=(8, 12))


def test_odd_widths_round_up():
    model = make("UNetMotionModel")
    with vk.apply_tar(model, vk.TARConfig(by_width={5: 1.0}, steps=None)) as handle:
        call(model, "UNetMotionModel", size=(7, 9))
    assert {layer.level for layer in handle.layers} == {1}


@pytest.mark.parametrize("name", [UNET, "lvdm", "I2VGenXLUNet"])
def test_the_init_block_is_left_alone_unless_asked_for(name):
    model = make(name)
    with vk.apply_tar(model, always()) as handle:
        without = call(model, name)
        assert "init" not in {layer.level for layer in handle.layers}
    with vk.apply_tar(model, always(include_init=True)) as handle:
        assert (call(model, name) - without).abs().max() > 1e-4
        assert [layer.level for layer in handle.layers].count("init") == 2


class Pipeline:
    def __init__(self, scheduler=None, **models):
        self.components = {**models, "scheduler": scheduler}
        self.scheduler = scheduler
        self.__dict__.update(models)


def test_every_model_of_a_pipeline_is_treated(scheduler):
    """AnimateDiff with SparseCtrl; a level only one of them has will do."""
    names = {"unet": "UNetMotionModel", "controlnet": "SparseControlNetModel"}
    models = {key: make(name) for key, name in names.items()}
    plain = {key: call(models[key], names[key], timestep=1) for key in names}
    pipe = Pipeline(scheduler, **models)
    with vk.apply_tar(pipe, vk.TARConfig({0: 1.0, 1: 8.0})) as handle:
        assert {layer.model for layer in handle.layers} == set(names)
        assert "controlnet.down_blocks.0.motion_modules" in handle.describe()
        for key, name in names.items():
            out = call(models[key], name, timestep=scheduler.timesteps[0])
            off = call(models[key], name, timestep=scheduler.timesteps[14])
            stock = call(models[key], name, timestep=scheduler.timesteps[14])
            assert (out - plain[key]).abs().max() > 1e-3
            assert torch.equal(off, stock)
        pipe.scheduler = EulerDiscreteScheduler()  # exchanged after the call
        pipe.scheduler.set_timesteps(10)
        call(models["unet"], "UNetMotionModel", timestep=pipe.scheduler.timesteps[3])
    for key, name in names.items():
        assert torch.equal(call(models[key], name, timestep=1), plain[key])


def test_layers_and_describe(scheduler):
    model = make(UNET)
    with vk.apply_tar(model, vk.TARConfig({0: 1.0, 1: 8.0}), scheduler=scheduler) as handle:
        lines = handle.describe().splitlines()
        assert lines[0] == "TAR on 14 of 16 temporal attention layers, at steps 0 to 13"
        assert lines[1] == (
            "  down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1: "
            "level 0, σ = 1, strength 1"
        )
        assert len(lines) == 15
        call(model, UNET, timestep=960)
        assert "level 1 (width 4), σ = 8" in handle.describe()
    for steps, words in ((None, "all steps"), (0.5, "first 50%"), (lambda s, t: True, "<lambda>")):
        with vk.apply_tar(model, vk.TARConfig(1.0, steps=steps), scheduler=scheduler) as handle:
            assert words in handle.describe()


def test_removal_restores_the_very_processors_in_any_order():
    model, other = make(UNET), make("UNetMotionModel")
    before = processors(model), processors(other)
    first, second = vk.apply_tar(model, always()), vk.apply_tar(other, always())
    first.remove()
    second.remove()
    first.remove()
    for now, then in zip((processors(model), processors(other)), before, strict=True):
        assert all(now[name] is then[name] for name in then)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_removal_leaves_a_processor_that_is_not_ours():
    model = make(UNET)
    layer = temporal_layers(model)[3]
    handle = vk.apply_tar(model, always())
    theirs = AttnProcessor()
    layer.module.set_processor(theirs)
    handle.remove()
    assert layer.module.processor is theirs
    assert not any(isinstance(p, TARAttnProcessor) for p in processors(model).values())


def test_a_removed_handle_keeps_nothing_alive():
    model = make(UNET)
    alive = weakref.ref(model)
    handle = vk.apply_tar(model, always())
    call(model, UNET)
    handle.remove()
    del handle, model
    gc.collect()
    assert alive() is None


def test_two_handles_on_one_model_are_an_error():
    model = make(UNET)
    with vk.apply_tar(model, always()):
        out = call(model, UNET)
        with pytest.raises(ValueError, match="under apply_tar already"):
            vk.apply_tar(Pipeline(unet=model), always(2.0))
        assert torch.equal(call(model, UNET), out)
    with vk.apply_tar(model, always()):
        assert torch.equal(call(model, UNET), out)


def test_a_failure_leaves_no_model_half_treated():
    models = {"unet": make("UNetMotionModel"), "controlnet": make("SparseControlNetModel")}

    class Strange(AttnProcessor):
        pass

    temporal_layers(models["controlnet"])[0].module.set_processor(Strange())
    with pytest.raises(ValueError, match="cannot be regularized: it has a Strange"):
        vk.apply_tar(Pipeline(**models), always())
    assert not any(isinstance(p, TARAttnProcessor) for p in processors(models["unet"]).values())
    assert not models["unet"]._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("unet", "64D1"), TypeError, "pipe_or_model must be .* got str"),
        ((None, 1.0), TypeError, "config must be a TARConfig, a preset or a FrameTAR, got float"),
        ((None, "64"), ValueError, "a preset must be .* got '64'"),
        ((None, vk.TARConfig({5: 1.0})), ValueError, "has level 5: the levels are 0, 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = make(UNET)
    with pytest.raises(error, match=message):
        vk.apply_tar(arguments[0] or model, arguments[1])
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["stock_elsewhere", "extend_positions"])
def test_no_text_is_a_flag(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got str"):
        vk.apply_tar(None, "64D1", **{name: "no"})


def test_a_level_only_the_init_block_would_have_is_refused():
    model = make("UNetSpatioTemporalConditionModel")
    assert {layer.level for layer in temporal_layers(model)} == {0, 1}
    with pytest.raises(ValueError, match="level 2"):
        vk.apply_tar(model, always({2: 1.0}))


@pytest.mark.parametrize("steps", [13, 0.5, lambda step, timestep: True])
def test_without_a_scheduler_the_step_must_be_announced(steps):
    model = make(UNET)
    with vk.apply_tar(model, vk.TARConfig(1.0, steps=steps)) as handle:
        with pytest.raises(ValueError, match="scheduler="):
            call(model, UNET)
        handle.step = 3
        if steps == 0.5:
            with pytest.raises(ValueError, match="share of the schedule"):
                call(model, UNET)
            return
        call(model, UNET)
        handle.step = None
        with pytest.raises(ValueError, match="scheduler="):
            call(model, UNET)
        with pytest.raises(ValueError, match="step must be"):
            handle.step = -1


def test_the_announced_step_goes_before_the_schedulers(scheduler):
    model, timestep = make(UNET), scheduler.timesteps[0]
    with vk.apply_tar(model, always(strength=0.0)):
        plain = call(model, UNET, timestep=timestep)
    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler) as handle:
        handle.step = 14
        assert torch.equal(call(model, UNET, timestep=timestep), plain)
        handle.step = 13
        assert not torch.equal(call(model, UNET, timestep=timestep), plain)


def test_a_timestep_that_is_not_in_the_schedule(scheduler):
    model = make(UNET)
    with (
        vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler),
        pytest.raises(ValueError, match="timestep 7 is not in the scheduler's timesteps"),
    ):
        call(model, UNET, timestep=7)


@pytest.mark.parametrize(
    ("name", "frames", "limit"),
    [
        ("UNetMotionModel", 17, "16 frames .at most: motion_max_seq_length.*got 17"),
        ("SparseControlNetModel", 17, "16 frames .at most: motion_max_seq_length"),
        ("LatteTransformer3DModel", 5, "6 frames .exactly: video_length.*got 5"),
        ("LatteTransformer3DModel", 7, "6 frames .exactly: video_length.*got 7"),
    ],
)
def test_more_frames_than_positions(name, frames, limit):
    model = make(name)
    saved = model.state_dict()
    with (
        vk.apply_tar(model, always()),
        pytest.raises(ValueError, match=limit + r".*extend_positions=True"),
    ):
        call(model, name, frames=frames)
    with vk.apply_tar(model, always(), extend_positions=True):
        call(model, name, frames=frames)
        now = model.state_dict()  # saving is not disturbed
        assert all(torch.equal(now[key], saved[key]) for key in saved)
        # Latte adds no positions to a single frame.
        call(model, name, frames=1)
    if name == "LatteTransformer3DModel":
        assert model.temp_pos_embed.shape[1] == 6


def test_learned_positions_are_not_extended():
    model = make("UNetMotionModel")
    for name, buffer in model.named_buffers():
        if name.endswith("pe"):
            buffer += torch.randn_like(buffer)
    with (
        vk.apply_tar(model, always(), extend_positions=True),
        pytest.raises(ValueError, match="not sinusoidal"),
    ):
        call(model, "UNetMotionModel", frames=17)


def test_forward_without_hooks_is_refused():
    model = make(UNET)
    inputs = KINDS[UNET].inputs(torch.randn(1, 4, 3, 8, 8))
    with vk.apply_tar(model, always()):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"call the model itself, not its forward"):
                model.forward(**inputs, timestep=1)
            with torch.no_grad():
                model(**inputs, timestep=1)
