"""Which frame each token of a sequence belongs to: :class:`Layout`."""

from __future__ import annotations

import array
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.bias import MAX_FRAMES, check_finite, check_strided, shown

TEXT = -1  # the frame of tokens that belong to none
MAX_COUNT = MAX_FRAMES  # of tokens, frames and whatever counts them: kernels number them in int32
_SHOWN = 8  # segments in a layout's repr


@dataclass(frozen=True)
class Frames:
    """``count`` frames of ``tokens`` tokens each, one after the other.

    Args:
        count: Number of frames, at least 1.
        tokens: Number of tokens of each frame, at least 1.
        first: Time coordinate of the first frame, in whatever unit the rule measures distances in:
            latent frames as a rule.
        step: Difference of the coordinates of neighbours; not 0, as frames with equal coordinates
            are the same frame.

    Raises:
        ValueError: A number is out of its range.
        TypeError: An argument is not a number.
    """

    count: int
    tokens: int
    first: float = 0.0
    step: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.count, "count", 1)
        check_count(self.tokens, "tokens", 1)
        check_number(self.first, "first")
        check_number(self.step, "step")
        if self.step == 0 and self.count > 1:
            raise ValueError(
                f"step must not be 0 where count is {self.count}: frames with equal coordinates "
                "are the same frame"
            )
        first, step = float(self.first), float(self.step)
        last = first + (self.count - 1) * step
        # Two units in the last place apart, neighbours stay apart wherever they are rounded to.
        if self.count > 1 and abs(step) < 2 * math.ulp(max(abs(first), abs(last))):
            raise ValueError(
                f"step {self.step} is too small for coordinates from {first} to {last}: "
                "neighbours would be rounded to the same frame"
            )

    def __repr__(self) -> str:
        places = [f"first={self.first}"] * (self.first != 0) + [f"step={self.step}"] * (
            self.step != 1
        )
        return f"Frames({', '.join([str(self.count), str(self.tokens), *places])})"


@dataclass(frozen=True)
class Text:
    """``tokens`` tokens that belong to no frame, such as a prompt's; a rule leaves them alone.

    Raises:
        ValueError: The number is negative.
        TypeError: It is not an integer.
    """

    tokens: int

    def __post_init__(self) -> None:
        check_count(self.tokens, "the tokens of Text", 0)

    def __repr__(self) -> str:
        return f"Text({self.tokens})"


class Run(NamedTuple):
    """Consecutive tokens of one frame.

    ``frame`` is the frame's number, or ``TEXT``; ``place`` is that of the run's first token within
    its frame: 0 but where the frame's tokens lie in several runs.
    """

    start: int
    end: int
    frame: int
    place: int


