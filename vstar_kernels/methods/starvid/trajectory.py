"""The plan of a video: where each of its subjects is, frame by frame."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from torch import Tensor

from vstar_kernels.documents import Document
from vstar_kernels.methods.arguments import check_integer, check_text
from vstar_kernels.reading import (
    FormatError,
    decode,
    require_pydantic,
    shorten,
    validate,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

Box: TypeAlias = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)``, as shares of the picture's width and height; (0, 0) is the upper left."""


@dataclass(frozen=True)
class Subject:
    """One subject of a video, and where it is.

    Args:
        noun: The word for it, as it stands in the prompt.
        verb: The word for what it does, as it stands in the prompt; None if it does nothing.
        phrase: How it moves, in words; for people, no computation reads it.
        boxes: Where it is at each key frame, a :data:`Box`; None where it is not in the picture.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or empty, or a box is empty or not
            within the picture.
    """

    noun: str
    verb: str | None = None
    phrase: str | None = None
    boxes: Sequence[Box | None] = field(kw_only=True)

    def __post_init__(self) -> None:
        check_text("noun", self.noun)
        for name, text in (("verb", self.verb), ("phrase", self.phrase)):
            if text is not None:
                check_text(name, text)
        if isinstance(self.boxes, str) or not isinstance(self.boxes, Sequence):
            raise TypeError(f"boxes must be a list of boxes, got {type(self.boxes).__name__}")
        boxes = [_checked_box(box, f"boxes[{i}]") for i, box in enumerate(self.boxes)]
        if not any(boxes):
            raise ValueError(f"boxes must hold a box in one key frame at least, got {boxes}")
        object.__setattr__(self, "boxes", tuple(boxes))


