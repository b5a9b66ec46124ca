"""The demo from its options to its folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import GaussianBias
from vstar_kernels.cli.demo import models, report, summary
from vstar_kernels.cli.demo.denoise import Demo
from vstar_kernels.cli.demo.options import DemoOptions
from vstar_kernels.cli.options import CommandError, check_device, check_packages
from vstar_kernels.files import results_folder
from vstar_kernels.models.front_end import temporal_layers

PACKAGES = ("diffusers", "transformers", "tqdm")
VIDEO_WAYS = ("stock", "vstar_kernels")  # eager TAR's video is the same as ours


def run(options: DemoOptions) -> int:
    """Denoise, print the table, write the folder. 0, or 1 if the kernels disagree with eager TAR.

    Raises:
        CommandError: It could not be done; nothing was written.
    """
    check_packages(PACKAGES, extra="demo")
    check_device(options.device)
    start = time.perf_counter()
    demo = _prepare(options)
    _denoise(demo)
    results = summary.summarize(demo, options)
    results["total_seconds"] = time.perf_counter() - start
    print(f"\n{summary.table(results)}\n")
    _write(options.output, demo, results)
    print(f"report: {options.output / 'report.html'}   ({results['total_seconds']:.0f} s in all)")
    if results["agrees"]:
        return 0
    difference = results["ways"]["vstar_kernels"]["difference_from_eager"]
    print(
        f"error: vstar_kernels differs from eager TAR by {difference:.2g}, "
        f"more than the {results['tolerance']:.2g} allowed",
        file=sys.stderr,
    )
    return 1


def _prepare(options: DemoOptions) -> Demo:
    model = models.load(options)
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


def _denoise(demo: Demo) -> None:
    from tqdm import tqdm

    height, width = demo.model.latents.shape[-2:]
    print(
        f"{demo.model.description}: {demo.model.latents.shape[2]} frames of {height} × {width} "
        f"latents, {len(demo.timesteps)} steps, {torch.get_num_threads()} threads"
    )
    with tqdm(total=demo.num_forwards, unit="forward", desc="warm-up") as bar:

        def progress(done: str) -> None:
            bar.set_description(done)
            bar.update()

        demo.run(progress)


def _write(output: Path, demo: Demo, results: dict[str, Any]) -> None:
    # Videos of an earlier run go: it may have had a model where this one has none.
    names = ("report.html", "results.json", *(f"{way}.gif" for way in VIDEO_WAYS))
    with results_folder(output, names, overwrite=True) as folder:
        videos = _write_videos(folder, demo)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "report.html").write_text(report.render(results, videos), encoding="utf-8")


def _write_videos(folder: Path, demo: Demo) -> dict[str, Path]:
    """A gif of each way, by its label, where the model can decode its latents."""
    if demo.model.pipeline is None:
        return {}
    from diffusers.utils.export_utils import export_to_gif

    videos = {}
    for run in demo.runs:
        if run.way.name in VIDEO_WAYS:
            path = folder / f"{run.way.name}.gif"
            with torch.no_grad():
                export_to_gif(demo.model.decode(run.latents), str(path))
            videos[run.way.label] = path
    return videos
