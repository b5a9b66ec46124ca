"""What a grid is trained on: clips of three kinds, told apart by their frames per second (ETC)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.models.grid.embedding import IMAGE_SET_FPS, REPEATED_FPS

FPS_VALUES = (1, 2, 4, 8, 15, 30, 60)  # of clips of videos, in training
NOMINAL = 1.01  # 29.97 frames per second are called 30


class Clip(NamedTuple):
    """What a grid is trained on: ``(frames, channels, h, w)``, their text and their speed."""

    frames: Tensor
    text: str
    fps: int


class SourceVideo(NamedTuple):
    """A whole video, ``(length, channels, h, w)``, with its own frames per second."""

    frames: Tensor
    fps: float
    text: str


class LabelledImages(NamedTuple):
    """Different images of one label, ``(count, channels, h, w)``: ImageNet's of a class."""

    images: Tensor
    label: str


class CaptionedImage(NamedTuple):
    """An image ``(channels, h, w)`` with its caption."""

    image: Tensor
    caption: str


def frame_indices(
    length: int, source_fps: float, fps: int, frames: int, start: int = 0
) -> list[int]:
    """Returns which frames of a source make a clip of some speed (ETC, eq. 6).

    Frame t of the clip is frame ``start + round(t · source_fps / fps)``, halves rounded up; at 0
    it is image ``start + t`` of a set, and at 120 always the same image.

    Args:
        length: Of the source, in frames.
        source_fps: Its own frames per second, more than 0. 60 and ``fps=30`` take every second one.
        fps: Of the clip, 0 to 120.
        frames: Of the clip.
        start: The first frame.

    Raises:
        ValueError: A number is out of its range, or the clip ends after the source; the message
            says the longest start.
        TypeError: A number is of the wrong kind.
    """
    check_integer("length", length, 1)
    check_integer("fps", fps, IMAGE_SET_FPS, REPEATED_FPS)
    check_integer("frames", frames, 1)
    check_integer("start", start, 0)
    if isinstance(source_fps, bool) or not isinstance(source_fps, int | float):
        raise TypeError(f"source_fps must be a number, got {type(source_fps).__name__}")
    if not 0 < source_fps < math.inf:
        raise ValueError(f"source_fps must be more than 0 and finite, got {source_fps}")
    offsets = _offsets(source_fps, fps, frames)
    longest = length - 1 - offsets[-1]
    if start > longest:
        allowed = f"start is at most {longest}, got {start}" if longest >= 0 else "none fits"
        raise ValueError(
            f"{frames} frames at {fps} fps end {offsets[-1]} frames after their first one: of a "
            f"source of {length} frames at {source_fps:g} fps {allowed}"
        )
    return [start + offset for offset in offsets]


def _offsets(source_fps: float, fps: int, frames: int) -> list[int]:
    if fps == REPEATED_FPS:
        return [0] * frames
    step = 1.0 if fps == IMAGE_SET_FPS else source_fps / fps
    return [math.floor(t * step + 0.5) for t in range(frames)]


class TripleData(IterableDataset[Clip]):
    """Clips of videos, of images with one label and of single images, mixed at random (ETC).

    A clip of a video has one of the speeds of ``FPS_VALUES`` that the video is long enough for and
    that no frame is repeated for; footage of 29.97 counts as 30, and so on. Different images of one
    label are a clip at 0 frames per second, one captioned image repeated is a clip at 120. It goes
    on without end; a ``DataLoader`` cuts it into batches, and each of its workers draws clips of
    its own.

    Args:
        videos, labelled_images, captioned_images: Sequences of :class:`SourceVideo`,
            :class:`LabelledImages` and :class:`CaptionedImage`, or of such tuples; whatever has a
            length and is indexed, so that a data set may read from disk. Empty ones are left out.
        frames: Of a clip.
        weights: How often each kind is drawn; None draws those that there are equally often.
        generator: Decides everything: the same state draws the same clips. With workers the
            ``DataLoader``'s own generator, or torch's global one, decides too, anew in each epoch.

    Raises:
        ValueError, TypeError: An argument is bad, or there is no data of a kind that is wanted.
            While iterating: a video is too short for any speed, or a label has too few images.
    """

    def __init__(
        self,
        videos: Sequence[Any],
        labelled_images: Sequence[Any],
        captioned_images: Sequence[Any],
        *,
        frames: int,
        weights: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("frames", frames, 1)
        self._kinds = (videos, labelled_images, captioned_images)
        self._frames = frames
        counts = [len(kind) for kind in self._kinds]
        chosen = [float(count > 0) for count in counts] if weights is None else list(weights)
        if len(chosen) != 3 or not all(0 <= w < math.inf for w in chosen) or not sum(chosen):
            raise ValueError(
                "weights must be three numbers of at least 0, for videos, labelled_images and "
                f"captioned_images, one of which there is; got {chosen}"
            )
        names = ("videos", "labelled_images", "captioned_images")
        for name, weight, count in zip(names, chosen, counts, strict=True):
            if weight and not count:
                raise ValueError(f"{name} has the weight {weight:g} and is empty")
        self._weights = torch.tensor(chosen, dtype=torch.float64)
        self._generator = torch.Generator() if generator is None else generator

    def __iter__(self) -> Iterator[Clip]:
        generator, worker = self._generator, get_worker_info()
        if worker is not None:
            # Each worker has a copy of the generator. Its draw tells data sets and states apart,
            # and with persistent workers epochs; the loader's seed tells workers and epochs apart.
            # A hash of both, as sums of seeds of ranks and workers coincide.
            drawn = int(torch.randint(2**62, (), generator=generator))
            digest = hashlib.sha256(f"{drawn} {worker.seed}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        makers = (self._of_video, self._of_label, self._of_image)
        while True:
            kind = int(torch.multinomial(self._weights, 1, generator=generator))
            yield makers[kind](self._kinds[kind], generator)

    def _of_video(self, videos: Sequence[Any], generator: torch.Generator) -> Clip:
        source = SourceVideo(*videos[_below(len(videos), generator)])
        length = len(source.frames)
        offsets = {fps: _offsets(source.fps, fps, self._frames) for fps in FPS_VALUES}
        fits = [
            fps
            for fps, found in offsets.items()
            if fps <= NOMINAL * source.fps
            and len(set(found)) == self._frames
            and found[-1] < length
        ]
        if not fits:
            raise ValueError(
                f"a video of {length} frames at {source.fps:g} fps is too short for a clip of "
                f"{self._frames} frames at any of {', '.join(map(str, FPS_VALUES))} fps"
            )
        fps = fits[_below(len(fits), generator)]
        start = _below(length - offsets[fps][-1], generator)
        indices = frame_indices(length, source.fps, fps, self._frames, start)
        return Clip(source.frames[indices], source.text, fps)

    def _of_label(self, sets: Sequence[Any], generator: torch.Generator) -> Clip:
        source = LabelledImages(*sets[_below(len(sets), generator)])
        if len(source.images) < self._frames:
            raise ValueError(
                f"{source.label!r} has {len(source.images)} images, a clip needs {self._frames}"
            )
        chosen = torch.randperm(len(source.images), generator=generator)[: self._frames]
        return Clip(source.images[chosen], source.label, IMAGE_SET_FPS)

    def _of_image(self, images: Sequence[Any], generator: torch.Generator) -> Clip:
        source = CaptionedImage(*images[_below(len(images), generator)])
        repeated = source.image[None].expand(self._frames, *source.image.shape)
        return Clip(repeated, source.caption, REPEATED_FPS)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
