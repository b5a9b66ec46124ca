"""What the examples share: their command line, and how their videos are written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

TINY_SIZE = 32  # pixels


def parser(description: str | None, *, model: str | None) -> argparse.ArgumentParser:
    """Returns the options of an example; ``model`` is one to try, None for an example without."""
    result = argparse.ArgumentParser(description=description)
    if model is not None:
        result.add_argument(
            "--model",
            help=f"real weights: a folder or a name on the Hugging Face hub, such as {model} "
            "(default: a tiny pipeline with random weights, whose videos are noise)",
        )
    result.add_argument("--output", type=Path, default=Path("vstar-example"), help="a folder")
    result.add_argument("--frames", type=count, default=16)
    result.add_argument("--steps", type=count, default=4, help="of denoising; 25 to 50 for real")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def count(text: str) -> int:
    """Reads a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def load(
    pipeline_class: Any, options: argparse.Namespace, tiny: Callable[[], Any], **more: Any
) -> Any:
    """Returns the pipeline that ``--model`` names, in half precision on a GPU, or a tiny one."""
    if options.model is None:
        pipe = tiny()
    else:
        dtype = torch.float32 if options.device == "cpu" else torch.float16
        pipe = pipeline_class.from_pretrained(options.model, torch_dtype=dtype, **more)
    return pipe.to(options.device)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a pipeline is called with; the size is the model's own unless it is tiny."""
    size = {} if options.model else {"height": TINY_SIZE, "width": TINY_SIZE}
    return {
        "num_inference_steps": options.steps,
        "generator": torch.Generator().manual_seed(options.seed),
        "output_type": "pil",
        **size,
    }


def save(frames: Sequence[Image.Image], folder: Path, name: str, *, fps: int = 8) -> None:
    """Writes ``name.gif``, and ``name.png`` with up to eight of the frames side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *rest = frames
    path = folder / f"{name}.gif"
    first.save(path, save_all=True, append_images=rest, duration=1000 // fps, loop=0)
    shown = frames[:: -(-len(frames) // 8)]
    strip = Image.new("RGB", (len(shown) * first.width, first.height))
    for index, frame in enumerate(shown):
        strip.paste(frame, (index * first.width, 0))
    strip.save(path.with_suffix(".png"))
    print(f"{path}: {len(frames)} frames of {first.width} × {first.height}")


def first_frame(path: Path | None) -> Image.Image:
    """Returns the image to animate: of a file, or a gradient."""
    if path is not None:
        return Image.open(path).convert("RGB")
    return Image.linear_gradient("L").convert("RGB").resize((TINY_SIZE, TINY_SIZE))
