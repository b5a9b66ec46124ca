"""Fine-tunes a tiny UNet's temporal layers on drawn moving squares, with a loss on their maps.

VSTAR (arXiv 2403.13501, §5) suggests to regularize attention maps in training. The loss is that of
denoising plus a weight times how far the maps are from a Gaussian band. It takes less than a minute
on a CPU, and needs nothing downloaded.
"""

import argparse

import tiny
import torch
import torch.nn.functional as F

import vstar_kernels as vk

FRAMES, SIDE, BATCH = 8, 8, 2
SHOWN = 10  # lines of losses


def moving_squares(generator: torch.Generator) -> torch.Tensor:
    """Draws squares that move at some speed, as latents: ``(batch, 4, frames, side, side)``."""
    videos = -torch.ones(BATCH, 4, FRAMES, SIDE, SIDE)
    starts = torch.randint(SIDE, (BATCH, 2), generator=generator)
    speeds = torch.randint(-1, 2, (BATCH, 2), generator=generator)
    for video, start, speed in zip(videos, starts, speeds, strict=True):
        for frame in range(FRAMES):
            top, left = (start + frame * speed).tolist()
            rows = [(top + i) % SIDE for i in range(3)]
            columns = [(left + i) % SIDE for i in range(3)]
            video[:, frame, torch.tensor(rows)[:, None], torch.tensor(columns)] = 1
    return videos


def train(steps: int, weight: float, rate: float) -> list[float]:
    """Trains the temporal layers, and returns the loss of each step."""
    pipe = tiny.text_to_video()
    unet, scheduler = pipe.unet.eval().requires_grad_(False), pipe.scheduler
    with torch.no_grad():
        text = pipe.encode_prompt("a moving square", "cpu", 1, False)[0].expand(BATCH, -1, -1)
    trained = [
        parameter.requires_grad_()
        for name, parameter in unet.named_parameters()
        if "temp_attentions" in name
    ]
    adam = torch.optim.Adam(trained, lr=rate)
    delta = vk.GaussianBias(1.0).matrix(FRAMES)
    target = delta / delta.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        clean = moving_squares(generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (1,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, times.expand(BATCH))
        with vk.capture_maps(
            unet, layers=lambda layer: layer.level != "init", differentiable=True
        ) as capture:
            predicted = unet(noisy, times, encoder_hidden_states=text).sample
            maps = [vk.analysis.map_penalty(item.map, target) for item in capture.maps]
            penalty = torch.stack(maps).mean()
            loss = F.mse_loss(predicted, noise) + weight * penalty
            adam.zero_grad()
            loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
        if step % max(1, steps // SHOWN) == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.4f}, maps {float(penalty.detach()):.4f}")
    return losses


def main() -> None:
    """Trains and prints the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--weight", type=float, default=1.0, help="of the loss on the maps")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's learning rate")
    options = parser.parse_args()
    train(options.steps, options.weight, options.rate)


if __name__ == "__main__":
    main()
