import copy
import types

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels import testing
from vstar_kernels.attention import dispatch, reference
from vstar_kernels.models.front_end import temporal_layers

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers.models.attention_processor import AttnProcessor

from examples import tiny
from tests.models import eager, models

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIDE = 6, 8
TAR = vk.TARConfig(sigma=2.0, strength=1.5, steps=None)


@pytest.fixture
def unet(one_thread):
    return models.make("UNet3DConditionModel")


@pytest.fixture
def pipe(one_thread):
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(model, name="UNet3DConditionModel", **changes):
    with torch.no_grad():
        return models.call(model, name, **{"batch": 2, "size": (SIDE, SIDE)} | changes)


def dense_maps(model, bias, name="UNet3DConditionModel"):
    """Every layer's maps from its input, in float64, ``(batch, positions, heads, N, N)``."""
    maps, hooks = {}, []

    def watch(layer):
        def hook(module, args, kwargs, output):
            hidden = (args or list(kwargs.values()))[0].double()
            exact = copy.deepcopy(module).double()
            query, key = (
                project(hidden).unflatten(-1, (module.heads, -1))
                for project in (exact.to_q, exact.to_k)
            )
            delta = None
            if bias is not None and layer.level == 0:
                matrix = eager.gaussian(bias.sigma, hidden.shape[1])
                delta = vk.DenseBias(matrix, strength=bias.strength)
            if name == "LaVie":
                matrix = 0.0 if delta is None else delta.strength * delta.entries
                weights = eager.lavie_weights(exact, query, key, matrix)
            else:
                weights = testing.eager_weights(query, key, delta)
            maps[layer.name] = weights.unflatten(0, (2, -1))

        return hook

    for layer in temporal_layers(model):
        hooks.append(layer.module.register_forward_hook(watch(layer), with_kwargs=True))
    call(model, name)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("name", models.KINDS)
