"""capture_columns on every kind of model with a text: what it sees, and that it leaves no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from tests.helpers import default_dtype
from tests.models import models
from vstar_kernels.models.columns import level_size, resize_maps, token_weights
from vstar_kernels.models.conditional import conditional_passes
from vstar_kernels.models.front_end import cross_layers, find_front_end
from vstar_kernels.models.hooks import Hooks

pytest.importorskip("diffusers")
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = (
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "UNetMotionModel",
    "LatteTransformer3DModel",
    "lvdm",
    "LaVie",
)
WORDS = [[0], [1, 2]]
SIZE = (6, 10)  # of which a level is 3 × 5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=NAMES)
def name(request, one_thread):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return models.make(name)


@pytest.fixture(scope="module")
def unet(one_thread):
    return models.make("UNet3DConditionModel")


def capture(model, *arguments, **settings):
    return vk.capture_columns(model, *arguments, backend="reference", **settings)


@torch.no_grad()
def call(model, name, **changes):
    return models.call(model, name, **{"size": SIZE} | changes)


def expected_maps(model, name, frames=6, **changes):
    """The formula, from what the layers' projections make: (batch, frames, words, positions)."""
    hooks, seen, found = Hooks(), {}, {}
    for layer in cross_layers(model):
        for part in ("to_q", "to_k"):

            def keep(module, args, kwargs, output, key=(layer.name, part)):
                seen[key] = output

            hooks.after(getattr(layer.module, part), keep)
    call(model, name, frames=frames, **changes)
    hooks.remove()
    for layer in cross_layers(model):
        query, key = (
            seen[layer.name, part].unflatten(-1, (layer.module.heads, -1)).transpose(1, 2)
            for part in ("to_q", "to_k")
        )
        weights = (layer.module.scale * query @ key.mT).softmax(-1).mean(1)
        columns = torch.stack([weights[..., tokens].mean(-1) for tokens in WORDS], dim=1)
        found[layer.name] = columns.unflatten(0, (-1, frames))
    return found


def test_what_it_sees_and_that_it_leaves_no_trace(model, name):
    stock = call(model, name)
    expected = expected_maps(model, name)
    front_end = find_front_end(model)
    before = [front_end.get_attention(layer.module) for layer in cross_layers(model)]
    with capture(model, WORDS) as found:
        torch.testing.assert_close(call(model, name), stock, **CLOSE)
    assert {item.layer for item in found.maps} == set(expected)
    for item in found.maps:
        assert item.map.shape[:3] == (1, 6, 2)
        grid = (3, 5) if name.startswith("Latte") else SIZE
        assert (item.grid, item.map.shape[3:]) == (grid, level_size(grid, item.level))
        torch.testing.assert_close(item.map.flatten(-2), expected[item.layer], **CLOSE)
        assert not item.map.requires_grad
    assert torch.equal(call(model, name), stock)
    assert [front_end.get_attention(layer.module) for layer in cross_layers(model)] == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_only_the_half_with_the_prompt(model, name):
    if name == "lvdm":  # whose samplers call it for one side after the other
        with capture(model, WORDS) as found:
            call(model, name)
            first = found.mean()
            inputs = models.KINDS[name].inputs(models.noise(1, 4, 6, *SIZE))
            inputs["context"] = -inputs["context"]
            with torch.no_grad():
                model(**inputs, timesteps=torch.tensor([10]))
        assert torch.equal(found.mean(), first)
        assert {item.calls for item in found.maps} == {1}
        return
    twice = models.noise(1, 4, 6, *SIZE, seed=5).repeat(2, 1, 1, 1, 1)
    inputs = models.KINDS[name].inputs(twice)
    timestep = torch.tensor([3, 3])
    with torch.no_grad(), capture(model, WORDS) as halves:
        model(**inputs, timestep=timestep)
    with torch.no_grad(), capture(model, WORDS, guidance=False) as whole:
        model(**inputs, timestep=timestep)
    for half, both in zip(halves.maps, whole.maps, strict=True):
        torch.testing.assert_close(half.map, both.map[1:], **CLOSE)
    assert not torch.allclose(whole.maps[0].map[0], whole.maps[0].map[1], **CLOSE)


