"""The demo's options. Nothing here is slow to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vstar_kernels.cli.options import (
    MAX_STEPS,
    CommandError,
    check_model,
    integer,
    number,
    option,
    parsed,
    several,
    size,
)

# Pixels. Below, group norms over single positions amplify rounding without bound.
MIN_SIZE = 64
FULL_WIDTH = 320  # VideoCrafter2's


def _width(text: str) -> int:
    width = FULL_WIDTH if text == "full" else integer(1)(text)
    if width % 32:
        raise ValueError(f"must be 'full' or a multiple of 32, got {text!r}")
    return width


def _sigma(text: str) -> float:
    value = number(text)
    if value < 0:
        raise ValueError(f"must be at least 0 frames, got {text!r}")
    return value


@dataclass(frozen=True)
class DemoOptions:
    """A video UNet denoises with stock attention, eager TAR and these kernels."""

    model: Annotated[str | None, option("ID_OR_PATH", default="random weights")] = None
    """Real weights: a text-to-video pipeline for TextToVideoSDPipeline.from_pretrained."""
    prompt: Annotated[str, option("TEXT")] = "A landscape turns from spring to winter, time lapse."
    """What to draw, where there are real weights."""
    width: Annotated[int, parsed(_width, "CHANNELS")] = 32
    """Channels of the random UNet's first level: a multiple of 32, or 'full' for 320 as in
    VideoCrafter2. Few, to be quick."""
    frames: Annotated[int, parsed(integer(1), "N")] = 32
    """How many frames."""
    size: Annotated[
        tuple[int, int] | None,
        parsed(size(MIN_SIZE), "HEIGHTxWIDTH"),
        option(default="320x512, or the model's"),
    ] = None
    """In pixels, multiples of 8 from 64."""
    steps: Annotated[int, parsed(integer(1, MAX_STEPS), "N")] = 2
    """Denoising steps, of which the first 14 are regularized."""
    sigma: Annotated[tuple[float, ...], several(_sigma, "FRAMES")] = (1.0,)
    """Standard deviation in frames at each UNet level from the finest; levels without one are not
    regularized."""
    strength: Annotated[float, parsed(number, "X")] = 1.0
    """Factor on the regularization."""
    seed: Annotated[int, parsed(integer(0, 2**63 - 1), "N")] = 0
    """Decides weights and noise."""
    device: Annotated[str, option("NAME")] = "cpu"
    """Where the model runs."""
    output: Annotated[Path, option("FOLDER")] = Path("demo-output")
    """For the report."""

    def __post_init__(self) -> None:
        """Raises CommandError for what can be found wrong without loading anything."""
        if self.output.exists() and not self.output.is_dir():
            raise CommandError(f"--output must be a folder, {self.output} is a file")
        if self.model is not None:
            check_model(self.model)

    def run(self) -> int:
        """Runs the demo; see :func:`vstar_kernels.cli.demo.run.run`."""
        from vstar_kernels.cli.demo.run import run

        return run(self)
