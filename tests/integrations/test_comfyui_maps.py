"""VSTAR Capture Maps, Show Maps and Show Similarity."""

import pytest
import torch

import vstar_kernels as vk
from tests.integrations import comfy
from tests.integrations.conftest import FRAMES
from tests.integrations.test_comfyui_tar import ALWAYS, is_plain, latents
from tests.models import eager
from vstar_kernels.models.front_end import temporal_layers

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMAS = [4.0, 3.0, 2.0, 1.0, 0.0]


def expected_maps(unet, model, sigma=None, **call):
    """Returns the mean maps of the layers of one call, in float64, seen by hooks of our own."""
    seen = []

    def keep(module, args, output):
        seen.append(output)

    layers = temporal_layers(unet)
    hooks = [p.register_forward_hook(keep) for x in layers for p in (x.module.to_q, x.module.to_k)]
    model.call(latents(), 1.0, [1.0, 0.0], FRAMES, **call)
    for hook in hooks:
        hook.remove()
    maps = []
    for query, key in zip(seen[::2], seen[1::2], strict=True):
        q, k = (x.double().unflatten(-1, (comfy.HEADS, -1)).transpose(1, 2) for x in (query, key))
        logits = q @ k.mT / comfy.DIM_HEAD**0.5
        if sigma is not None:
            logits += logits.amax(-1, keepdim=True) * eager.gaussian(sigma, FRAMES)
        sides = len(call.get("sides", (1, 0)))
        maps.append(logits.softmax(-1).mean(1).unflatten(0, (sides, -1)).mean(1).float())
    return maps


def test_the_maps_are_those_of_what_runs(run, unet):
    model = comfy.ModelPatcher(unet)
    first, maps = run("VSTARCaptureMaps", model=model, steps="")
    plain = model.sample(latents(), [1, 0], frames=FRAMES)[0]
    assert torch.equal(first.sample(latents(), [1, 0], frames=FRAMES)[0], plain)
    for found, expected in zip(maps.maps, expected_maps(unet, model), strict=True):
        torch.testing.assert_close(found.map, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_under_tar_they_are_the_changed_ones(run, unet, order):
    model = comfy.ModelPatcher(unet)
    settings = {"sigma_level_0": 1.0, "sigma_level_1": 1.0, **ALWAYS}
    (tar,) = run("VSTARApplyTAR", model=model, **settings)
    if order == "before":
        both, maps = run("VSTARCaptureMaps", model=model, steps="0")
        (both,) = run("VSTARApplyTAR", model=both, **settings)
    else:
        both, maps = run("VSTARCaptureMaps", model=tar, steps="0")
    on = tar.call(latents(), 1.0, [1.0, 0.0], FRAMES)
    assert torch.equal(both.call(latents(), 1.0, [1.0, 0.0], FRAMES), on)
    expected = expected_maps(unet, tar, 1.0)
    for found, map_ in zip(maps.maps, expected, strict=True):
        torch.testing.assert_close(found.map, map_, rtol=1e-4, atol=1e-5)
    assert is_plain(unet)


def test_steps_and_levels_are_chosen_and_runs_kept_apart(run, unet):
    model, maps = run(
        "VSTARCaptureMaps", model=comfy.ModelPatcher(unet), steps="0, 2-3", levels="1"
    )
    for _ in range(2):
        model.sample(latents(), SIGMAS, frames=FRAMES)
        assert {(found.step, found.level) for found in maps.maps} == {(0, 1), (2, 1), (3, 1)}
        assert {found.calls for found in maps.maps} == {1}


def test_sides_of_guidance_that_are_called_one_by_one_are_kept_apart(run, unet):
    model, maps = run("VSTARCaptureMaps", model=comfy.ModelPatcher(unet), steps="")
    for side in (0, 1):
        model.call(latents(), 1.0, [1.0, 0.0], FRAMES, sides=(side,))
    assert {(found.branch, len(found.map)) for found in maps.maps} == {(0, 1), (1, 1)}


def test_a_call_that_fails_leaves_no_hook(run, unet, monkeypatch):
    model, maps = run("VSTARCaptureMaps", model=comfy.ModelPatcher(unet), steps="")

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(unet.output_blocks[1], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.sample(latents(), SIGMAS, frames=FRAMES)
    monkeypatch.undo()
    assert not maps.maps
    assert is_plain(unet)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": "1.5"}, r"steps must be numbers from 0, such as '0, 13' or '0-9', got '1.5'"),
        ({"levels": "-1"}, "levels must be numbers"),
        ({"steps": "", "levels": "7"}, "no temporal attention has level 7: the levels are 0, 1"),
    ],
)
def test_what_cannot_be_captured_is_an_error(run, unet, inputs, message):
    def capture():
        model, _ = run("VSTARCaptureMaps", model=comfy.ModelPatcher(unet), **inputs)
        model.sample(latents(), SIGMAS, frames=FRAMES)

    with pytest.raises(ValueError, match=message):
        capture()


def test_maps_are_shown(run, unet):
    pytest.importorskip("matplotlib")
    model, maps = run("VSTARCaptureMaps", model=comfy.ModelPatcher(unet), steps="0")
    with pytest.raises(ValueError, match="there are no maps: sample the model"):
        run("VSTARShowMaps", maps=maps, latent={})
    model.sample(latents(), SIGMAS, frames=FRAMES)
    (image,) = run("VSTARShowMaps", maps=maps, latent={})
    assert image.ndim == 4
    assert image.shape[0] == 1
    assert image.shape[-1] == 3
    assert 0 <= image.min() < image.max() <= 1


def test_similarities_are_shown(run):
    pytest.importorskip("matplotlib")
    video = torch.rand(5, 12, 12, 4)  # with an alpha channel
    (one,) = run("VSTARShowSimilarity", frames=video)
    (two,) = run(
        "VSTARShowSimilarity", frames=video, other=torch.rand(5, 12, 12, 3), embedder="ssim"
    )
    assert two.shape[2] > one.shape[2]


def test_nothing_of_the_library_is_changed_by_a_capture(run, unet):
    """``capture_maps`` of the library goes on as before, on the same UNet."""
    model, maps = run("VSTARCaptureMaps", model=comfy.ModelPatcher(unet), steps="")
    with vk.capture_maps(unet) as capture:
        model.sample(latents(), [1, 0], frames=FRAMES)
    pairs = zip(capture.maps, maps.maps, strict=True)
    assert all(torch.equal(one.map, other.map) for one, other in pairs)