def test_weights_of_each_video(unet):
    """Weights of their own for each of the batch, and those of words: the same as their tokens."""
    name = "UNet3DConditionModel"
    weights = torch.tensor([[1.0, 0], [0, 0.5], [0, 0.5]])
    with capture(unet, WORDS) as words:
        call(unet, name, batch=2)
    with capture(unet, weights) as same:
        call(unet, name, batch=2)
    with capture(unet, torch.stack([weights, weights.flip(1)])) as own:
        call(unet, name, batch=2)
    assert torch.equal(same.mean(), words.mean())
    torch.testing.assert_close(own.mean()[0], words.mean()[0])
    torch.testing.assert_close(own.mean()[1], words.mean()[1].flip(1))
    with (
        capture(unet, torch.stack([weights, weights])),
        pytest.raises(ValueError, match="batch of 2"),
    ):
        call(unet, name)


def test_layers_and_means(unet):
    name = "UNet3DConditionModel"
    with capture(unet, WORDS) as every:
        call(unet, name)
    with capture(unet, WORDS, layers=lambda layer: layer.level == 1) as some:
        call(unet, name)
    assert {item.level for item in some.maps} == {1}
    torch.testing.assert_close(some.mean(), every.mean(level=1), **CLOSE)
    assert every.mean().shape == (1, 6, 2, 3, 5)
    assert every.mean(size=0).shape[3:] == SIZE
    assert every.mean(size=9).shape[3:] == (3, 5)  # the coarsest level
    assert every.mean(size=(2, 9)).shape[3:] == (2, 9)
    by_hand = [resize_maps(item.map, 3, 5) for item in every.maps if item.place == "down"]
    torch.testing.assert_close(every.mean(place="down"), sum(by_hand) / 2)
    with pytest.raises(ValueError, match=r"no map of step 3, level 1 .* steps None; levels 0, 1;"):
        every.mean(step=3, level=1)


def test_repeated_steps_are_averaged(unet):
    name = "UNet3DConditionModel"
    with capture(unet, WORDS) as found:
        found.step = 0
        call(unet, name)
        once = found.mean()
        call(unet, name)
        torch.testing.assert_close(found.mean(step=0), once)
        assert {item.calls for item in found.maps} == {2}
        with pytest.raises(ValueError, match=r"clear\(\) the capture"):
            call(unet, name, frames=3)
        found.clear()
        call(unet, name, frames=3)
    assert found.mean().shape[1] == 3


def test_steps(unet):
    name = "UNet3DConditionModel"
    stock = call(unet, name)
    with capture(unet, WORDS, steps=[2]) as found:
        with pytest.raises(
            ValueError, match="steps needs the step of each forward pass: give the scheduler="
        ):
            call(unet, name)
        found.step = 1
        assert torch.equal(call(unet, name), stock)  # not captured: the model's own attention
        found.step = 2
        call(unet, name)
    assert {item.step for item in found.maps} == {2}


@pytest.mark.parametrize("name", ["UNetMotionModel", "LatteTransformer3DModel"])
def test_gradients_flow_through_the_maps_also_under_checkpointing(name):
    model = models.make(name)
    sample = models.noise(1, 4, 6, 4, 8, seed=3)

    def gradient():
        leaf = sample.clone().requires_grad_()
        inputs = models.KINDS[name].inputs(leaf)
        with capture(model, WORDS, differentiable=True) as found:
            model(**inputs, timestep=torch.tensor([3]))
            loss = found.mean()[:, :, 0].square().sum()
            return torch.autograd.grad(loss, leaf)[0]

    expected = gradient()
    assert expected.abs().max() > 0
    model.enable_gradient_checkpointing()
    model.train()  # diffusers checkpoints in training only
    torch.testing.assert_close(gradient(), expected, **CLOSE)


def test_passes_of_a_method_are_nobodys_to_capture(unet):
    name = "UNet3DConditionModel"
    with capture(unet, WORDS) as columns, vk.capture_maps(unet) as maps, conditional_passes():
        call(unet, name)
    assert not columns.maps
    assert not maps.maps


