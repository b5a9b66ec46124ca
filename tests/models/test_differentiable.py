"""Maps that keep their graph: ``capture_maps(…, differentiable=True)``."""

import pytest
import torch

import vstar_kernels as vk
from tests.models import models

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 4, 6, 8, 8)


@pytest.fixture
def unet(one_thread):
    return models.make("UNet3DConditionModel")


def run(unet, sample):
    text = models.noise(len(sample), models.TOKENS, models.TEXT, seed=1)
    return unet(sample, 10, encoder_hidden_states=text).sample


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_maps_are_the_same_with_a_graph(unet):
    sample = models.noise(*SHAPE).requires_grad_()
    with vk.capture_maps(unet) as plain:
        run(unet, sample)
    with vk.capture_maps(unet, differentiable=True) as capture:
        run(unet, sample)
    assert not any(item.map.requires_grad for item in plain.maps)
    for one, other in zip(capture.maps, plain.maps, strict=True):
        torch.testing.assert_close(one.map.detach(), other.map, rtol=0, atol=1e-6)
        gradient = torch.autograd.grad(one.map.square().sum(), sample, retain_graph=True)[0]
        assert gradient.abs().max() > 0
    assert not hooks(unet)


def test_without_gradients_it_keeps_no_graph_and_no_hooks(unet):
    with vk.capture_maps(unet, differentiable=True) as capture, torch.no_grad():
        run(unet, models.noise(*SHAPE))
    assert not any(item.map.requires_grad for item in capture.maps)
    assert not hooks(unet)


def test_repeated_calls_are_averaged_with_their_graphs(unet):
    samples = [models.noise(*SHAPE, seed=seed).requires_grad_() for seed in (0, 1)]
    with vk.capture_maps(unet, layers=lambda x: x.place == "mid", differentiable=True) as capture:
        for sample in samples:
            run(unet, sample)
        capture.maps[0].map.square().sum().backward()
    assert capture.maps[0].calls == 2
    assert all(sample.grad.abs().max() > 0 for sample in samples)
