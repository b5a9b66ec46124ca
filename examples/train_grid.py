"""Trains a tiny image UNet on videos as grid images (ETC), on drawn moving squares.

It is trained twice, with and without the mixed and the FPS embedding, through accelerate, so that
``accelerate launch`` runs it on several GPUs, with DeepSpeed where its configuration says so. Run
again with the same --output it goes on from the last checkpoint. The page in --output shows loss,
samples and the attention between frames. It takes less than two minutes on a CPU, and needs nothing
downloaded.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import vstar_kernels as vk
from vstar_kernels.analysis import from_grid, to_grid
from vstar_kernels.cli.page import data_uri, figure_uri, render

FRAMES, ROWS, SIDE = 4, 2, 8
BATCH, TEXT = 8, 8
VIDEO_FPS = 60
TEXTS = ("a still square", "squares", "a square moves right", "a square moves down")
SAMPLING_STEPS = 20
TIMES = (100, 500, 900)  # at which attention is looked at, of 1,000
WINDOW = 10  # steps that the loss is the mean of
CHECKPOINT = 100  # steps between checkpoints


def square(top: int, left: int) -> Tensor:
    """Draws a bright square on dark ground as latents, ``(4, SIDE, SIDE)``."""
    image = -torch.ones(4, SIDE, SIDE)
    rows = [(top + i) % SIDE for i in range(3)]
    columns = [(left + i) % SIDE for i in range(3)]
    image[:, torch.tensor(rows)[:, None], torch.tensor(columns)] = 1
    return image


def data(seed: int) -> vk.TripleData:
    """Returns clips of squares that move, a pixel every 4th of a source's frames, and of images."""
    places = list(itertools.product(range(SIDE), range(SIDE)))
    length = 4 * SIDE
    videos = [
        (
            torch.stack([square(i + t // 4 * down, j + t // 4 * right) for t in range(length)]),
            VIDEO_FPS,
            text,
        )
        for i, j in places
        for down, right, text in ((0, 1, TEXTS[2]), (1, 0, TEXTS[3]))
    ]
    images = torch.stack([square(i, j) for i, j in places])
    generator = torch.Generator().manual_seed(seed)
    return vk.TripleData(
        videos,
        [(images, TEXTS[1])],
        [(image, TEXTS[0]) for image in images],
        frames=FRAMES,
        weights=(4, 1, 1),
        generator=generator,
    )


def embed(texts: list[str]) -> Tensor:
    """Returns an embedding of each text, fixed and told apart, ``(batch, 1, TEXT)``."""
    return torch.eye(TEXT)[[TEXTS.index(text) for text in texts]][:, None]


class Trainee(nn.Module):
    """All that is trained, in one module: what wraps it sees every parameter used."""

    def __init__(self, with_embedding: bool) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=2 * SIDE,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
        )
        self.embedding = None
        if with_embedding:
            self.embedding = vk.GridEmbedding(fps=vk.FPSEmbedding.for_unet(self.unet))
        self.grid = vk.apply_grid(self.unet, FRAMES, rows=ROWS, embedding=self.embedding or False)

    def forward(self, scheduler: Any, latents: Tensor, text: Tensor, fps: Tensor) -> Tensor:
        speed = None if self.embedding is None else fps
        return vk.grid_loss(self.unet, scheduler, latents, text, speed)


class Trained(NamedTuple):
    """What came of a training."""

    name: str
    losses: list[float]
    untrained: Tensor  # maps between frames, (heads, FRAMES, FRAMES), before the training
    maps: Tensor  # and after it
    samples: Tensor  # (texts, FRAMES, SIDE, SIDE), −1 to 1


def structure(maps: Tensor) -> Tensor:
    """Returns how far each map between frames is from the same attention for all."""
    return (maps - 1 / FRAMES).abs().sum(-1).mean(-1) / 2


def train(with_embedding: bool, options: argparse.Namespace, folder: Path) -> Trained:
    """Trains one model, from its last checkpoint on where there is one."""
    set_seed(options.seed)
    accelerator = Accelerator(cpu=options.device == "cpu")
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    trainee = Trainee(with_embedding)
    adam = torch.optim.AdamW(
        trainee.parameters(), lr=options.rate, betas=(0.9, 0.9), weight_decay=0.03
    )
    untrained = frame_maps(trainee.to(accelerator.device), scheduler, accelerator.device)
    # Every process has clips, noise and timesteps of its own, and the weights of all.
    seed = options.seed + 1000 * accelerator.process_index
    # A generator of its own, as a loader draws from the global one whenever it begins.
    loader = torch.utils.data.DataLoader(data(seed), batch_size=BATCH, generator=torch.Generator())
    model, adam = accelerator.prepare(trainee, adam)
    if not accelerator.is_main_process:
        set_seed(seed)
    log, losses = folder / "losses.json", []
    if log.exists():
        accelerator.load_state(str(folder / "checkpoint"))
        losses = json.loads(log.read_text())
        accelerator.print(f"{folder.name}: goes on after step {len(losses)}")
    clips = itertools.islice(loader, len(losses), options.steps)  # as without an interruption
    steps = range(len(losses), options.steps)
    bar = tqdm(
        zip(steps, clips, strict=False),
        total=len(steps),
        desc=folder.name,
        disable=not accelerator.is_main_process,
    )
    for step, (latents, texts, fps) in bar:
        latents, text = latents.to(accelerator.device), embed(texts).to(accelerator.device)
        loss = model(scheduler, latents, text, fps)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if (step + 1) % CHECKPOINT == 0 or step + 1 == options.steps:
            accelerator.save_state(str(folder / "checkpoint"))
            if accelerator.is_main_process:
                log.write_text(json.dumps(losses))
    trainee = accelerator.unwrap_model(model).eval()
    if trainee.embedding is not None and accelerator.is_main_process:
        trainee.embedding.save(folder / "embedding.safetensors")
    maps = frame_maps(trainee, scheduler, accelerator.device)
    samples = sample(trainee, scheduler, accelerator.device)
    return Trained(folder.name, losses, untrained, maps, samples)


@torch.no_grad()
def frame_maps(trainee: Trainee, scheduler: Any, device: torch.device) -> Tensor:
    """Returns each head's mean map between the frames of clips that are in no training.

    They are of all layers and of a few noise levels: ``(layers · levels · heads, FRAMES, FRAMES)``.
    """
    loader = torch.utils.data.DataLoader(data(1), batch_size=16, generator=torch.Generator())
    latents, texts, fps = next(iter(loader))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    if trainee.embedding is not None:
        trainee.grid.fps = fps
    found = []
    for time in TIMES:
        noisy = scheduler.add_noise(latents, noise, torch.full((len(fps),), time))
        with vk.capture_maps(trainee.unet, map_heads=True) as capture:
            trainee.unet(
                to_grid(noisy, ROWS, FRAMES // ROWS).to(device), time, embed(texts).to(device)
            )
        found += [item.heads[..., :-1].mean(0) for item in capture.maps]
    trainee.grid.fps = None
    return torch.cat(found)


@torch.no_grad()
def sample(trainee: Trainee, scheduler: Any, device: torch.device) -> Tensor:
    """Samples a video for each text."""
    # Every text's own kind of clip: one image, different ones, and two of videos.
    if trainee.embedding is not None:
        trainee.grid.fps = torch.tensor([120.0, 0.0, 15.0, 15.0])
    scheduler.set_timesteps(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(0)
    size = (len(TEXTS), 4, ROWS * SIDE, FRAMES // ROWS * SIDE)
    latents, text = torch.randn(size, generator=generator).to(device), embed(list(TEXTS))
    for time in scheduler.timesteps:
        predicted = trainee.unet(latents, time, text.to(device)).sample
        latents = scheduler.step(predicted, time, latents).prev_sample
    trainee.grid.fps = None
    return from_grid(latents, ROWS, FRAMES // ROWS)[:, :, 0].cpu()


def strip(video: Tensor, zoom: int = 6) -> str:
    """Returns frames side by side as a picture's data URI."""
    pixels = nn.functional.pad(video, (1, 1, 1, 1), value=0.0)
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).byte()
    wide = torch.cat(list(pixels), dim=1)
    image = Image.fromarray(wide.numpy()).resize(
        (wide.shape[1] * zoom, wide.shape[0] * zoom), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return data_uri(buffer.getvalue(), "png")


def smooth(losses: list[float]) -> list[float]:
    """Returns the mean of the last few losses at each step."""
    return [
        sum(losses[max(0, i + 1 - WINDOW) : i + 1]) / min(i + 1, WINDOW) for i in range(len(losses))
    ]


def write_page(path: Path, trained: list[Trained], steps: int) -> None:
    """Writes the page with losses, maps and samples."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for item in trained:
        axes.plot(smooth(item.losses), label=item.name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    maps = vk.analysis.plot_frame_maps(
        {
            item.name: nn.functional.pad(item.maps[structure(item.maps).argmax()], (0, 1))
            for item in trained
        }
    )
    rows = [
        {
            "name": item.name,
            "first": f"{smooth(item.losses)[min(WINDOW, len(item.losses)) - 1]:.3f}",
            "last": f"{smooth(item.losses)[-1]:.3f}",
            "before": f"{structure(item.untrained).mean():.3f}",
            "structure": f"{structure(item.maps).mean():.3f}",
        }
        for item in trained
    ]
    samples = [
        {"name": f"{text}, {item.name}", "image": strip(video)}
        for item in trained
        for text, video in zip(TEXTS, item.samples, strict=True)
    ]
    page = render(
        "train_grid.html",
        Path(__file__).parent,
        frames=FRAMES,
        steps=steps,
        window=WINDOW,
        losses=figure_uri(figure),
        maps=figure_uri(maps),
        rows=rows,
        samples=samples,
    )
    plt.close(figure)
    path.write_text(page, encoding="utf-8")


def main() -> None:
    """Trains both models and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("vstar-grid"), help="a folder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    trained = []
    for with_embedding in (True, False):
        folder = options.output / ("with embeddings" if with_embedding else "without embeddings")
        folder.mkdir(parents=True, exist_ok=True)
        trained.append(train(with_embedding, options, folder))
    write_page(options.output / "index.html", trained, options.steps)
    for item in trained:
        first = sum(item.losses[:WINDOW]) / len(item.losses[:WINDOW])
        last = smooth(item.losses)[-1]
        before, after = (float(structure(x).mean()) for x in (item.untrained, item.maps))
        print(f"{item.name}: loss {first:.4f} to {last:.4f}, structure {before:.4f} to {after:.4f}")
    print(options.output / "index.html")


if __name__ == "__main__":
    main()
