"""The demo's command line. Nothing here is slow to import."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_kernels.cli.options import MAX_STEPS, CommandError, check_model, integer, number, size

# Pixels. Below, group norms over single positions amplify rounding without bound.
MIN_SIZE = 64


@dataclass(frozen=True)
class Options:
    """What the user asked for. ``sigma`` is in frames, by level; ``size`` in pixels, or None."""

    model: str | None
    prompt: str
    width: int
    frames: int
    size: tuple[int, int] | None
    steps: int
    sigma: tuple[float, ...]
    strength: float
    seed: int
    device: str
    output: Path

    def __post_init__(self) -> None:
        """Whatever can be found wrong without loading anything.

        Raises:
            CommandError: It cannot work.
        """
        if self.output.exists() and not self.output.is_dir():
            raise CommandError(f"--output must be a folder, {self.output} is a file")
        if self.model is not None:
            check_model(self.model)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; :func:`from_arguments` reads them."""
    parser.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="real weights: a text-to-video pipeline for TextToVideoSDPipeline.from_pretrained "
        "(default: random weights)",
    )
    parser.add_argument(
        "--prompt",
        default="A landscape turns from spring to winter, time lapse.",
        help="what to draw, where there are real weights",
    )
    parser.add_argument(
        "--width",
        type=_width,
        default="32",
        help="channels of the random UNet's first level: 'full' for 320 as in VideoCrafter2, or a "
        "multiple of 32 (default: %(default)s, to be quick)",
    )
    parser.add_argument("--frames", type=integer(1), default=32, help="default: %(default)s")
    parser.add_argument(
        "--size",
        type=size(MIN_SIZE),
        metavar="HEIGHTxWIDTH",
        help="of the video in pixels, multiples of 8 from 64 (default: 320x512, or the model's)",
    )
    parser.add_argument(
        "--steps",
        type=integer(1, MAX_STEPS),
        default=2,
        help="denoising steps, of which the first 14 are regularized (default: %(default)s)",
    )
    parser.add_argument(
        "--sigma",
        type=_sigma,
        nargs="+",
        default=[1.0],
        help="standard deviation in frames at each UNet level from the finest; levels without one "
        "are not regularized (default: 1)",
    )
    parser.add_argument(
        "--strength", type=number, default=1.0, help="of the regularization (default: %(default)s)"
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="for the report (default: %(default)s)",
    )


def from_arguments(args: argparse.Namespace) -> Options:
    """The options of a parsed command line.

    Raises:
        CommandError: They cannot work.
    """
    names = Options.__dataclass_fields__
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    return Options(**values | {"sigma": tuple(args.sigma)})


def _width(text: str) -> int:
    width = 320 if text == "full" else integer(1)(text)
    if width % 32:
        raise argparse.ArgumentTypeError(f"must be 'full' or a multiple of 32, got {text!r}")
    return width


def _sigma(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0 frames, got {text!r}")
    return value