def test_maps_are_those_that_run_and_nothing_changes(name, regularized):
    model = models.make(name)
    bias = vk.GaussianBias(TAR.sigma, strength=TAR.strength) if regularized else None
    handle = vk.apply_tar(model, TAR) if regularized else types.SimpleNamespace(remove=int)
    expected_out, expected = call(model, name), dense_maps(model, bias, name)
    with vk.capture_maps(model, max_rows=10**6) as capture:
        assert torch.equal(call(model, name), expected_out)
    handle.remove()
    layers = {layer.name: layer for layer in temporal_layers(model)}
    assert sorted(m.layer for m in capture.maps) == sorted(layers)
    for found in capture.maps:
        layer = layers[found.layer]
        assert (found.level, found.place) == (layer.level, layer.place)
        assert (found.model, found.step, found.timestep, found.calls) == ("", None, 10.0, 1)
        dense = expected[found.layer]
        assert found.positions == dense.shape[1]
        assert found.map.dtype == torch.float32
        torch.testing.assert_close(found.map.double(), dense.mean((1, 2)), rtol=0, atol=1e-5)
        assert (found.map[0] - found.map[1]).abs().max() > 1e-5  # the batch is kept apart
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pipeline_is_captured_step_by_step(pipe):
    def sample():
        return pipe(
            "a cat",
            num_frames=8,
            height=16,
            width=16,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    config = vk.TARConfig(sigma={0: 1.0}, steps=1)
    with vk.apply_tar(pipe, config):
        expected = sample()
        with vk.capture_maps(pipe, steps=[1, 2]) as capture:
            assert torch.equal(sample(), expected)
    times = [pipe.scheduler.timesteps[i].item() for i in (1, 2)]
    assert {(m.model, m.step, m.timestep) for m in capture.maps} == {
        ("unet", 1, times[0]),
        ("unet", 2, times[1]),
    }
    on, off = (capture.mean(level=0, step=step) for step in (1, 2))
    assert on.shape == off.shape == (2, 8, 8)
    assert torch.equal(capture.mean(level=0, step=1, model="unet"), on)
    near = torch.diagonal(on, dim1=1, dim2=2).mean() - torch.diagonal(off, dim1=1, dim2=2).mean()
    assert near > 0.02  # regularized, then not


def test_means_are_over_what_is_asked_for(unet):
    with vk.capture_maps(unet) as capture:
        call(unet)

    def mean(**wanted):
        maps = [m for m in capture.maps if all(getattr(m, k) == v for k, v in wanted.items())]
        assert maps
        return torch.stack([m.map for m in maps]).mean(0)

    for wanted in ({"level": 1}, {"place": "up"}, {"level": 0, "place": "down"}, {}):
        assert torch.equal(capture.mean(**wanted), mean(**wanted))
    assert not torch.equal(capture.mean(level=0), capture.mean(level=1))
    message = (
        r"no map of level 7, step 0 .* levels 0, 1, init; places down, init, mid, up; steps None"
    )
    with pytest.raises(ValueError, match=message):
        capture.mean(level=7, step=0)


def test_layers_are_chosen(unet):
    with vk.capture_maps(unet, layers=lambda layer: layer.place == "mid") as capture:
        call(unet)
    expected = [layer.name for layer in temporal_layers(unet) if layer.place == "mid"]
    assert [m.layer for m in capture.maps] == expected
    with pytest.raises(ValueError, match="layers chooses none"):
        vk.capture_maps(unet, layers=lambda layer: False)


@pytest.mark.parametrize("max_rows", [1, 6, 9])
def test_the_reference_takes_positions_at_equal_distances(unet, max_rows, monkeypatch):
    monkeypatch.setattr(dispatch.TAR_ATTENTION, "backends", {"reference": reference})
    monkeypatch.setattr("vstar_kernels.analysis.maps.MAP_ELEMENTS", 2 * FRAMES**2 * 5)
    layer = temporal_layers(unet)[2]
    count = max(1, max_rows // 2)
    chosen = [int((i + 0.5) * SIDE**2 / count) for i in range(count)]
    expected = dense_maps(unet, None)[layer.name][:, chosen].mean((1, 2))
    with vk.capture_maps(unet, layers=lambda x: x.name == layer.name, max_rows=max_rows) as capture:
        call(unet)
    assert capture.maps[0].positions == count
    torch.testing.assert_close(capture.maps[0].map.double(), expected, rtol=0, atol=1e-5)
    assert len(set(chosen)) == count


def test_a_kernel_that_gives_maps_takes_all_positions(unet, monkeypatch):
    shapes = []

    def why_not(call):
        return [] if call.options.map_block else ["only maps"]

    def forward(call, *, save=False):
        shapes.append(call.shape)
        return reference.forward(call)

    kernel = types.SimpleNamespace(why_not=why_not, forward=forward)
    backends = {"maps": kernel, **dispatch.TAR_ATTENTION.backends}
    monkeypatch.setattr(dispatch.TAR_ATTENTION, "backends", backends)
    with vk.apply_tar(unet, TAR), vk.capture_maps(unet, max_rows=1) as capture:
        call(unet)
    layers = temporal_layers(unet)
    heads = [layer.module.heads for layer in layers]
    assert sorted((s[0], s[2], s[3]) for s in shapes) == sorted((2, FRAMES, h) for h in heads)
    assert {m.positions for m in capture.maps if m.level == 0} == {SIDE**2}


@pytest.mark.parametrize("kind", ["identity", "uniform"])
def test_replaced_maps_are_shown_as_they_are(unet, kind):
    config = vk.TARConfig(override={0: kind}, steps=None)
    with vk.capture_maps(unet) as capture, vk.apply_tar(unet, config):
        call(unet)
    expected = torch.eye(FRAMES) if kind == "identity" else torch.ones(FRAMES, FRAMES) / FRAMES
    assert torch.equal(capture.mean(level=0), expected.expand(2, -1, -1))
    assert not torch.equal(capture.mean(level=1), expected.expand(2, -1, -1))


def captured(unet):
    with vk.capture_maps(unet) as capture:
        call(unet)
    return capture.mean()


def test_it_goes_with_the_other_handles_in_any_order(unet):
    texts = models.noise(FRAMES, models.TOKENS, models.TEXT, seed=5)
    plain = captured(unet)
    with vk.condition_frames(unet, texts, guidance=False), vk.apply_tar(unet, TAR):
        both, out = captured(unet), call(unet)

    capture = vk.capture_maps(unet)
    prompts = vk.condition_frames(unet, texts, guidance=False)
    tar = vk.apply_tar(unet, TAR)
    assert torch.equal(call(unet), out)
    assert torch.equal(capture.mean(), both)
    capture.clear()
    prompts.remove()
    tar.remove()
    call(unet)
    assert torch.equal(capture.mean(), plain)
    tar = vk.apply_tar(unet, TAR)
    prompts = vk.condition_frames(unet, texts, guidance=False)
    capture.remove()
    capture.remove()
    assert torch.equal(call(unet), out)
    assert torch.equal(capture.mean(), plain)  # kept, and nothing added
    tar.remove()
    prompts.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_replaced_processors_and_projections_are_seen(unet):
    capture = vk.capture_maps(unet, max_rows=10**6)
    unet.set_attn_processor(AttnProcessor())
    layer = temporal_layers(unet)[0]
    layer.module.to_q = torch.nn.Linear(layer.module.query_dim, layer.module.inner_dim)
    call(unet)
    capture.remove()
    expected = dense_maps(unet, None)
    for found in capture.maps:
        dense = expected[found.layer].mean((1, 2))
        torch.testing.assert_close(found.map.double(), dense, rtol=0, atol=1e-5)


def test_steps_of_a_model_by_itself(unet):
    scheduler = tiny._scheduler()
    scheduler.set_timesteps(4)
    with vk.capture_maps(unet, steps=[0, 3], scheduler=scheduler) as capture:
        for t in scheduler.timesteps:
            call(unet, timestep=t.item())
    assert {m.step for m in capture.maps} == {0, 3}
    with (
        vk.capture_maps(unet, steps=[0]) as capture,
        pytest.raises(ValueError, match="scheduler=, announce it by"),
    ):
        call(unet)
    with vk.capture_maps(unet, steps=[5]) as capture:
        for capture.step in (4, 5):
            call(unet)
    assert {m.step for m in capture.maps} == {5}


def test_steps_that_never_came(unet):
    with vk.capture_maps(unet, steps=[99, 7]) as capture:
        assert capture.maps == []  # it was not called yet
        for capture.step in (3, 4):
            call(unet)
        with pytest.warns(UserWarning, match=r"steps names 7, 99, and .* was called at 3, 4$"):
            assert capture.maps == []
        capture.clear()
        assert capture.maps == []
        for capture.step in (7, 8):
            call(unet)
        assert {m.step for m in capture.maps} == {7}


def test_steps_that_can_be_none(unet):
    for steps in ("x", 3, ["a"], [1.0], [True]):
        with pytest.raises(TypeError, match="steps must be indices of denoising steps or None"):
            vk.capture_maps(unet, steps=steps)
    with pytest.raises(ValueError, match=r"steps counts from 0, .* got -1"):
        vk.capture_maps(unet, steps=[-1])


def test_repeated_steps_are_averaged(unet):
    plain = captured(unet)
    with vk.apply_tar(unet, TAR):
        regularized = captured(unet)
    with vk.capture_maps(unet) as capture:
        call(unet)
        call(unet)
        with vk.apply_tar(unet, TAR):
            call(unet)
    assert {m.calls for m in capture.maps} == {3}
    expected = (2 * plain + regularized) / 3
    torch.testing.assert_close(capture.mean(), expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-3


def test_other_sizes_need_a_clear(unet):
    with vk.capture_maps(unet) as capture:
        call(unet)
        with pytest.raises(ValueError, match=r"\(2, 6, 6\) .* now \(2, 5, 5\): clear\(\)"):
            call(unet, frames=5)
        capture.clear()
        call(unet, frames=5)
    assert capture.mean().shape == (2, 5, 5)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_no_hooks(unet, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(unet.conv_out, "forward", fail)
    with pytest.raises(error), vk.capture_maps(unet):
        call(unet)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_layers_that_are_not_called_raise():
    latte = models.make("LatteTransformer3DModel")
    with (
        vk.capture_maps(latte),
        pytest.raises(RuntimeError, match=r"temporal_transformer_blocks\.0\.attn1 was not called"),
    ):
        call(latte, "LatteTransformer3DModel", enable_temporal_attentions=False)


def test_fused_projections_raise():
    unet = models.make("UNetMotionModel")
    unet.fuse_qkv_projections()
    with (
        vk.capture_maps(unet),
        pytest.raises(RuntimeError, match=r"did not call its to_q and to_k.*fuse_qkv_projections"),
    ):
        call(unet, "UNetMotionModel")


def test_free_noise_raises():
    pipe = tiny.animatediff()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_free_noise(context_length=8, context_stride=4)
    with vk.capture_maps(pipe), pytest.raises(RuntimeError, match="a part of the video"):
        pipe("a cat", num_frames=16, height=16, width=16, num_inference_steps=1)


def test_wrong_arguments_are_refused(unet):
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        vk.capture_maps(unet, max_rows=0)
    with pytest.raises(TypeError, match="max_rows must be an integer, got float"):
        vk.capture_maps(unet, max_rows=1.5)
    for name in ("differentiable", "map_heads"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got str"):
            vk.capture_maps(unet, **{name: "no"})
    with pytest.raises(ValueError, match="a compiled UNet3DConditionModel"):
        vk.capture_maps(torch.compile(unet, backend="eager"))
    with pytest.raises(TypeError, match="got dict"):
        vk.capture_maps({})


def test_layers_by_level_and_by_name():
    unet = models.make("UNet3DConditionModel")
    name = next(layer.name for layer in temporal_layers(unet) if layer.level == 1)
    with vk.capture_maps(unet, layers=["init", name]) as capture:
        call(unet)
    assert {item.level for item in capture.maps} == {"init", 1}
    assert name in {item.layer for item in capture.maps}
    assert len(capture.maps) == 3
    with pytest.raises(ValueError, match="the levels are 0, 1, init, and a layer's name is one"):
        vk.capture_maps(unet, layers=["transformer_in"])


@pytest.mark.parametrize(("max_rows", "backends"), [(8, "the reference"), (8, "all")])
@pytest.mark.filterwarnings("ignore::vstar_kernels.SlowBackendWarning")
def test_maps_of_each_head(max_rows, backends, monkeypatch):
    """Where a kernel gives maps, and where the reference computes some positions."""
    unet = models.make("UNet3DConditionModel")
    if backends == "the reference":
        reference = {"reference": dispatch.TAR_ATTENTION.backends["reference"]}
        monkeypatch.setattr(dispatch.TAR_ATTENTION, "backends", reference)
    config = vk.TARConfig({1: 2.0}, override={0: "uniform"}, steps=None)
    with vk.apply_tar(unet, config), vk.capture_maps(unet, max_rows=max_rows) as plain:
        call(unet)
    both = {"max_rows": max_rows, "map_heads": True}
    with vk.apply_tar(unet, config), vk.capture_maps(unet, **both) as capture:
        call(unet)
        call(unet)
    for item, expected in zip(capture.maps, plain.maps, strict=True):
        assert expected.heads is None
        heads = unet.get_submodule(item.layer).heads
        assert item.heads.shape == (2, heads, *item.map.shape[1:])
        torch.testing.assert_close(item.heads.mean(1), item.map)
        torch.testing.assert_close(item.map, expected.map)
        assert item.positions == expected.positions
    assert any(not torch.allclose(item.heads[:, 0], item.heads[:, 1]) for item in capture.maps)
