"""The files of a video: the video itself, its record, and what it takes to make it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_kernels.analysis.maps import mean_maps
from vstar_kernels.analysis.plots import plot_maps
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.cli.generate.options import GenerateOptions
from vstar_kernels.cli.generate.starvid import FILES as PLAN_FILES
from vstar_kernels.cli.generate.starvid import record_of, writers_of
from vstar_kernels.cli.info import info
from vstar_kernels.cli.options import SHOWN, write_results
from vstar_kernels.files import write_atomically
from vstar_kernels.methods.starvid.starvid import GuidedVideo
from vstar_kernels.methods.vstar.vstar import Generation
from vstar_kernels.reading import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

RECORD = "generation.json"
FRAMES = "frames.npz"
# What another method, or other options, wrote must not be left where a video is made again.
FILES = (
    *("video.mp4", "video.gif", "maps.png", RECORD, FRAMES, "synopsis.json", "config.json"),
    *PLAN_FILES,
)
MAPS_DPI = 120
CONSTANT_RATE_FACTOR = "18"  # x264's: hardly to be told from the original


def told(generation: Generation | GuidedVideo) -> list[str]:
    """Returns what is said of a finished video."""
    if isinstance(generation, GuidedVideo):
        updates = sum(update.applied for update in generation.updates)
        return [f"seed {generation.seed}, {updates} updates of the latents"]
    stages = enumerate(generation.synopsis.stages, start=1)
    what = "a rule" if isinstance(generation.config, FrameRule) else "TAR"
    tar = f"{what} on {len(generation.layers)} layers" if generation.config else "no TAR"
    told = [f"stage {index}: {shorten(stage, SHOWN)}" for index, stage in stages]
    return [*told, f"seed {generation.seed}, {tar}"]


def write_files(
    folder: Path,
    options: GenerateOptions,
    generation: Generation | GuidedVideo,
    *,
    pipeline: str,
    device: str,
    mark: Callable[[Collection[str]], Any] | None = None,
) -> None:
    """Writes all files of a video into an empty folder.

    Args:
        folder: Where.
        options, generation: The video.
        pipeline: The name of its class.
        device: Where it was made.
        mark: Returns what the record has under ``"job"``, of the files' names.

    Raises:
        IncompleteError: See :func:`write_results`.
    """
    record = _record(options, pipeline, generation, device)
    writers = _writers(options, generation, record)
    if mark is not None:
        record["job"] = mark([RECORD, *writers])
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    writers[RECORD] = lambda path: write_atomically(path, text)
    write_results(folder, writers)


def _record(
    options: GenerateOptions, pipeline: str, generation: Generation | GuidedVideo, device: str
) -> dict[str, Any]:
    """Returns what it takes to make the video again."""
    video = options.video
    common = {
        "method": video.method,
        "model": video.model,
        "adapter": video.adapter,
        "pipeline": pipeline,
        "device": device,
        "frames": video.frames,
        "fps": options.output.fps,
        "seed": generation.seed,
        "image": None if video.image is None else str(video.image),
        "settings": options.settings,
        "versions": info(),
    }
    if isinstance(generation, GuidedVideo):
        return common | record_of(generation)
    config = generation.config
    more: dict[str, Any] = {}
    if video.method == "grid":
        path, grid = options.grid.embedding, options.grid
        more["grid"] = {
            "embedding": None if path is None else str(path),
            "rows": grid.rows,
            "decode": grid.decode,
        }
    else:
        more |= {"mode": options.synopsis.mode, "rounding": options.synopsis.rounding}
    return common | {
        "synopsis": json.loads(generation.synopsis.to_json()),
        "config": None if config is None else json.loads(config.to_json()),
        "extend_positions": options.regularization.extend_positions,
        "layers": len(generation.layers),
        **more,
    }


def _writers(
    options: GenerateOptions, generation: Generation | GuidedVideo, record: dict[str, Any]
) -> dict[str, Callable[[Path], object]]:
    """Returns what writes each of the files but the record."""
    from diffusers.utils.export_utils import export_to_gif

    frames, fps = generation.frames, options.output.fps
    writers: dict[str, Callable[[Path], object]] = {
        "video.mp4": lambda path: write_mp4(path, frames, fps),
        "video.gif": lambda path: export_to_gif(list(frames), str(path), fps),
    }
    if options.output.keep_frames:
        writers[FRAMES] = lambda path: _write_frames(path, frames)
    if isinstance(generation, GuidedVideo):
        return writers | writers_of(generation, record)
    writers["synopsis.json"] = generation.synopsis.save
    if (config := generation.config) is not None:
        writers["config.json"] = config.save
    if (maps := generation.maps) is not None:
        writers["maps.png"] = lambda path: plot_maps(mean_maps(maps, by=("level", "step"))).savefig(
            path, dpi=MAPS_DPI
        )
    return writers


def _write_frames(path: Path, frames: Sequence[Image]) -> None:
    import numpy as np

    np.savez_compressed(path, frames=np.stack([np.asarray(frame) for frame in frames]))


def write_mp4(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Writes an H.264 video of the frames' own size, which diffusers' writer may change."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(
            "libx264", rate=fps, options={"crf": CONSTANT_RATE_FACTOR}
        )
        stream.width, stream.height = frames[0].size
        # What every player shows has half as many colours as pixels on either side.
        halves = stream.width % 2 == stream.height % 2 == 0
        stream.pix_fmt = "yuv420p" if halves else "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
