"""What the README shows runs."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_usage(blocks):
    names = {}
    exec(blocks[0], names)
    assert names["mean_map"].shape == (2048, 16, 16)


def test_diffusers(blocks):
    diffusers = pytest.importorskip("diffusers")
    from vstar_kernels.processors.diffusers import TARAttnProcessor

    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 64),
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
    )
    import vstar_kernels as vk

    exec(blocks[1], {"unet": unet, "vk": vk, "torch": torch})
    ours = [
        m for m in unet.modules() if isinstance(getattr(m, "processor", None), TARAttnProcessor)
    ]
    assert ours
