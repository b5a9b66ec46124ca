"""VSTAR's eq. 6 in miniature: latents are optimised until attention maps match reference maps."""

import pytest
import torch

import vstar_kernels as vk
from tests.models.models import make, text
from vstar_kernels.attention import cpu
from vstar_kernels.models.front_end import temporal_layers

FRAMES = 6
BIAS = vk.GaussianBias(1.0)


class MapProcessor:
    """TAR whose mean map stays in the graph."""

    def __init__(self, backend):
        self.backend = backend
        self.map = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).unsqueeze(0)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out, self.map = vk.tar_attention(
            q, k, v, BIAS, scale=attn.scale, return_map=True, backend=self.backend
        )
        return attn.to_out[0](out[0].flatten(-2))


def optimise(model, latents, reference_maps, backend, steps=5):
    """Gradient descent on Σ ‖A_ref − A‖²; the loss at each step."""
    processors = [MapProcessor(backend) for _ in temporal_layers(model)]
    for layer, processor in zip(temporal_layers(model), processors, strict=True):
        layer.module.set_processor(processor)
    latents = latents.clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=0.05)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        model(latents, 10, text(latents))
        pairs = zip(processors, reference_maps, strict=True)
        loss = sum((processor.map - wanted).square().sum() for processor, wanted in pairs)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_the_loss_falls_as_with_the_reference(isa, monkeypatch):
    calls = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: calls.append(args) or backward(*args))
    torch.manual_seed(0)
    model = make("UNet3DConditionModel").requires_grad_(False)
    latents = torch.randn(1, 4, FRAMES, 8, 8)
    wanted = BIAS.matrix(FRAMES).softmax(-1)
    reference_maps = [wanted[None]] * len(temporal_layers(model))
    losses = optimise(model, latents, reference_maps, "cpu")
    assert calls
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(optimise(model, latents, reference_maps, "reference"), rel=1e-3)
