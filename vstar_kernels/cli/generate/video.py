"""From options to a video: what they name is read, the model is loaded and a method called."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vstar_kernels.cli.generate.options import GenerateOptions, VideoOptions
from vstar_kernels.cli.generate.regularization import Regularization
from vstar_kernels.cli.generate.starvid import starvid
from vstar_kernels.cli.options import CommandError
from vstar_kernels.methods.grid.video import GridVideo
from vstar_kernels.methods.starvid.starvid import GuidedVideo
from vstar_kernels.methods.starvid.writer import PlanError
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.vstar import VSTAR, Generation
from vstar_kernels.methods.vstar.writer import SynopsisError, SynopsisWriter
from vstar_kernels.models.grid.embedding import GridEmbedding
from vstar_kernels.models.progress import OnStep
from vstar_kernels.reading import read_bytes, shorten

Sample = Callable[[Any, OnStep], "Generation | GuidedVideo"]  # of a pipeline


def best_device() -> str:
    """Returns a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(options: VideoOptions, device: str) -> Any:
    """Returns the pipeline, in half precision unless on the CPU."""
    import diffusers
    import torch

    more: dict[str, Any] = {} if device == "cpu" else {"torch_dtype": torch.float16}
    name, wanted = "--model", options.model
    try:
        if options.adapter is None:
            pipe = diffusers.DiffusionPipeline.from_pretrained(wanted, **more)
            if isinstance(getattr(pipe, "vae", None), diffusers.AutoencoderKLAllegro):
                pipe.vae.enable_tiling()  # it decodes in no other way
            return pipe.to(device)
        name, wanted = "--adapter", options.adapter
        more["motion_adapter"] = diffusers.MotionAdapter.from_pretrained(wanted, **more)
        name, wanted = "--model", options.model
        pipe = diffusers.AnimateDiffPipeline.from_pretrained(wanted, **more)
        if not isinstance(pipe.unet, diffusers.UNetMotionModel):  # it takes any other as it is
            raise ValueError(
                f"with --adapter it must be an image pipeline, its model is a "
                f"{type(pipe.unet).__name__}"
            )
        return pipe.to(device)
    # diffusers raises whatever its parts raise: of the network, of a file, of a wrong class.
    except Exception as error:
        reason = shorten(str(error)) or type(error).__name__
        raise CommandError(f"{name}: cannot load {wanted}: {reason}") from error


@contextmanager
def errors_of_the_call() -> Iterator[None]:
    """Turns what is wrong with the arguments, the model or the writer into one line."""
    import torch

    wrong = (TypeError, ValueError, FloatingPointError, SynopsisError, PlanError)
    try:
        yield
    except (*wrong, torch.OutOfMemoryError) as error:
        raise CommandError(str(error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # what a CPU has instead of OutOfMemoryError
            raise
        raise CommandError(str(error)) from error


def sampler(options: GenerateOptions) -> Sample:
    """Returns what makes a video from a pipeline, all files that the options name read.

    Raises:
        CommandError: One of them cannot be read, or does not fit the method.
    """
    return METHODS[options.video.method](options)


def _vstar(options: GenerateOptions) -> Sample:
    """Returns what makes the video from a pipeline by VSTAR, all files read."""
    regularization = Regularization.read(options.regularization)
    writer = options.synopsis.make_writer(SynopsisWriter)
    prompt, image = _prompt(options), _image(options.video.image)

    def make(pipe: Any, on_step: OnStep) -> Generation:
        vstar = VSTAR(
            pipe,
            regularization.of_model(pipe),
            writer=writer,
            mode=options.synopsis.mode,
            rounding=options.synopsis.rounding,
            extend_positions=options.regularization.extend_positions,
        )
        return vstar(
            prompt,
            num_frames=options.video.frames,
            num_stages=options.synopsis.stages,
            refresh=options.synopsis.refresh,
            **options.arguments(on_step),
            **image,
        )

    return make


def _grid(options: GenerateOptions) -> Sample:
    """Returns what makes the video from a pipeline as a grid of frames, all files read."""
    config = Regularization.read(options.regularization).of_method("a grid")
    grid = options.grid
    embedding: bool | GridEmbedding = True
    if grid.embedding is not None:
        try:
            embedding = GridEmbedding.load(grid.embedding)
        except (OSError, ValueError) as error:
            raise CommandError(f"--embedding: {error}") from error

    def make(pipe: Any, on_step: OnStep) -> Generation:
        video = GridVideo(pipe, config, embedding=embedding, rows=grid.rows, decode=grid.decode)
        return video(
            _prompt(options),
            frames=options.video.frames,
            fps=options.output.fps,
            **options.arguments(on_step),
        )

    return make


def _starvid(options: GenerateOptions) -> Sample:
    """Returns what makes the video from a pipeline by StarVid, all files read."""
    tar = Regularization.read(options.regularization).of_method("StarVid")
    return starvid(options, tar, _image(options.video.image))


METHODS: dict[str, Callable[[GenerateOptions], Sample]] = {
    "vstar": _vstar,
    "grid": _grid,
    "starvid": _starvid,
}


def _prompt(options: GenerateOptions) -> str | Synopsis:
    """Returns the prompt, or the synopsis that is in a file."""
    prompt, path = options.video.prompt, options.synopsis.synopsis
    if isinstance(path, Synopsis):
        return path
    if path is None:
        assert prompt is not None
        return prompt
    try:
        if prompt is None:
            return Synopsis.load(path)
        writer = SynopsisWriter.from_file(path, least_stages=1, most_stages=10_000)
        return writer.write(prompt)
    except (OSError, ValueError, SynopsisError) as error:
        hint = "" if prompt else " (several synopses, and saved answers, need --prompt)"
        raise CommandError(f"--synopsis: {error}{hint}") from error


def _image(path: Path | None) -> dict[str, Any]:
    """Returns the image to animate as an argument, if there is one."""
    if path is None:
        return {}
    from PIL import Image, UnidentifiedImageError

    try:
        return {"image": Image.open(io.BytesIO(read_bytes(path))).convert("RGB")}
    except UnidentifiedImageError:  # whose message has an address in memory
        raise CommandError(f"--image: {path} is no picture that Pillow can read") from None
    # Of a picture that would be larger than memory, or is not what its header says.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"--image: {path}: {error}") from error
