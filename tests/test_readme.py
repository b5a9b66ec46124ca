"""What the README shows runs."""

import re
import shlex
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import vstar_kernels as vk

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_usage(blocks):
    names = {}
    exec(blocks[0], names)
    assert names["mean_map"].shape == (2048, 16, 16)
    exec(blocks[1], names)
    assert names["frame_map"].shape == (1, 8, 9)
    exec(blocks[2], names)
    assert names["maps"].shape == (16, 640, 2)


def test_diffusers(blocks, capsys):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 64),
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
    )

    class Pipeline:
        """One step on latents that are 64 wide."""

        scheduler = diffusers.DDIMScheduler()
        components: ClassVar = {"unet": unet, "scheduler": scheduler}

        @torch.no_grad()
        def __call__(self, prompt, num_frames):
            self.scheduler.set_timesteps(25)
            sample, text = torch.randn(1, 4, num_frames, 4, 64), torch.randn(1, 3, 8)
            self.frames = unet(sample, self.scheduler.timesteps[0], text).sample
            return self

    exec(blocks[3], {"pipe": Pipeline(), "vk": vk})
    assert "level 1 (width 32), σ = 8, strength 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "generate", "study"])
def test_commands_are_understood(command, monkeypatch, tmp_path):
    """The commands that the page shows, up to where they would load a model."""
    pytest.importorskip("tyro")
    from vstar_kernels.cli.demo.command import DemoOptions
    from vstar_kernels.cli.generate.command import Generate
    from vstar_kernels.cli.main import main
    from vstar_kernels.cli.study.command import Study

    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(rf"vstar-kernels {command} (-.*|\S+ -.*)", text)
    shown += re.findall(rf'make {command} ARGS="(.*?)"', text)
    assert shown
    monkeypatch.chdir(tmp_path)  # where nothing is in the way of --output
    ran = []
    for options in (DemoOptions, Generate, Study):
        monkeypatch.setattr(options, "run", lambda self: ran.append(self) or 0)
    for line in shown:
        assert main([command, *shlex.split(line, comments=True)]) == 0
    assert len(ran) == len(shown)
