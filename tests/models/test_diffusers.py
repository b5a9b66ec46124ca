import copy

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tests.models import eager
from vstar_kernels.models.attention_processor import TARAttnProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, HEAD_DIM = 4, 16
CHANNELS = HEADS * HEAD_DIM


def make_attention(**changes):
    torch.manual_seed(0)
    settings = {"query_dim": CHANNELS, "heads": HEADS, "dim_head": HEAD_DIM}
    return Attention(**settings | changes).eval().requires_grad_(False)


def expected(attn, hidden, sigma, strength):
    """The module with TAR in float64."""
    exact = copy.deepcopy(attn).double()
    delta = eager.gaussian(sigma, hidden.shape[1])
    return eager.attention(exact, hidden.double(), delta, strength)


@pytest.mark.parametrize("frames", [1, 7, 32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"residual_connection": True, "rescale_output_factor": 2.0},
        {"upcast_attention": True, "upcast_softmax": True},
    ],
    ids=["plain", "bias", "residual", "upcast"],
)
def test_without_a_bias_it_is_diffusers_own_attention(changes, frames):
    attn = make_attention(**changes)
    hidden = torch.randn(6, frames, CHANNELS)
    attn.set_processor(AttnProcessor2_0())
    stock = attn(hidden)
    for bias in (None, vk.GaussianBias(1.0, strength=0.0)):
        attn.set_processor(TARAttnProcessor(bias))
        torch.testing.assert_close(attn(hidden), stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "frames"), [(1, 5), (4, 5), (1, 17), (4, 17)])
def test_with_a_bias_it_is_the_formula(rows, frames):
    attn = make_attention()
    hidden = 3 * torch.randn(rows, frames, CHANNELS)
    attn.set_processor(TARAttnProcessor(vk.GaussianBias(2.0, strength=1.5)))
    torch.testing.assert_close(
        attn(hidden).double(), expected(attn, hidden, sigma=2.0, strength=1.5), rtol=0, atol=2e-5
    )


def test_unscaled_logits_are_honoured():
    attn = make_attention(scale_qk=False)
    hidden = torch.randn(2, 9, CHANNELS)
    stock = attn(hidden)  # its own AttnProcessor, which AttnProcessor2_0 cannot replace
    attn.set_processor(TARAttnProcessor(None))
    torch.testing.assert_close(attn(hidden), stock, rtol=1e-5, atol=1e-6)


def test_the_named_backend_runs():
    attn = make_attention()
    attn.set_processor(TARAttnProcessor(vk.GaussianBias(1.0), backend="no such backend"))
    with pytest.raises(ValueError, match="no such backend"):
        attn(torch.randn(1, 4, CHANNELS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 4}, "group_norm"),
        ({"spatial_norm_dim": 8}, "spatial_norm"),
        ({"qk_norm": "layer_norm"}, "norm_q.*norm_k"),
        ({"added_kv_proj_dim": 8}, "added_kv_proj_dim"),
        ({"kv_heads": 1}, "fewer key and value heads"),
        ({"is_causal": True}, "causal"),
        ({"pre_only": True}, "pre_only"),
    ],
)
def test_modules_it_would_compute_wrongly_are_refused(changes, message):
    attn = make_attention(**changes, processor=TARAttnProcessor(None))
    with pytest.raises(ValueError, match=message):
        attn(torch.randn(2, 4, CHANNELS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 9, CHANNELS)}, r"cross-attention.*\(2, 9, 64\)"),
        ({"encoder_hidden_states": torch.zeros(2, 4, CHANNELS)}, "cross-attention"),
        ({"attention_mask": torch.zeros(2, 1, 4)}, "attention_mask"),
    ],
    ids=["other shape", "other tensor", "mask"],
)
def test_calls_it_would_compute_wrongly_are_refused(call, message):
    attn = make_attention(processor=TARAttnProcessor(None))
    with pytest.raises(ValueError, match=message):
        attn(torch.zeros(2, 4, CHANNELS), **call)


def test_images_are_refused():
    attn = make_attention(processor=TARAttnProcessor(None))
    with pytest.raises(ValueError, match=r"\(rows, frames, channels\), got shape \(2, 64, 4, 4\)"):
        attn(torch.zeros(2, CHANNELS, 4, 4))


@pytest.mark.parametrize("override", ["identity", "uniform"])
def test_replaced_maps(override):
    attn = make_attention(residual_connection=True)
    hidden = torch.randn(2, 5, CHANNELS)
    attn.set_processor(TARAttnProcessor(override=override))
    value = attn.to_v(hidden)
    if override == "uniform":
        value = value.mean(1, keepdim=True).expand_as(value)
    torch.testing.assert_close(attn(hidden), attn.to_out[0](value) + hidden)