@dataclass(frozen=True)
class Trajectory(Document):
    """The subjects of a video and their ways through it (StarVid, arXiv 2409.15259).

    >>> cat = vk.Subject("cat", "runs", boxes=[(0.0, 0.5, 0.3, 0.9), (0.7, 0.5, 1.0, 0.9)])
    >>> vk.Trajectory("a cat runs through the snow", [cat]).boxes(num_frames=16)

    Key frames lie evenly from a video's first frame to its last, however many it has.

    Args:
        prompt: The video as a whole.
        subjects: At least one; all with the same number of key frames.
        background: What is behind them, in words; for people, no computation reads it.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, empty, or does not fit the others.
    """

    prompt: str
    subjects: Sequence[Subject]
    background: str | None = None

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if self.background is not None:
            check_text("background", self.background)
        if isinstance(self.subjects, str) or not isinstance(self.subjects, Sequence):
            kind = type(self.subjects).__name__
            raise TypeError(f"subjects must be a list of Subjects, got {kind}")
        if not self.subjects:
            raise ValueError("subjects must hold at least one Subject, got none")
        for index, subject in enumerate(self.subjects):
            if not isinstance(subject, Subject):
                kind = type(subject).__name__
                raise TypeError(f"subjects[{index}] must be a Subject, got {kind}")
            if len(subject.boxes) != self.key_frames:
                raise ValueError(
                    f"subjects must have one number of key frames, got {self.key_frames} boxes of "
                    f"{self.subjects[0].noun!r} and {len(subject.boxes)} of {subject.noun!r}"
                )
        object.__setattr__(self, "subjects", tuple(self.subjects))

    @property
    def key_frames(self) -> int:
        """For how many frames the plan has boxes."""
        return len(self.subjects[0].boxes)

    def boxes(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Returns where each subject is in each frame of a video.

        Corners move linearly between key frames. Between one in which a subject is present and one
        in which it is not, the nearer decides, the earlier if both are as near.

        Returns:
            Boxes ``(subjects, frames, 4)``, float32, zeros where a subject is absent; and whether
            it is present ``(subjects, frames)``, bool.

        Raises:
            TypeError, ValueError: ``num_frames`` is no integer, or below 1.
        """
        check_integer("num_frames", num_frames, 1)
        absent = (math.nan,) * 4
        corners = torch.tensor(
            [[box or absent for box in subject.boxes] for subject in self.subjects],
            dtype=torch.float64,
        )
        # Places in integers, so that no rounding decides which key frame is the nearer.
        gaps = max(num_frames - 1, 1)
        way = torch.arange(num_frames) * (self.key_frames - 1)
        before, rest = way // gaps, way % gaps
        after = before + (rest > 0)
        moved = torch.lerp(corners[:, before], corners[:, after], (rest / gaps).double()[:, None])
        is_after = (2 * rest > gaps)[:, None]
        nearer = torch.where(is_after, corners[:, after], corners[:, before])
        boxes = torch.where(moved.isnan(), nearer, moved)
        present = ~boxes.isnan().any(-1)
        return boxes.nan_to_num(0.0).float(), present

    def to_json(self) -> str:
        """Returns ``{"prompt": …, "subjects": [{"noun": …, "boxes": …}], "background": …}``."""
        subjects = [
            {"noun": x.noun, "verb": x.verb, "phrase": x.phrase, "boxes": x.boxes}
            for x in self.subjects
        ]
        content = {"prompt": self.prompt, "subjects": subjects, "background": self.background}
        return json.dumps(content, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        """Reads what :meth:`to_json` gave; what may be None may be left out.

        Raises:
            ValueError: It is not JSON, not one such object, or its content is not a plan; the
                message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        try:
            return _from_fields(decode(text))
        except FormatError as error:
            raise FormatError(f"not a plan: {error}") from None


def trajectories_of(content: Any) -> list[Trajectory]:
    """Returns the plans in decoded JSON, which is one plan or a list of them.

    Raises:
        FormatError: One is not a plan, a prompt is there twice, or there is none.
    """
    if not isinstance(content, list):
        return [_from_fields(content)]
    if not content:
        raise FormatError("a list of plans must hold at least one, got none")
    plans: dict[str, Trajectory] = {}
    for index, fields in enumerate(content):
        try:
            plan = _from_fields(fields)
        except FormatError as error:
            raise FormatError(f"[{index}]: {error}") from None
        if plan.prompt in plans:
            prompt = shorten(plan.prompt)
            raise FormatError(f"a list of plans must have each prompt once, got {prompt!r} twice")
        plans[plan.prompt] = plan
    return list(plans.values())


def _from_fields(fields: Any) -> Trajectory:
    """Returns the plan of a decoded JSON object."""
    read: Any = validate(_plan_form(), fields)
    subjects = []
    for index, subject in enumerate(read.subjects):
        try:
            made = Subject(subject.noun, subject.verb, subject.phrase, boxes=subject.boxes)
        except ValueError as error:
            raise FormatError(shorten(f"subjects[{index}]: {error}")) from None
        subjects.append(made)
    try:
        return Trajectory(read.prompt, subjects, read.background)
    except ValueError as error:
        raise FormatError(shorten(str(error))) from None


@functools.cache
def _plan_form() -> type[BaseModel]:
    """Returns the form of a plan in JSON, a pydantic model."""
    require_pydantic()
    from pydantic import BaseModel, ConfigDict, Field

    FourNumbers = Annotated[list[float], Field(min_length=4, max_length=4, fail_fast=True)]  # noqa: N806

    class SubjectFields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        noun: str
        verb: str | None = None
        phrase: str | None = None
        boxes: list[FourNumbers | None] = Field(fail_fast=True)

    class PlanFields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        prompt: str
        subjects: list[SubjectFields] = Field(fail_fast=True)
        background: str | None = None

    return PlanFields


def _checked_box(box: Any, name: str) -> Box | None:
    """Returns a box as a tuple of floats, if it is one within the picture."""
    if box is None:
        return None
    if isinstance(box, str) or not isinstance(box, Sequence) or len(box) != 4:
        raise TypeError(f"{name} must be (x0, y0, x1, y1) or None, got {shorten(repr(box))}")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in box):
        raise TypeError(f"{name} must hold four numbers, got {shorten(repr(box))}")
    if not all(0 <= x <= 1 for x in box):
        raise ValueError(f"{name} must lie within 0 and 1, got {shorten(repr(box))}")
    x0, y0, x1, y1 = map(float, box)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{name} must have x0 < x1 and y0 < y1, got {shorten(repr(box))}")
    return x0, y0, x1, y1
