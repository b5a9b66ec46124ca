"""The demo's options, and the demo from its options to its folder."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import GaussianBias
from vstar_kernels.cli.demo import report, transformer
from vstar_kernels.cli.demo.denoise import KERNELS, STOCK, Demo
from vstar_kernels.cli.demo.models import VideoModel, pretrained_model, random_model
from vstar_kernels.cli.options import (
    MAX_STEPS,
    CommandError,
    amount,
    check_device,
    check_model,
    check_output,
    check_packages,
    folder,
    integer,
    number,
    option,
    output_folder,
    parsed,
    several,
    size,
    write_results,
)
from vstar_kernels.cli.output import say
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.full3d.config import FrameTAR

PACKAGES = ("diffusers", "transformers", "jinja2", "matplotlib", "tqdm")
# Pixels. Below, group norms over single positions amplify rounding without bound.
MIN_SIZE = 64
WIDTH, FULL_WIDTH = 32, 320  # the usual one, and VideoCrafter2's
PROMPT = "A landscape turns from spring to winter, time lapse."
SHOWN = (STOCK.name, KERNELS.name)  # eager TAR's video is the same as the kernels'
FILES = ("report.html", "results.json", *(f"{name}.gif" for name in SHOWN))


def _width(text: str) -> int:
    width = FULL_WIDTH if text == "full" else integer(1)(text)
    if width % 32:
        raise ValueError(f"must be 'full' or a multiple of 32, got {text!r}")
    return width


def _strength(text: str) -> float:
    value = number(text)
    if abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"must be finite in float32, got {text!r}")
    return value


@dataclass(frozen=True)
class DemoOptions:
    """A video UNet denoises with stock attention, eager TAR and these kernels."""

    model: Annotated[str | None, option("ID_OR_PATH", default="random weights")] = None
    """Real weights: a text-to-video pipeline for TextToVideoSDPipeline.from_pretrained. Or wan: a
    full-3D transformer, tiny and with random weights."""
    prompt: Annotated[str | None, option("TEXT", default=repr(PROMPT))] = None
    """What to draw, where there are real weights."""
    width: Annotated[int | None, parsed(_width, "CHANNELS"), option(default=str(WIDTH))] = None
    """Channels of the random UNet's first level: a multiple of 32, or 'full' for 320 as in
    VideoCrafter2. Few, to be quick."""
    frames: Annotated[int, parsed(integer(1), "N")] = 32
    """How many frames."""
    size: Annotated[
        tuple[int, int] | None,
        parsed(size(MIN_SIZE), "HEIGHTxWIDTH"),
        option(default="320x512, 192x320 for wan, or the model's"),
    ] = None
    """In pixels, multiples of 8 from 64."""
    steps: Annotated[int, parsed(integer(1, MAX_STEPS), "N")] = 2
    """Denoising steps, of which the first 14 are regularized."""
    sigma: Annotated[tuple[float, ...], several(amount, "FRAMES")] = (1.0,)
    """Standard deviation in frames at each UNet level from the finest; levels without one are not
    regularized. Wan has one, of latent frames."""
    strength: Annotated[float, parsed(_strength, "X")] = 1.0
    """Factor on the regularization."""
    seed: Annotated[int, parsed(integer(0, 2**63 - 1), "N")] = 0
    """Decides weights and noise."""
    device: Annotated[str, option("NAME")] = "cpu"
    """Where the model runs."""
    output: Annotated[Path, parsed(folder, "FOLDER")] = Path("demo-output")
    """For the report."""

    def __post_init__(self) -> None:
        """Raises CommandError for what can be found wrong without loading anything."""
        check_output(self.output, overwrite=True)
        if self.model == transformer.NAME:
            if len(self.sigma) > 1:
                raise CommandError(
                    "--sigma takes one value for wan, whose blocks are alike, "
                    f"got {len(self.sigma)}"
                )
        elif self.model is not None:
            check_model(self.model)
        if self.prompt is not None and self.model in (None, transformer.NAME):
            raise CommandError(f"--prompt, {self.prompt!r}, is for real weights: give --model")
        if self.width is not None and self.model is not None:
            raise CommandError(
                f"--width, {self.width}, is for the random UNet, not for --model {self.model}"
            )

    @property
    def for_model(self) -> dict[str, Any]:
        """What the model needs beside the noise: the random UNet a width, real weights a prompt."""
        if self.model is None:
            return {"width": WIDTH if self.width is None else self.width}
        if self.model == transformer.NAME:
            return {}
        return {"prompt": PROMPT if self.prompt is None else self.prompt}

    def run(self) -> int:
        """Denoises, prints the table and writes the folder.

        Returns:
            The exit status: 0, or 1 if the kernels disagree with eager TAR.

        Raises:
            CommandError: It could not be done; nothing was written.
        """
        check_packages(PACKAGES, extra="demo")
        check_device(self.device)
        start = time.perf_counter()
        with output_folder(self.output, FILES, overwrite=True) as scratch:
            demo = prepare(self)
            _denoise(demo)
            results = {
                "settings": dataclasses.asdict(self)
                | self.for_model
                | {"output": str(self.output)},
                **report.results_of(demo),
                "total_seconds": time.perf_counter() - start,
            }
            say(f"\n{report.table(results)}\n")
            videos = _write_videos(scratch, demo)
            write_results(
                scratch,
                {
                    "results.json": lambda path: path.write_text(json.dumps(results, indent=1)),
                    "report.html": lambda path: path.write_text(
                        report.page(results, videos), encoding="utf-8"
                    ),
                },
            )
        say(f"report: {self.output / 'report.html'}   ({results['total_seconds']:.0f} s in all)")
        if results["agrees"]:
            return 0
        difference = results["variants"][KERNELS.name]["difference_from_eager"]
        print(
            f"error: vstar_kernels differs from eager TAR by {difference:.2g}, "
            f"more than the {results['tolerance']:.2g} allowed",
            file=sys.stderr,
        )
        return 1


def prepare(options: DemoOptions) -> Demo | transformer.TransformerDemo:
    """Returns the demo that the options ask for, with its model loaded.

    Raises:
        CommandError: The model cannot be loaded, or lacks a level that ``--sigma`` names.
    """
    if options.model == transformer.NAME:
        wan = transformer.random_wan(
            frames=options.frames, size=options.size, seed=options.seed, device=options.device
        )
        config = FrameTAR(options.sigma[0], options.strength)
        return transformer.TransformerDemo(wan, config, steps=options.steps)
    model = load_model(options)
    try:
        layers = [layer for layer in temporal_layers(model.unet) if layer.level != "init"]
    except ValueError as error:
        raise CommandError(str(error)) from error
    levels = sorted({layer.level for layer in layers})
    biases: dict[Level, GaussianBias] = {
        level: GaussianBias(sigma, strength=options.strength)
        for level, sigma in enumerate(options.sigma)
    }
    if missing := set(biases) - set(levels):
        raise CommandError(
            f"--sigma names level {min(missing)}, "
            f"the model has temporal attention at levels {', '.join(map(str, levels))}"
        )
    return Demo(model, layers, biases, steps=options.steps, seed=options.seed)


def load_model(options: DemoOptions) -> VideoModel:
    """Returns the model that the options ask for, on their device.

    Raises:
        CommandError: It cannot be loaded.
    """
    noise: dict[str, Any] = {
        "frames": options.frames,
        "size": options.size,
        "seed": options.seed,
        "device": options.device,
    }
    if options.model is None:
        return random_model(**options.for_model, **noise)
    return pretrained_model(options.model, **options.for_model, **noise)


def _denoise(demo: Demo | transformer.TransformerDemo) -> None:
    """Runs the demo under a progress bar."""
    from tqdm import tqdm

    _, _, frames, height, width = demo.model.latents.shape
    say(
        f"{demo.model.description}: {frames} frames of {height} × {width} "
        f"latents, {len(demo.timesteps)} steps, {torch.get_num_threads()} threads"
    )
    with tqdm(total=demo.num_forwards, unit="forward", desc="warm-up") as bar:

        def progress(done: str) -> None:
            bar.set_description(done)
            bar.update()

        demo.run(progress)


def _write_videos(folder: Path, demo: Demo | transformer.TransformerDemo) -> dict[str, Path]:
    """Writes a GIF of each shown variant, where the model can decode; returns them by label."""
    if demo.model.pipeline is None:
        return {}
    from diffusers.utils.export_utils import export_to_gif

    videos = {}
    for denoising in demo.denoisings:
        if denoising.variant.name in SHOWN:
            path = folder / f"{denoising.variant.name}.gif"
            with torch.no_grad():
                export_to_gif(demo.model.decode(denoising.latents), str(path))
            videos[denoising.variant.label] = path
    return videos
