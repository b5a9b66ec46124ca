"""``generate`` from its options to its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vstar_kernels.analysis.maps import mean_maps
from vstar_kernels.analysis.plots import plot_maps
from vstar_kernels.cli.generate.files import write_gif, write_mp4
from vstar_kernels.cli.generate.options import Options
from vstar_kernels.cli.info import info
from vstar_kernels.cli.options import CommandError, check_device, check_packages
from vstar_kernels.files import results_folder
from vstar_kernels.methods.sources import SynopsisError, shorten
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.vstar import PAPER, VSTAR, Generation
from vstar_kernels.methods.vstar.writer import SynopsisWriter
from vstar_kernels.models.config import TARConfig

PACKAGES = ("diffusers", "transformers", "av", "matplotlib", "PIL")
MAPS_DPI = 120
FILES = ("video.mp4", "video.gif", "maps.png", "generation.json", "synopsis.json", "config.json")


def run(options: Options) -> int:
    """Make a video and write its folder; returns the exit status 0.

    Raises:
        CommandError: It could not be done; nothing was written.
    """
    check_packages(PACKAGES, extra="generate")
    device = options.device or _device()
    check_device(device)
    config = _config(options)
    writer = _writer(options)
    prompt = _prompt(options)
    image = _image(options)
    pipe = _load(options, device)
    with _errors_of_the_call():
        vstar = VSTAR(
            pipe,
            config,
            writer=writer,
            mode=options.mode,
            extend_positions=options.extend_positions,
        )
        generation = vstar(
            prompt,
            num_frames=options.frames,
            seed=options.seed,
            num_stages=options.stages,
            refresh=options.refresh,
            maps=options.captured_steps or False,
            **_settings(options),
            **image,
        )
    try:
        with results_folder(options.output, FILES, overwrite=options.overwrite) as folder:
            _write(folder, generation, options, _record(options, pipe, generation, device))
    except OSError as error:
        raise CommandError(f"--output: {error}") from error
    for number, stage in enumerate(generation.synopsis.stages, start=1):
        print(f"stage {number}: {stage}")
    print(f"seed {generation.seed}, TAR on {len(generation.layers)} layers")
    print(f"video: {options.output / 'video.mp4'}")
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _config(options: Options) -> TARConfig:
    option = "--preset" if options.preset is not None else "--config"
    try:
        if options.preset is not None:
            return TARConfig.preset(options.preset)
        return PAPER if options.config is None else TARConfig.load(options.config)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{option}: {error}") from error


def _writer(options: Options) -> SynopsisWriter | None:
    option = "--writer"
    try:
        if options.has_endpoint:
            return SynopsisWriter.from_endpoint(options.writer, base_url=options.writer_url)
        if options.writer_local is not None:
            option = "--writer-local"
            return SynopsisWriter.from_transformers(options.writer_local)
    except (ImportError, ValueError) as error:
        raise CommandError(f"{option}: {error}") from error
    return None


def _prompt(options: Options) -> str | Synopsis:
    """The prompt, or the synopsis that is in a file."""
    if options.synopsis is None:
        assert options.prompt is not None
        return options.prompt
    try:
        if options.prompt is None:
            return Synopsis.load(options.synopsis)
        writer = SynopsisWriter.from_file(options.synopsis, least_stages=1, most_stages=10_000)
        return writer.write(options.prompt)
    except (OSError, ValueError, SynopsisError) as error:
        hint = "" if options.prompt else " (several synopses, and texts, need --prompt)"
        raise CommandError(f"--synopsis: {error}{hint}") from error


def _load(options: Options, device: str) -> Any:
    """The pipeline, in half precision unless on the CPU."""
    import diffusers
    import torch

    more: dict[str, Any] = {} if device == "cpu" else {"torch_dtype": torch.float16}
    name, wanted = "--model", options.model
    try:
        if options.adapter is None:
            return diffusers.DiffusionPipeline.from_pretrained(wanted, **more).to(device)
        name, wanted = "--adapter", options.adapter
        more["motion_adapter"] = diffusers.MotionAdapter.from_pretrained(wanted, **more)
        name, wanted = "--model", options.model
        return diffusers.AnimateDiffPipeline.from_pretrained(wanted, **more).to(device)
    # diffusers raises whatever its parts raise: of the network, of a file, of a wrong class.
    except Exception as error:
        reason = shorten(str(error)) or type(error).__name__
        raise CommandError(f"{name}: cannot load {wanted}: {reason}") from error


@contextmanager
def _errors_of_the_call() -> Iterator[None]:
    """What is wrong with the arguments, the model or the writer, or too large, in one line."""
    import torch

    try:
        yield
    except (TypeError, ValueError, SynopsisError, torch.OutOfMemoryError) as error:
        raise CommandError(str(error)) from error


def _settings(options: Options) -> dict[str, Any]:
    """The pipeline's own arguments, those that were given."""
    height, width = options.size or (None, None)
    settings: dict[str, Any] = {
        "num_inference_steps": options.steps,
        "height": height,
        "width": width,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _image(options: Options) -> dict[str, Any]:
    """The image to animate as an argument, if there is one."""
    if options.image is None:
        return {}
    from PIL import Image

    try:
        return {"image": Image.open(options.image).convert("RGB")}
    except OSError as error:
        raise CommandError(f"--image: {error}") from error


def _record(options: Options, pipe: Any, generation: Generation, device: str) -> dict[str, Any]:
    """What it takes to make the video again."""
    return {
        "model": options.model,
        "adapter": options.adapter,
        "pipeline": type(pipe).__name__,
        "device": device,
        "synopsis": json.loads(generation.synopsis.to_json()),
        "mode": options.mode,
        "config": json.loads(generation.config.to_json()),
        "extend_positions": options.extend_positions,
        "layers": len(generation.layers),
        "frames": options.frames,
        "fps": options.fps,
        "seed": generation.seed,
        "image": None if options.image is None else str(options.image),
        "settings": _settings(options),
        "versions": info(),
    }


def _write(folder: Path, generation: Generation, options: Options, record: dict[str, Any]) -> None:
    write_mp4(folder / "video.mp4", generation.frames, options.fps)
    write_gif(folder / "video.gif", generation.frames, options.fps)
    if generation.maps is not None:
        means = mean_maps(generation.maps, by=("level", "step"))
        plot_maps(means).savefig(folder / "maps.png", dpi=MAPS_DPI)
    text = json.dumps(record, ensure_ascii=False, indent=1)
    (folder / "generation.json").write_text(text + "\n", encoding="utf-8")
    generation.synopsis.save(folder / "synopsis.json")
    generation.config.save(folder / "config.json")
