"""``python -m benchmarks.permute_copies``: what reordering costs around temporal attention.

diffusers' temporal transformers get ``(batch · frames, channels, height, width)`` and attend over
``(batch · height · width, frames, channels)``. Each copies its activations three times for that:
for the group norm, to rows of frames, and back. This measures the part of a forward pass of
``UNet3DConditionModel`` and ``UNetMotionModel``, with random weights, that goes into those copies:
the same permutes, on tensors of the shapes that hooks see in the forward pass, timed in turn with
the whole forward; medians. Prints a Markdown table.

Timed by themselves, small copies find their input in the cache: take the result as a lower bound.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.report.tables import Table
from benchmarks.unet import PIXELS_PER_LATENT, TEXT_TOKENS, UNetOptions, motion, unet3d
from vstar_kernels.cli.options import read_options
from vstar_kernels.models.hooks import Argument

TRANSFORMERS = ("TransformerTemporalModel", "AnimateDiffTransformer3D")
MODELS: dict[str, Callable[[int], Any]] = {"unet3d": unet3d, "motion": motion}


@dataclass(frozen=True)
class Options(UNetOptions):
    """Measure what the permute copies around temporal attention cost."""

    models: tuple[Literal["unet3d", "motion"], ...] = ("unet3d", "motion")
    rounds: int = 5


class Shape(NamedTuple):
    """What a temporal transformer is given: ``(batch · frames, channels, height, width)``."""

    batch: int
    frames: int
    channels: int
    height: int
    width: int


def to_norm(x: Tensor, shape: Shape) -> Tensor:
    """Returns ``(batch, channels, frames, height, width)``, contiguous for the group norm."""
    return x.unflatten(0, (shape.batch, shape.frames)).permute(0, 2, 1, 3, 4).contiguous()


def to_rows(normed: Tensor) -> Tensor:
    """Returns ``(batch · height · width, frames, channels)``, from what the group norm returns."""
    return normed.permute(0, 3, 4, 2, 1).flatten(0, 2)


def to_frames(rows: Tensor, shape: Shape) -> Tensor:
    """Returns ``(batch · frames, channels, height, width)`` again."""
    grid = rows.unflatten(0, (shape.batch, shape.height, shape.width))
    return grid.permute(0, 3, 4, 1, 2).contiguous().flatten(0, 1)


def make_forward(model: Any, options: Options) -> Callable[[], object]:
    """Returns a call of the model with random latents and text."""
    height, width = (pixels // PIXELS_PER_LATENT for pixels in options.size)
    latents = torch.randn(options.batch, 4, options.frames, height, width, **options.tensors)
    repeats = options.frames if type(model).__name__ == "UNetMotionModel" else 1
    channels = model.config.cross_attention_dim
    text = torch.randn(options.batch * repeats, TEXT_TOKENS, channels, **options.tensors)
    return lambda: model(latents, 500, encoder_hidden_states=text)


def find_shapes(model: nn.Module, forward: Callable[[], object]) -> Counter[Shape]:
    """Returns what the temporal transformers are given in a forward pass, and how many of them."""
    shapes: Counter[Shape] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = Argument(module, "hidden_states").get(args, kwargs)
        frames = Argument(module, "num_frames").get(args, kwargs)
        shapes[Shape(len(x) // frames, frames, *x.shape[1:])] += 1

    with ExitStack() as hooks:
        for module in model.modules():
            if type(module).__name__ in TRANSFORMERS:
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        forward()
    return shapes


def make_copies(shape: Shape, options: Options) -> Callable[[], object]:
    """Returns the three copies of a temporal transformer, on tensors of their own."""
    x = torch.randn(shape.batch * shape.frames, *shape[2:], **options.tensors)
    normed = to_norm(x, shape)
    rows = to_rows(normed)
    return lambda: (to_norm(x, shape), to_rows(normed), to_frames(rows, shape))


@torch.no_grad()
def measure(name: str, options: Options) -> dict[str, Any]:
    """Returns one model's figures: medians in seconds, and the copies' part of the forward."""
    torch.manual_seed(0)
    model = MODELS[name](options.width).eval().to(**options.tensors)
    forward = make_forward(model, options)
    shapes = find_shapes(model, forward)
    functions = {"forward": forward} | {str(x): make_copies(x, options) for x in shapes}
    clock = clock_for(options.device)
    calls = [clock.warm_up(TimedCall(key, call), [()]) for key, call in functions.items()]
    times = time_in_turn(clock, calls, 1, rounds=options.rounds, seconds=math.inf)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    copies = [
        {"shape": shape._asdict(), "transformers": count, "seconds": medians[str(shape)]}
        for shape, count in shapes.items()
    ]
    whole, total = medians["forward"], sum(x["transformers"] * x["seconds"] for x in copies)
    share = total / whole
    return {"forward_seconds": whole, "copy_seconds": total, "share": share, "copies": copies}


def table(models: dict[str, Any]) -> Table:
    """Returns the figures: a line for each shape, and for each model."""
    rows = []
    for name, result in models.items():
        whole, total = result["forward_seconds"], result["copy_seconds"]
        for copy in result["copies"]:
            count, seconds, (_, *shape) = (
                copy["transformers"],
                copy["seconds"],
                copy["shape"].values(),
            )
            share = f"{count * seconds / whole:.1%}"
            cells = (", ".join(map(str, shape)), str(count), f"{seconds * 1e3:.2f} ms", share)
            rows.append((name, *cells))
        forward, copies = f"of a forward of {whole * 1e3:,.0f} ms", f"{total * 1e3:.1f} ms in all"
        count = str(sum(copy["transformers"] for copy in result["copies"]))
        rows.append((f"**{name}**", forward, count, copies, f"**{result['share']:.1%}**"))
    head = ("model", "frames, channels, height, width", "transformers", "copies of one", "share")
    return Table("", head, rows, words=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = read_options(Options, arguments, prog="python -m benchmarks.permute_copies")
    settings = {key: x for key, x in asdict(options).items() if key not in ("json", "models")}
    results = {
        "settings": settings,
        # Not where things are installed.
        "environment": {name: fact for name, fact in vk.info().items() if "library" not in name},
        "models": {name: measure(name, options) for name in options.models},
    }
    print(table(results["models"]).markdown())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