class Numbers(NamedTuple):
    """A float32 or int32 tensor that is kept from call to call.

    A kept tensor would be of whatever was on when it was made: inference mode, fake tensors, a
    transform of torch.func. So the numbers are kept, and the tensor is each call's own.
    """

    numbers: array.array[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Numbers:
        """Returns the numbers of a tensor."""
        code = "f" if tensor.is_floating_point() else "i"
        return cls(array.array(code, tensor.flatten().tolist()), tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """Returns a tensor of them on the CPU, to be read only."""
        dtype = torch.float32 if self.numbers.typecode == "f" else torch.int32
        if not self.numbers or torch._C._len_torch_dispatch_stack():  # a mode has to see it made
            flat = torch.tensor(self.numbers.tolist(), dtype=dtype, device="cpu")
        else:
            flat = torch.frombuffer(self.numbers, dtype=dtype)
        return flat.view(self.shape)


class Layout:
    """The frame of every token of a sequence, compiled to runs.

    >>> vk.Layout(vk.Text(226), vk.Frames(13, 1350))  # CogVideoX: the prompt, then the video
    Layout(Text(226), Frames(13, 1350))

    Frames with equal coordinates are the same frame, wherever they are: a row-major grid image of
    2 × 3 frames, each of 4 rows with 5 tokens, is ``[vk.Frames(3, 5)] * 4 + [vk.Frames(3, 5, 3)] *
    4``. Frames are numbered by first appearance. Layouts are equal, and hash alike, where they say
    the same of every token.

    Args:
        segments: :class:`Frames` and :class:`Text`, in the order of the sequence.

    Raises:
        ValueError: There is no token, or there are more than int32 can number.
        TypeError: A segment is neither.
    """

    segments: tuple[Frames | Text, ...]
    runs: tuple[Run, ...]  # in order, without holes, neighbours of different frames
    coordinates: tuple[float, ...]  # of each frame, by its number
    frame_tokens: tuple[int, ...]  # the number of tokens of each frame, by its number

    def __init__(self, *segments: Frames | Text) -> None:
        for segment in segments:
            if not isinstance(segment, Frames | Text):
                raise TypeError(
                    "a layout is made of Frames and Text, in the order of the sequence, "
                    f"got {type(segment).__name__}"
                )
        total = sum(x.tokens * (x.count if isinstance(x, Frames) else 1) for x in segments)
        if total > MAX_COUNT:
            raise ValueError(f"a layout must have at most {MAX_COUNT} tokens, got {shown(total)}")
        self.segments = segments
        numbers: dict[float, int] = {}
        sizes: list[int] = []
        runs: list[Run] = []
        start = 0
        for coordinate, tokens in _pieces(segments):
            frame, place = TEXT, 0
            if coordinate is not None:
                frame = numbers.setdefault(coordinate, len(numbers))
                if frame == len(sizes):
                    sizes.append(0)
                place = sizes[frame]
                sizes[frame] += tokens
            if runs and runs[-1].frame == frame:
                runs[-1] = runs[-1]._replace(end=start + tokens)
            elif tokens:
                runs.append(Run(start, start + tokens, frame, place if frame != TEXT else 0))
            start += tokens
        if not runs:
            raise ValueError(f"a layout must have at least one token, got {self._listed()}")
        self.runs = tuple(runs)
        self.coordinates = tuple(numbers)
        self.frame_tokens = tuple(sizes)

    @classmethod
    def from_coordinates(
        cls, coordinates: Tensor | Sequence[float], text: Tensor | Sequence[bool] | None = None
    ) -> Layout:
        """Returns the layout of tokens whose time coordinates are given, one for each token.

        Neighbours with equal coordinates are a run of one frame; a coordinate that returns later is
        the same frame in another run. The coordinates are those of LTX's ``video_coords[:, 0]`` or
        of ``position_ids``. On a GPU this waits for them: make a layout once, not in every step.

        Args:
            coordinates: ``(tokens,)`` numbers.
            text: ``(tokens,)`` booleans, true for the tokens that belong to no frame, whose
                coordinate means nothing. None: there are none.

        Raises:
            ValueError: The shapes are wrong, or a coordinate of a frame is not finite.
        """
        times = _vector(coordinates, "coordinates", torch.float64)
        if times.is_complex():
            raise TypeError(f"coordinates must be real numbers, got {times.dtype}")
        times = times.double()
        is_text = torch.zeros(times.shape, dtype=torch.bool, device="cpu")
        if text is not None:
            is_text = _vector(text, "text")
            if is_text.dtype != torch.bool:
                raise TypeError(f"text must be booleans, got {is_text.dtype}")
            if is_text.shape != times.shape:
                raise ValueError(
                    "text must have an entry for each of the coordinates, "
                    f"{times.numel()}, got {is_text.numel()}"
                )
        bad = (~times.isfinite() & ~is_text).nonzero()
        if bad.numel():
            place = int(bad[0])
            raise ValueError(
                f"coordinates must be finite, got {times[place].item()} for token {place}"
            )
        times = times.masked_fill(is_text, math.inf)  # as no frame's
        values, counts = torch.unique_consecutive(times, return_counts=True)
        return cls(
            *(
                Text(count) if value == math.inf else Frames(1, count, first=value)
                for value, count in zip(values.tolist(), counts.tolist(), strict=True)
            )
        )

    @property
    def tokens(self) -> int:
        """S, the number of tokens of the sequence."""
        return self.runs[-1].end

    @property
    def frames(self) -> int:
        """F, the number of frames."""
        return len(self.coordinates)

    @property
    def text_tokens(self) -> int:
        """The number of tokens that belong to no frame."""
        return self.tokens - sum(self.frame_tokens)

    def run_table(self) -> Tensor:
        """Returns the runs, ``(R, 4)`` int32 on the CPU: start, end, frame, place."""
        return _run_numbers(self).tensor()

    def order(self) -> list[int]:
        """Returns the frames' numbers in the order of their coordinates."""
        return sorted(range(self.frames), key=self.coordinates.__getitem__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        if self is other:
            return True
        return self.runs == other.runs and self.coordinates == other.coordinates

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Once, as every call looks its tables up; not in __init__, where torch 2.11 traces no hash.
        return hash((self.runs, self.coordinates))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.segments

    def __repr__(self) -> str:
        return f"Layout({self._listed()})"

    def _listed(self) -> str:
        if len(self.segments) <= _SHOWN:
            return ", ".join(map(repr, self.segments)) or "no segment"
        half = _SHOWN // 2
        shown = [*map(repr, self.segments[:half]), "…", *map(repr, self.segments[-half:])]
        return (
            f"{', '.join(shown)}; {len(self.segments)} segments, {self.frames} frames, "
            f"{self.tokens} tokens"
        )


def _pieces(segments: Sequence[Frames | Text]) -> list[tuple[float | None, int]]:
    """Returns the coordinate, None of text, and the tokens of every frame of every segment."""
    pieces: list[tuple[float | None, int]] = []
    for segment in segments:
        if isinstance(segment, Text):
            pieces.append((None, segment.tokens))
            continue
        for i in range(segment.count):
            pieces.append((float(segment.first + i * segment.step), segment.tokens))
    return pieces


@functools.lru_cache(maxsize=64)
def _run_numbers(layout: Layout) -> Numbers:
    flat = array.array("i", [number for run in layout.runs for number in run])
    return Numbers(flat, (len(layout.runs), 4))


def _vector(values: Tensor | Sequence[Any], name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor on the CPU; a list's numbers are read in ``dtype``, in full."""
    if isinstance(values, Tensor):
        check_strided(values, name)
        tensor = values.detach().cpu()
    else:
        try:
            tensor = torch.tensor(values, dtype=dtype, device="cpu")
        except OverflowError as error:
            raise ValueError(f"{name} must be finite, got {error}") from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a tensor or a sequence of numbers: {error}") from error
    if tensor.ndim != 1 or not tensor.numel():
        raise ValueError(
            f"{name} must have shape (tokens,), of one token at least, got {tuple(tensor.shape)}"
        )
    return tensor


# ---- checks of numbers, for layouts and rules ----


def check_number(value: Any, name: str, *, least: float | None = None) -> None:
    """Raises unless ``value`` is a number in float32's range, and no less than ``least``."""
    check_finite(value, name)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")


def check_count(value: Any, name: str, least: int) -> None:
    """Raises unless ``value`` is an integer of at least ``least``, and one that int32 holds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value > MAX_COUNT:
        raise ValueError(f"{name} must be at most {MAX_COUNT}, got {shown(value)}")
