"""Draws the figures of docs/analysis.md: ``python -m docs.make_analysis_figures [folder]``.

From a tiny UNet with random weights and from drawn videos, so that nothing is downloaded: they show
what the functions draw, and nothing about any real model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import UNet3DConditionModel
from torch import Tensor

import vstar_kernels as vk
from examples import tiny

FRAMES, SIDE = 16, 48
FOLDER = Path(__file__).parent / "images"


def moving_square(pixels_per_frame: float) -> Tensor:
    """A white square on black that moves to the right, ``(frames, 3, height, width)``."""
    video = torch.zeros(FRAMES, 3, SIDE, SIDE)
    for frame in range(FRAMES):
        left = round(frame * pixels_per_frame)
        video[frame, :, 16:32, left : left + 16] = 1
    return video


def random_model() -> tuple[UNet3DConditionModel, dict[str, Tensor]]:
    """A UNet of three levels with sharp random attention, and its inputs."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D",) * 3,
        up_block_types=("CrossAttnUpBlock3D",) * 3,
    )
    unet.eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            parameter *= 3
    return unet, {"encoder_hidden_states": torch.randn(1, 4, 16)}


def main(folder: Path = FOLDER) -> None:
    """Draw them all."""
    folder.mkdir(parents=True, exist_ok=True)
    unet, inputs = random_model()
    scheduler = tiny.text_to_video().scheduler
    scheduler.set_timesteps(25)
    latents = torch.randn(1, 4, FRAMES, 16, 16, generator=torch.Generator().manual_seed(1))

    config = vk.TARConfig(sigma={0: 1.0, 1: 3.0}, strength=3.0)
    with vk.apply_tar(unet, config, scheduler=scheduler):
        real = vk.capture_real_maps(
            unet,
            latents,
            inputs,
            steps=[0, 13, 14, 24],
            scheduler=scheduler,
            layers=lambda layer: layer.level != "init",
        )
    videos = {"still": moving_square(0), "slow": moving_square(0.5), "fast": moving_square(2)}
    similarities = {name: vk.analysis.frame_similarity(video) for name, video in videos.items()}
    reference = vk.GaussianBias(1.0).matrix(FRAMES)
    found = vk.optimize_noise(
        unet,
        reference / reference.sum(-1, keepdim=True),
        tuple(latents.shape),
        inputs,
        scheduler=scheduler,
        iterations=25,
        learning_rate=0.03,
        generator=torch.Generator().manual_seed(0),
    )
    maps = vk.analysis.mean_maps(real, by=("level", "step"))
    figures = {
        "maps": vk.analysis.plot_maps(maps),
        "similarities": vk.analysis.plot_similarities(vk.analysis.normalize_jointly(similarities)),
        "losses": vk.analysis.plot_losses(found),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
