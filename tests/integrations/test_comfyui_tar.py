"""VSTAR Apply TAR against ComfyUI's contract: stand-ins of its UNets, wrappers and nodes."""

import logging

import pytest
import torch

import vstar_kernels as vk
from tests.integrations import comfy
from tests.integrations.conftest import FRAMES
from tests.models import eager
from vstar_kernels import testing
from vstar_kernels.models.comfyui import Sampling, TARWrapper
from vstar_kernels.models.front_end import temporal_layers

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SIGMAS = torch.logspace(1, -2, 26).tolist()
SIGMAS[-1] = 0.0
ALWAYS = {"start": 0.0, "end": 1.0}


def latents(frames=FRAMES, size=8, seed=1):
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(seed))


def is_plain(unet):
    """Whether no layer has anything but its own attention."""
    svd = all("forward" not in vars(module) for module in unet.modules())
    functions = [m.actual_attention for m in unet.modules() if hasattr(m, "actual_attention")]
    hooks = [hook for m in unet.modules() for hook in (*m._forward_pre_hooks, *m._forward_hooks)]
    return svd and not hooks and all(f is comfy.attention_pytorch for f in functions)


def put_oracle_in(unet, sigma, level=0, strength=1.0):
    """Gives the layers of a level the formula in float64, for good."""

    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.double().unflatten(-1, (heads, -1)) for x in (q, k, v))
        bias = vk.DenseBias(eager.gaussian(sigma, q.shape[1]), strength=strength)
        return testing.eager(q, k, v, bias).flatten(-2).float()

    for layer in temporal_layers(unet):
        module = layer.module
        if layer.level == level and hasattr(module, "actual_attention"):
            module.actual_attention = attend
        elif layer.level == level:
            module.forward = lambda x, m=module, **_: m.to_out(
                attend(m.to_q(x), m.to_k(x), m.to_v(x), m.heads)
            )


def test_the_table_knows_these_unets(unet):
    layers = temporal_layers(unet)
    each = 2 if isinstance(unet.input_blocks[1][0], comfy.VanillaTemporalModule) else 1
    places = [(layer.level, layer.place) for layer in layers]
    expected = [(0, "down"), (1, "down"), (1, "mid"), (1, "up"), (0, "up")]
    assert places == [place for place in expected for _ in range(each)]
    assert all(unet.get_submodule(layer.name) is layer.module for layer in layers)


def test_a_model_without_a_graph_is_regularized_by_the_library(unet):
    x, options = latents(), {"cond_or_uncond": [0], "sample_sigmas": torch.tensor(SIGMAS)}

    def call(sigma):
        with torch.no_grad():
            options["sigmas"] = torch.tensor([sigma])
            return unet(x, torch.zeros(len(x)), transformer_options=options)

    plain = call(SIGMAS[0])
    with vk.apply_tar(unet, vk.TARConfig(1.5), stock_elsewhere=True):
        on, off = call(SIGMAS[13]), call(SIGMAS[14])
    assert torch.equal(off, plain)
    assert is_plain(unet)
    put_oracle_in(unet, 1.5)
    torch.testing.assert_close(on, call(SIGMAS[0]), **CLOSE)


def test_it_is_the_formula_at_its_steps_and_nothing_elsewhere(run, unet):
    model = comfy.ModelPatcher(unet)
    (tar,) = run("VSTARApplyTAR", model=model, sigma_level_0=2.0)
    plain, on = model.sample(latents(), SIGMAS), tar.sample(latents(), SIGMAS)
    assert is_plain(unet)
    put_oracle_in(unet, 2.0)
    expected = model.sample(latents(), SIGMAS)
    for step in range(25):
        if step < 14:  # 0.56 of 25
            torch.testing.assert_close(on[step], expected[step], **CLOSE)
            assert (on[step] - plain[step]).abs().max() > 1e-4
        else:
            assert torch.equal(on[step], plain[step])


def test_strength_0_is_plain(run, unet):
    model = comfy.ModelPatcher(unet)
    (off,) = run("VSTARApplyTAR", model=model, strength=0.0, sigma_level_1=3.0, **ALWAYS)
    torch.testing.assert_close(off.sample(latents(), [1, 0]), model.sample(latents(), [1, 0]))


