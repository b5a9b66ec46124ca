"""What ``generate`` writes, all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_kernels.cli.options import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = "18"  # x264's constant rate factor: hardly to be told from the original


def write_folder(
    folder: Path, names: Sequence[str], write: Callable[[Path], None], *, overwrite: bool
) -> None:
    """Write a folder's files, first into a folder beside it.

    Args:
        folder: New or empty, unless ``overwrite``.
        names: Those that files may have; with ``overwrite`` they are replaced or removed, and
            others stay.
        write: Writes the files into the folder that it is given.

    Raises:
        CommandError: They cannot be written. Then nothing has been, except where the folder has
            been filled meanwhile: the message says where the files are.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CommandError(f"--output: {error}") from error
    try:
        write(scratch)
        if overwrite and folder.exists():
            _replace(scratch, folder, names)
        else:
            _rename(scratch, folder)
    except OSError as error:
        raise CommandError(f"--output: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(scratch: Path, folder: Path, names: Sequence[str]) -> None:
    written = {path.name for path in scratch.iterdir()}
    for name in set(names) - written:
        (folder / name).unlink(missing_ok=True)
    for name in written:
        os.replace(scratch / name, folder / name)


def _rename(scratch: Path, folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    scratch.chmod(0o777 & ~mask)  # mkdtemp's folders are for their owner only
    try:
        if folder.exists():
            folder.rmdir()  # an empty one: not everywhere is it replaced
        os.rename(scratch, folder)
    except OSError as error:
        kept = scratch.with_name(scratch.name.lstrip("."))
        os.rename(scratch, kept)
        raise CommandError(f"--output: {error}; the results are in {kept}") from error


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