def test_resizing():
    maps = torch.arange(24.0).view(1, 1, 1, 4, 6)
    torch.testing.assert_close(resize_maps(maps, 2, 3), F.avg_pool2d(maps[0, 0], 2)[None, None])
    assert torch.equal(resize_maps(maps, 4, 6), maps)
    up = F.interpolate(maps[0, 0][None], (8, 12), mode="bilinear")[0]
    torch.testing.assert_close(resize_maps(maps, 8, 12)[0, 0], up)
    mixed = resize_maps(maps, 8, 3)  # down one side, up the other
    assert mixed.shape == (1, 1, 1, 8, 3)
    assert mixed.mean() == pytest.approx(maps.mean().item())
    several = torch.rand(2, 3, 2, 2, 4, 6)
    for one in (several[0, 0, 0, 0], several[0, 0, 0], several[0, 0], several[0], several):
        found = resize_maps(one, 2, 9)
        assert found.shape == (*one.shape[:-2], 2, 9)
        expected = resize_maps(several, 2, 9)[(0,) * (several.ndim - one.ndim)]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("cat", TypeError, "lists of tokens or a tensor of weights, got str"),
        ([], ValueError, "at least one word, got none"),
        ([3], TypeError, r"columns\[0\] must be a list of tokens, got int"),
        ([[1], []], ValueError, r"columns\[1\] must be tokens, each once, got \[\]"),
        ([[1, 1]], ValueError, r"each once, got \[1, 1\]"),
        ([[-1]], ValueError, "indices of tokens, got -1"),
        ([[True]], ValueError, "indices of tokens, got True"),
        (torch.ones(3, 2).double(), ValueError, "float64 of shape"),
        (torch.ones(3), ValueError, r"float32 of shape \(3,\)"),
        (torch.full((3, 1), torch.nan), ValueError, "columns must be finite"),
    ],
)
def test_wrong_columns(unet, columns, error, message):
    with pytest.raises(error, match=message):
        capture(unet, columns)


def test_layers_by_level_and_by_name(unet):
    every = cross_layers(unet)
    name = next(layer.name for layer in every if layer.level == 0)
    with capture(unet, WORDS, layers=[1, name]) as found:
        call(unet, "UNet3DConditionModel")
    wanted = {layer.name for layer in every if layer.level == 1 or layer.name == name}
    assert {item.layer for item in found.maps} == wanted
    assert len(wanted) < len(every)


def test_what_it_refuses(unet):
    with pytest.raises(ValueError, match="conditioned on an image and has no text"):
        capture(models.make("UNetSpatioTemporalConditionModel"), WORDS)
    with pytest.raises(ValueError, match="layers chooses none"):
        capture(unet, WORDS, layers=lambda layer: layer.level == 5)
    for layers, error, message in (
        ("x", TypeError, "layers must be levels, names of layers, a callable .*, got str"),
        (1, TypeError, "layers must be levels, .*, got int"),
        ([True], TypeError, "got bool among them"),
        ([], ValueError, "layers names none"),
        ([0, 99], ValueError, r"layers names 99, .*: the levels are 0, 1, and .* down_blocks\.0"),
        (["attn2"], ValueError, "layers names 'attn2', which there is not"),
    ):
        with pytest.raises(error, match=message):
            capture(unet, WORDS, layers=layers)
    for steps in ("x", 1, ["a"]):
        with pytest.raises(TypeError, match="steps must be indices of denoising steps or None"):
            capture(unet, WORDS, steps=steps)
    with pytest.raises(ValueError, match=r"steps counts from 0, .* got -1"):
        capture(unet, WORDS, steps=[-1])
    with pytest.raises(TypeError, match="guidance must be True or False, got int"):
        capture(unet, WORDS, guidance=1)
    with (
        capture(unet, [[0], [3]]),
        pytest.raises(ValueError, match=r"of 4 tokens, and the text .* has 3"),
    ):
        call(unet, "UNet3DConditionModel")
    with capture(unet, WORDS), pytest.raises(ValueError, match="under capture_columns already"):
        capture(unet, WORDS)
    with (
        capture(unet, WORDS, guidance=True),
        pytest.raises(ValueError, match="an even batch, got 1"),
    ):
        call(unet, "UNet3DConditionModel")
    compiled = torch.compile(models.make("UNet3DConditionModel"), backend="eager")
    with pytest.raises(ValueError, match="compiled UNet3DConditionModel cannot be captured"):
        capture(compiled, WORDS)
    model = models.make("UNetMotionModel")
    module = cross_layers(model)[0].module
    module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, models.TEXT))
    with pytest.raises(ValueError, match="cannot be captured: it has an IPAdapterAttnProcessor2_0"):
        capture(model, WORDS)


def test_a_copy_of_a_captured_layer_is_stock(unet):
    layer = cross_layers(unet)[0].module
    with capture(unet, WORDS):
        assert type(layer.processor).__name__ == "ColumnAttnProcessor"
        assert type(copy.deepcopy(layer.processor)).__name__ == "AttnProcessor2_0"


def test_the_weights_of_words_are_float32_whatever_the_default_type():
    with default_dtype(torch.float64):
        weights = token_weights([[1], [2, 3]])
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 0.5]])
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)