def ancestral_middle(start, end, eta):
    """Where an ancestral solver of second order calls the model again (DPM2, DPM++ 2S)."""
    added = min(end, eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5)
    return (start * (end**2 - added**2) ** 0.5) ** 0.5


@pytest.mark.parametrize(
    ("sigma", "step"),
    [
        (SIGMAS[0], 0),
        (SIGMAS[24], 24),
        (SIGMAS[13] * 1.0001, 13),
        (SIGMAS[13] * 0.9999, 13),
        ((SIGMAS[3] * SIGMAS[4]) ** 0.5, 3),  # where solvers of second order call the model again
        (SIGMAS[3] ** (1 / 3) * SIGMAS[4] ** (2 / 3), 3),  # of third order
        (ancestral_middle(SIGMAS[3], SIGMAS[4], eta=0.7), 3),
        (ancestral_middle(SIGMAS[3], SIGMAS[4], eta=1.0), 4),  # which is at the next step's sigma
        (SIGMAS[7] * 1.03, 7),  # with noise added before the step
        (1000.0, 0),
        (1e-9, 24),
    ],
)
def test_the_step_is_the_one_that_has_begun(unet, sigma, step):
    options = {"sample_sigmas": torch.tensor(SIGMAS), "sigmas": torch.tensor([sigma])}
    found = Sampling.of_call(unet, (None,) * 5 + (options,), {})
    assert found.step == step


def test_steps_begin_and_end_at_shares(run, unet):
    model = comfy.ModelPatcher(unet)
    (tar,) = run("VSTARApplyTAR", model=model, start=0.4, end=0.6)
    sigmas = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    pairs = zip(tar.sample(latents(), sigmas), model.sample(latents(), sigmas), strict=True)
    assert [not torch.equal(*pair) for pair in pairs] == [False, False, True, False, False]


