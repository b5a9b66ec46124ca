"""``python -m benchmarks.permute_copies``: what reordering costs around temporal attention.

diffusers' temporal transformers get ``(batch · frames, channels, height, width)`` and attend over
``(batch · height · width, frames, channels)``. Each copies its activations three times for that:
for the group norm, to rows of frames, and back. This measures the share of a forward pass of
``UNet3DConditionModel`` and ``UNetMotionModel``, with random weights, that goes into those copies:
the same permutes, on tensors of the shapes that hooks see in the forward pass, timed in turn with
the whole forward; medians. Prints a Markdown table.

Timed by themselves, small copies find their input in the cache: take the share as a lower bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vstar_kernels as vk
from benchmarks.models import TEXT_TOKENS, motion, unet3d
from vstar_kernels.cli.demo.measure import now
from vstar_kernels.models.hooks import Argument

PIXELS_PER_LATENT = 8
TRANSFORMERS = ("TransformerTemporalModel", "AnimateDiffTransformer3D")


@dataclass(frozen=True)
class Shape:
    """What a temporal transformer is given: ``(batch · frames, channels, height, width)``."""

    batch: int
    frames: int
    channels: int
    height: int
    width: int


def to_norm(x: Tensor, shape: Shape) -> Tensor:
    """``(batch, channels, frames, height, width)``, which the group norm makes contiguous."""
    return x.unflatten(0, (shape.batch, shape.frames)).permute(0, 2, 1, 3, 4).contiguous()


def to_rows(normed: Tensor) -> Tensor:
    """``(batch · height · width, frames, channels)``, from what the group norm returns."""
    return normed.permute(0, 3, 4, 2, 1).flatten(0, 2)


def to_frames(rows: Tensor, shape: Shape) -> Tensor:
    """Back to ``(batch · frames, channels, height, width)``."""
    grid = rows.unflatten(0, (shape.batch, shape.height, shape.width))
    return grid.permute(0, 3, 4, 1, 2).contiguous().flatten(0, 1)


MODELS: dict[str, Callable[[int], Any]] = {"unet3d": unet3d, "motion": motion}


def make_forward(model: Any, args: argparse.Namespace) -> Callable[[], object]:
    """A call of the model with random latents and text."""
    options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    height, width = (pixels // PIXELS_PER_LATENT for pixels in args.size)
    latents = torch.randn(args.batch, 4, args.frames, height, width, **options)
    repeats = args.frames if type(model).__name__ == "UNetMotionModel" else 1
    channels = model.config.cross_attention_dim
    text = torch.randn(args.batch * repeats, TEXT_TOKENS, channels, **options)
    return lambda: model(latents, 500, encoder_hidden_states=text)


def find_shapes(model: nn.Module, forward: Callable[[], object]) -> Counter[Shape]:
    """What the temporal transformers are given in a forward pass, and how many of them."""
    shapes: Counter[Shape] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = Argument(module, "hidden_states").get(args, kwargs)
        frames = Argument(module, "num_frames").get(args, kwargs)
        shapes[Shape(len(x) // frames, frames, *x.shape[1:])] += 1

    hooks = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ in TRANSFORMERS
    ]
    forward()
    for handle in hooks:
        handle.remove()
    return shapes


class Copies:
    """The three copies of a temporal transformer, on tensors of its own."""

    def __init__(self, shape: Shape, options: dict[str, Any]) -> None:
        self.shape = shape
        self.x = torch.randn(
            shape.batch * shape.frames, shape.channels, shape.height, shape.width, **options
        )
        self.normed = to_norm(self.x, shape)
        self.rows = to_rows(self.normed)

    def run(self) -> None:
        """All three once."""
        to_norm(self.x, self.shape)
        to_rows(self.normed)
        to_frames(self.rows, self.shape)


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's figures: medians in seconds, and the share of the copies; of 1."""
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = MODELS[name](args.width).eval().to(device, dtype)
    forward = make_forward(model, args)
    shapes = find_shapes(model, forward)
    copies = [Copies(shape, {"device": device, "dtype": dtype}) for shape in shapes]
    contestants = [forward, *(copy.run for copy in copies)]
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(args.rounds + 1):
        for contestant, seconds in zip(contestants, times, strict=True):
            start = now(device)
            contestant()
            seconds.append(now(device) - start)
    whole, *parts = (statistics.median(seconds[1:]) for seconds in times)  # the first warms up
    rows = [
        {"shape": asdict(shape), "transformers": count, "seconds": seconds}
        for (shape, count), seconds in zip(shapes.items(), parts, strict=True)
    ]
    total = sum(row["transformers"] * row["seconds"] for row in rows)
    return {"forward_seconds": whole, "copy_seconds": total, "share": total / whole, "copies": rows}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown: a line for each shape, and for each model."""
    lines = [
        "| model | frames, channels, height, width | transformers | copies of one | share |",
        "|---|---|--:|--:|--:|",
    ]
    for name, result in results["models"].items():
        for row in result["copies"]:
            _, *shape = row["shape"].values()
            share = row["transformers"] * row["seconds"] / result["forward_seconds"]
            cells = [name, ", ".join(map(str, shape)), str(row["transformers"])]
            lines.append(f"| {' | '.join(cells)} | {row['seconds'] * 1e3:.2f} ms | {share:.1%} |")
        count = sum(row["transformers"] for row in result["copies"])
        forward = f"of a forward of {result['forward_seconds'] * 1e3:,.0f} ms"
        copies = f"{result['copy_seconds'] * 1e3:.1f} ms in all"
        lines.append(f"| **{name}** | {forward} | {count} | {copies} | **{result['share']:.1%}** |")
    return "\n".join(lines)


def size(text: str) -> tuple[int, int]:
    """``320x512``: height and width."""
    height, width = map(int, text.split("x"))
    return height, width


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.permute_copies")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--width", type=int, default=320, help="channels of the finest level")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=size, default="320x512", help="pixels, HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=2, help="2 is one video under guidance")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "models")}
    results = {
        "settings": settings,
        # Not where things are installed.
        "environment": {name: fact for name, fact in vk.info().items() if "library" not in name},
        "models": {name: measure(name, args) for name in args.models},
    }
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
