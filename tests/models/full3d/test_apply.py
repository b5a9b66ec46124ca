"""``apply_frames`` on whole models."""

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel

apply_frames = vk.apply_frames

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 5, 8, 12),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def test_a_rule_is_on_and_comes_off(wan, inputs):
    stock = wan(**inputs).sample
    with apply_frames(wan, vk.FrameRule.tar(1.0, strength=0.0)):
        torch.testing.assert_close(wan(**inputs).sample, stock, rtol=0, atol=5e-7)
    with apply_frames(wan, vk.FrameRule.tar(1.0)):
        assert (wan(**inputs).sample - stock).abs().max() > 1e-3
    assert torch.equal(wan(**inputs).sample, stock)