def test_a_sampler_that_fails_leaves_the_model_plain(run, unet, monkeypatch):
    model = comfy.ModelPatcher(unet)
    (tar,) = run("VSTARApplyTAR", model=model, sigma_level_1=1.0, **ALWAYS)
    plain = model.sample(latents(), [1, 0])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(unet.output_blocks[1], "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tar.sample(latents(), [1, 0])
    monkeypatch.undo()
    assert is_plain(unet)
    assert torch.equal(model.sample(latents(), [1, 0])[0], plain[0])


def test_branches_do_not_affect_each_other(run, unet):
    model = comfy.ModelPatcher(unet)
    branches = [
        model,
        *run("VSTARApplyTAR", model=model, sigma_level_0=1.0, **ALWAYS),
        *run("VSTARApplyTAR", model=model, sigma_level_0=4.0, **ALWAYS),
    ]
    alone = [branch.sample(latents(), [1, 0])[0] for branch in branches]
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    for index in (2, 0, 1, 0, 2):
        assert torch.equal(branches[index].sample(latents(), [1, 0])[0], alone[index])


def test_the_later_of_two_takes_the_place_of_the_first(run, unet):
    model = comfy.ModelPatcher(unet)
    (first,) = run("VSTARApplyTAR", model=model, sigma_level_0=1.0, **ALWAYS)
    (second,) = run("VSTARApplyTAR", model=first, sigma_level_0=4.0, **ALWAYS)
    (alone,) = run("VSTARApplyTAR", model=model, sigma_level_0=4.0, **ALWAYS)
    expected = alone.sample(latents(), [1, 0])[0]
    assert torch.equal(second.sample(latents(), [1, 0])[0], expected)
    assert not torch.equal(first.sample(latents(), [1, 0])[0], expected)


def test_a_preset_goes_by_the_latents_width(run, unet):
    model = comfy.ModelPatcher(unet)
    (preset,) = run("VSTARApplyTAR", model=model, preset="32D1_16D8", **ALWAYS)
    levels = {"sigma_level_0": 1.0, "sigma_level_1": 8.0}
    (custom,) = run("VSTARApplyTAR", model=model, **levels, **ALWAYS)
    wide = latents(size=32)
    assert torch.equal(preset.sample(wide, [1, 0])[0], custom.sample(wide, [1, 0])[0])
    with pytest.raises(ValueError, match="no temporal attention has width 16: the widths are 4, 8"):
        preset.sample(latents(), [1, 0])
    assert is_plain(unet)


def test_windows_of_the_video_are_regularized_by_themselves_and_told_of_once(run, unet, caplog):
    (tar,) = run("VSTARApplyTAR", model=comfy.ModelPatcher(unet), **ALWAYS)
    video = latents(FRAMES + 3)
    for module in unet.modules():  # which AnimateDiff-Evolved sets to the window's
        if hasattr(module, "video_length"):
            module.video_length = FRAMES
    with caplog.at_level(logging.INFO):
        outs = [
            tar.call(video[i : i + FRAMES], 1.0, [1.0, 0.0], FRAMES, options=options)
            for i, options in ((0, {"ad_params": {"sub_idxs": [0]}}), (3, {"context_window": 1}))
        ]
    assert caplog.text.count("context window") == 1
    put_oracle_in(unet, 1.0)
    expected = comfy.ModelPatcher(unet).call(video[3:], 1.0, [1.0, 0.0], FRAMES)
    torch.testing.assert_close(outs[1], expected, **CLOSE)


def test_motion_modules_may_see_the_video_in_windows_or_be_switched_off(run):
    torch.manual_seed(0)
    unet = comfy.UNetModel(comfy.VanillaTemporalModule, FRAMES).eval()
    for module in unet.modules():
        if isinstance(module, comfy.VanillaTemporalModule):
            module.view_length = 3
    unet.input_blocks[1][0].effect = 0
    model = comfy.ModelPatcher(unet)
    (tar,) = run("VSTARApplyTAR", model=model, **ALWAYS)
    on = tar.sample(latents(), [1, 0])[0]
    put_oracle_in(unet, 1.0)
    torch.testing.assert_close(on, model.sample(latents(), [1, 0])[0], **CLOSE)


def test_patches_of_others_are_honoured_or_refused(run):
    torch.manual_seed(0)
    unet = comfy.UNetModel(frames=FRAMES).eval()
    model = comfy.ModelPatcher(unet)
    (tar,) = run("VSTARApplyTAR", model=model, strength=0.0, **ALWAYS)
    halved = {"patches": {"attn1_patch": [lambda x: (x / 2, x * 3)]}}
    torch.testing.assert_close(
        tar.sample(latents(), [1, 0], options=halved),
        model.sample(latents(), [1, 0], options=halved),
    )
    cut = {"patches": {"attn1_patch": [lambda x: (x[:, :2], x[:, :2])]}}
    with pytest.raises(ValueError, match=r"cross-attention, from \(128, 6, 16\) to a context"):
        tar.sample(latents(), [1, 0], options=cut)
    with pytest.raises(RuntimeError, match=r"time_stack.0.attn1 was not called: a patch of attn1"):
        tar.sample(latents(), [1, 0], options={"patches_replace": {"attn1": lambda x: x}})
    assert is_plain(unet)


def test_a_mask_is_refused(unet):
    layer = temporal_layers(unet)[0].module
    _, attention = TARWrapper(vk.TARConfig(1.0))._attentions(unet, 8)[0]
    x, mask = torch.randn(2, FRAMES, comfy.CHANNELS), torch.ones(FRAMES, FRAMES)
    args = (x, x, x, 2) if hasattr(layer, "actual_attention") else (x,)
    with pytest.raises(ValueError, match=r"a mask, got shape \(6, 6\); the arguments colour"):
        attention(*args, mask=mask, colour="red")


def test_what_others_have_put_in_the_place_of_attention_is_not_discarded(run, unet):
    layer = temporal_layers(unet)[0].module
    name = "actual_attention" if hasattr(layer, "actual_attention") else "forward"
    setattr(layer, name, lambda *args, **kwargs: None)
    (tar,) = run("VSTARApplyTAR", model=comfy.ModelPatcher(unet), **ALWAYS)
    with pytest.raises(ValueError, match="cannot be regularized: its attention is <function"):
        tar.sample(latents(), [1, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_level_0": 0.0}, "every sigma level is 0, so that nothing is regularized"),
        ({"start": 0.5, "end": 0.5}, "start, 0.5, must be before end, 0.5"),
        ({"preset": "64D"}, "a preset must be"),
    ],
)
def test_settings_that_do_nothing_are_refused_at_once(run, unet, settings, message):
    with pytest.raises(ValueError, match=message):
        run("VSTARApplyTAR", model=comfy.ModelPatcher(unet), **settings)


@pytest.mark.parametrize(
    ("settings", "sigmas", "message"),
    [
        ({"sigma_level_3": 1.0}, SIGMAS, "no temporal attention has level 3: the levels are 0, 1"),
        ({"start": 0.1, "end": 0.12}, [3.0, 2.0, 0.0], "VSTAR is off at each of the 2 steps"),
        ({}, None, "does not say at which step it is"),
    ],
)
def test_tar_is_never_silently_off(run, unet, settings, sigmas, message):
    (tar,) = run("VSTARApplyTAR", model=comfy.ModelPatcher(unet), **settings)
    options = {"sample_sigmas": None} if sigmas is None else {}
    with pytest.raises(ValueError, match=message):
        tar.call(latents(), 3.0, sigmas or [3.0, 0.0], FRAMES, options=options)
    assert is_plain(unet)


def test_a_model_without_temporal_attention_is_an_error(run):
    unet = comfy.UNetModel(comfy.Downsample)
    (tar,) = run("VSTARApplyTAR", model=comfy.ModelPatcher(unet))
    with pytest.raises(ValueError, match="no temporal attention in this UNetModel: TAR and"):
        tar.sample(latents(size=16), SIGMAS)


def test_a_configuration_takes_the_place_of_the_nodes_own_values(run, unet):
    model = comfy.ModelPatcher(unet)
    levels = {"sigma_level_0": 0.0, "sigma_level_1": 2.0}
    settings = {"stat": "map_max", "override_level_0": "uniform", "strength": 0.5}
    (config,) = run("VSTARTARConfig", **levels, **settings, **ALWAYS)
    assert config.config == vk.TARConfig(
        {1: 2.0}, stat="map_max", override={0: "uniform"}, strength=0.5, steps=None
    )
    (tar,) = run("VSTARApplyTAR", model=model, config=config)
    (same,) = run("VSTARTARConfig", json=config.config.to_json(), start=0.0, sigma_level_0=9.0)
    assert same.config == config.config
    on = tar.sample(latents(), [1, 0])[0]
    for layer in temporal_layers(unet):  # what uniform attention is, by other means
        if layer.level == 0 and hasattr(layer.module, "actual_attention"):
            layer.module.actual_attention = lambda q, k, v, heads, mask=None: v.mean(
                1, keepdim=True
            ).expand_as(v)
        elif layer.level == 0:
            m = layer.module
            m.forward = lambda x, m=m, **_: m.to_out(
                m.to_v(x).mean(1, keepdim=True).expand(-1, FRAMES, -1)
            )
    (rest,) = run("VSTARTARConfig", **levels, stat="map_max", strength=0.5, **ALWAYS)
    (rest,) = run("VSTARApplyTAR", model=model, config=rest)
    torch.testing.assert_close(on, rest.sample(latents(), [1, 0])[0], **CLOSE)
    with pytest.raises(ValueError, match="override is by level, and a preset by width"):
        run("VSTARTARConfig", preset="64D1", override_level_0="uniform")
    with pytest.raises(ValueError, match="sigma"):
        run("VSTARTARConfig", json='{"sigma": "one"}')


def test_a_real_videos_similarity_is_the_bias(run, unet):
    model = comfy.ModelPatcher(unet)
    video = torch.rand(FRAMES, 5, 7, 3)
    (bias,) = run("VSTARBiasFromFrames", frames=video, min_max=True)
    expected = vk.analysis.bias_from_frames(video.movedim(-1, 1), min_max=True)
    assert torch.equal(bias.entries, expected.entries)
    (config,) = run("VSTARTARConfig", **ALWAYS)
    for settings in ({"bias": bias, **ALWAYS}, {"bias": bias, "config": config}):
        (tar,) = run("VSTARApplyTAR", model=model, **settings)
        wrapper = tar.wrappers[comfy.DIFFUSION_MODEL]["vstar_tar"][0]
        assert torch.equal(wrapper.config.bias.entries, expected.entries)
        assert not torch.equal(tar.sample(latents(), [1, 0])[0], model.sample(latents(), [1, 0])[0])
    for module in unet.modules():
        if hasattr(module, "video_length"):
            module.video_length = FRAMES + 1
    with pytest.raises(ValueError, match="6"):
        tar.sample(latents(FRAMES + 1), [1, 0], frames=FRAMES + 1)
