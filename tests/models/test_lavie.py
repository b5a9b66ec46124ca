"""LaVie's base model, by a small one with its names and calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vstar_kernels as vk
from tests.models import eager
from tests.models.lavie_model import RotaryEmbedding, TemporalAttention
from tests.models.models import TEXT, TOKENS, call, make, noise
from vstar_kernels.models.front_end import cross_layers, temporal_layers
from vstar_kernels.models.lavie import LavieTARForward, logit_factors

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FRAMES = 6


@pytest.fixture
def model():
    return make("LaVie")


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return TemporalAttention(16, RotaryEmbedding(4)).requires_grad_(False)


@pytest.mark.parametrize("frames", [1, FRAMES, 40])
def test_strength_zero_is_the_models_own_attention(model, frames):
    sizes = {"batch": 2, "frames": frames, "size": (4, 6)}
    stock = call(model, "LaVie", **sizes)
    with vk.apply_tar(model, vk.TARConfig({0: 1.0, 1: 2.0}, strength=0.0, steps=None)):
        torch.testing.assert_close(call(model, "LaVie", **sizes), stock, **CLOSE)
    with vk.apply_tar(model, vk.TARConfig({0: 1.0, 1: 2.0}, steps=None)):
        changed = call(model, "LaVie", **sizes)
    assert torch.equal(call(model, "LaVie", **sizes), stock)
    assert all("forward" not in vars(layer.module) for layer in temporal_layers(model))
    assert (changed - stock).abs().max() > (1e-3 if frames > 1 else -1)


def test_presets_go_by_the_latents_width(model):
    oracle = make("LaVie")
    with vk.apply_tar(model, "12D1_6D8", scheduler=None) as handle:
        handle.step = 0
        found = call(model, "LaVie", size=(5, 12))
        layers = handle.layers
        assert {(x.level, x.width, x.sigma) for x in layers} == {(0, 12, 1.0), (1, 6, 8.0)}
    for level, sigma in ((0, 1.0), (1, 8.0)):
        eager.put_in(oracle, [x.name for x in layers if x.level == level], sigma=sigma)
    torch.testing.assert_close(found, call(oracle, "LaVie", size=(5, 12)), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_positions_are_in_the_logits_as_exactly_as_in_the_models_own(attention, dtype):
    attention = attention.to(dtype)
    query, key = (noise(3, FRAMES, 2, 8, seed=i).to(dtype) for i in (1, 2))
    q, k, scale = logit_factors(attention, query, key)
    assert scale == 1.0
    assert q.dtype == k.dtype == dtype
    found = q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    rotate = attention.rotary_emb.rotate_queries_or_keys
    expected = rotate((attention.scale * query).transpose(1, 2)).double()
    expected = expected @ rotate(key.transpose(1, 2)).double().mT
    expected += attention.time_rel_pos_bias(FRAMES, device=query.device).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_upcast_attention_is_in_float32(attention):
    attention = attention.bfloat16()
    attention.upcast_attention = True
    x = noise(3, FRAMES, 16).bfloat16()
    forward = LavieTARForward(attention)
    with torch.no_grad():
        out = forward(x)
    assert out.dtype == torch.bfloat16
    query, key = (p(x).unflatten(-1, (2, -1)) for p in (attention.to_q, attention.to_k))
    assert logit_factors(attention, query, key)[0].dtype == torch.float32


def test_the_positions_have_gradients():
    attention = TemporalAttention(16, RotaryEmbedding(4))
    LavieTARForward(attention)(noise(2, FRAMES, 16)).square().sum().backward()
    assert attention.time_rel_pos_bias.relative_attention_bias.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 3, 16)}, r"cross-attention \(context of shape"),
        ({"attention_mask": torch.ones(2, 4, 4)}, r"a mask, got shape \(2, 4, 4\)"),
    ],
)
def test_calls_it_would_compute_wrongly_are_refused(attention, arguments, message):
    with pytest.raises(ValueError, match=message):
        LavieTARForward(attention)(torch.zeros(2, 4, 16), **arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_slice_size", 2, "attention slicing"),
        ("_use_memory_efficient_attention_xformers", True, "xformers in attn_temp"),
        ("group_norm", nn.GroupNorm(1, 16), "an attention module with group_norm"),
    ],
)
def test_modules_it_would_compute_wrongly_are_refused(attention, name, value, message):
    setattr(attention, name, value)
    with pytest.raises(ValueError, match=f"TAR in TemporalAttention does not support {message}"):
        LavieTARForward(attention)(torch.zeros(2, 4, 16))


def test_an_attn_temp_of_another_kind_is_not_known(model):
    """LaVie's interpolation model has one, whose positions are not these."""
    for layer in temporal_layers(model):
        del layer.module.time_rel_pos_bias
    with pytest.raises(ValueError, match="UNet3DConditionModel has no temporal self-attention"):
        vk.apply_tar(model, vk.TARConfig(1.0))


