"""The videos that ``generate`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = "18"  # x264's constant rate factor: hardly to be told from the original


def write_mp4(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Write an H.264 video, of the frames' size."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": QUALITY})
        stream.width, stream.height = frames[0].size
        # What every player shows has half as many colours as pixels on either side.
        halves = stream.width % 2 == stream.height % 2 == 0
        stream.pix_fmt = "yuv420p" if halves else "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def write_gif(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Write an animation that repeats for ever."""
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)