@pytest.mark.parametrize("guided", [False, True])
def test_each_frame_has_its_text(model, guided):
    batch = 1 + guided
    sample, text = noise(batch, 4, FRAMES, 4, 4), noise(batch, TOKENS, TEXT, seed=1)
    embeddings = noise(FRAMES, TOKENS, TEXT, seed=2)
    with torch.no_grad(), vk.condition_frames(model, embeddings):
        found = model(sample, 10, encoder_hidden_states=text).sample

    def replace(block, args, kwargs):
        assert len(kwargs["encoder_hidden_states"]) == batch * FRAMES
        rows = [text[0].expand(FRAMES, -1, -1)] * guided + [embeddings]
        return args, {**kwargs, "encoder_hidden_states": torch.cat(rows)}

    with torch.no_grad():
        stock = model(sample, 10, encoder_hidden_states=text).sample
        for layer in cross_layers(model):
            block = model.get_submodule(layer.name.rpartition(".")[0])
            block.register_forward_pre_hook(replace, with_kwargs=True)
        expected = model(sample, 10, encoder_hidden_states=text).sample
    assert torch.equal(found, expected)
    assert (found - stock).abs().max() > 1e-3


def test_the_text_of_all_frames_is_the_prompts(model):
    sample, text = noise(1, 4, FRAMES, 4, 4), noise(1, TOKENS, TEXT, seed=1)
    with torch.no_grad():
        stock = model(sample, 10, encoder_hidden_states=text).sample
        with vk.condition_frames(model, text.expand(FRAMES, -1, -1)):
            found = model(sample, 10, encoder_hidden_states=torch.zeros_like(text)).sample
    torch.testing.assert_close(found, stock, **CLOSE)


def test_a_pipelines_scheduler_gates(model):
    """LaVie's pipeline is one of diffusers', with the model as its ``unet``."""
    diffusers = pytest.importorskip("diffusers")

    class Pipeline:
        def __init__(self, unet):
            self.unet, self.scheduler = unet, diffusers.DDIMScheduler()
            self.components = {"unet": unet, "scheduler": self.scheduler}

    pipe = Pipeline(model)
    pipe.scheduler.set_timesteps(10)
    times = [int(t) for t in pipe.scheduler.timesteps]
    stock = [call(model, "LaVie", timestep=t) for t in times[:2]]
    with vk.apply_tar(pipe, vk.TARConfig(1.0, steps=0)), vk.capture_maps(pipe, steps=[0]) as maps:
        on, off = (call(model, "LaVie", timestep=t) for t in times[:2])
    assert (on - stock[0]).abs().max() > 1e-3
    torch.testing.assert_close(off, stock[1], **CLOSE)
    assert {item.step for item in maps.maps} == {0}
    assert F.relu(maps.mean(level=0)).sum(-1).allclose(torch.ones(1, FRAMES))
