"""The synopsis of a video: its prompt, told in stages."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from vstar_kernels.documents import Document
from vstar_kernels.methods.arguments import check_text
from vstar_kernels.reading import (
    FormatError,
    decode,
    require_pydantic,
    shorten,
    validate,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

LAST_FRAME = 2**31 - 1  # that a file may name


@dataclass(frozen=True)
class Synopsis(Document):
    """A video in stages, one description for each (VSTAR, arXiv 2403.13501, §3.4).

    >>> vk.Synopsis("A rose blooms.", ["A closed rosebud.", "A half-open rose.", "An open rose."])

    Args:
        prompt: The video as a whole.
        stages: What is seen at each stage, in their order; at least one.
        anchors: The frame that shows each stage most purely, increasing from 0; None spaces them
            evenly over however many frames there are. See :func:`interpolate_embeddings`.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, empty, or does not fit the others.
    """

    prompt: str
    stages: Sequence[str]
    anchors: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if isinstance(self.stages, str) or not isinstance(self.stages, Sequence):
            raise TypeError(f"stages must be a list of texts, got {type(self.stages).__name__}")
        if not self.stages:
            raise ValueError("stages must hold at least one description, got none")
        for index, stage in enumerate(self.stages):
            check_text(f"stages[{index}]", stage)
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.anchors is not None:
            check_anchors(self.anchors, len(self.stages))
            object.__setattr__(self, "anchors", tuple(self.anchors))

    def to_json(self) -> str:
        """Returns ``{"prompt": …, "stages": […]}``, with ``"anchors"`` where there are any."""
        return _dumps(self._fields("stages"))

    @classmethod
    def from_json(cls, text: str) -> Synopsis:
        """Reads what :meth:`to_json` gave; ``"subprompts"`` may stand for ``"stages"``.

        Raises:
            ValueError: It is not JSON, not one such object, or its content is not a synopsis; the
                message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        return _from_fields(_decode(text))

    @classmethod
    def list_from_json(cls, text: str) -> list[Synopsis]:
        """Reads a list of ``{"prompt": …, "subprompts": […]}``, or a single object.

        Raises:
            ValueError: As :meth:`from_json`, or the list is empty or has a prompt twice.
            ImportError: ``pydantic`` is not installed.
        """
        return synopses_of(_decode(text))

    @staticmethod
    def list_to_json(synopses: Iterable[Synopsis]) -> str:
        """Returns the list that :meth:`list_from_json` reads."""
        return _dumps([synopsis._fields("subprompts") for synopsis in synopses])

    def _fields(self, stages_key: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"prompt": self.prompt, stages_key: list(self.stages)}
        if self.anchors is not None:
            fields["anchors"] = list(self.anchors)
        return fields


def synopses_of(content: Any) -> list[Synopsis]:
    """Returns the synopses in decoded JSON: :meth:`Synopsis.list_from_json` after the decoding."""
    if not isinstance(content, list):
        return [_from_fields(content)]
    if not content:
        raise FormatError("a list of synopses must hold at least one, got none")
    synopses: dict[str, Synopsis] = {}
    for index, fields in enumerate(content):
        synopsis = _from_fields(fields, f"[{index}]")
        if synopsis.prompt in synopses:
            raise FormatError(
                "a list of synopses must have each prompt once, got "
                f"{shorten(synopsis.prompt)!r} twice"
            )
        synopses[synopsis.prompt] = synopsis
    return list(synopses.values())


def _from_fields(fields: Any, place: str = "") -> Synopsis:
    """Returns the synopsis of a decoded JSON object, at some place in its document."""
    try:
        read: Any = validate(_synopsis_form(), fields)
        return Synopsis(read.prompt, read.stages, read.anchors)
    except ValueError as error:
        where = f"{place}: " if place else ""
        raise FormatError(f"not a synopsis: {where}{error}") from None


def _decode(text: str) -> Any:
    try:
        return decode(text)
    except FormatError as error:
        raise FormatError(f"not a synopsis: {error}") from None


@functools.cache
def _synopsis_form() -> type[BaseModel]:
    """Returns the form of a synopsis in JSON, a pydantic model."""
    require_pydantic()
    from pydantic import AliasChoices, BaseModel, ConfigDict, Field

    class SynopsisFields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        prompt: str
        stages: list[str] = Field(
            validation_alias=AliasChoices("stages", "subprompts"), fail_fast=True
        )
        anchors: list[Annotated[int, Field(ge=0, le=LAST_FRAME)]] | None = Field(
            default=None, fail_fast=True
        )

    return SynopsisFields


def check_anchors(anchors: Any, num_stages: int) -> None:
    """Raises unless there is an anchor frame for each stage, increasing from 0.

    Raises:
        TypeError, ValueError: They are not.
    """
    if isinstance(anchors, str) or not isinstance(anchors, Sequence):
        raise TypeError(f"anchors must be a list of frames, got {type(anchors).__name__}")
    if not all(isinstance(frame, int) and not isinstance(frame, bool) for frame in anchors):
        raise TypeError(f"anchors must be integers, got {reprlib.repr(list(anchors))}")
    if len(anchors) != num_stages:
        raise ValueError(
            f"anchors must hold a frame for each of the {num_stages} stages, got {len(anchors)}"
        )
    if anchors[0] < 0 or any(a >= b for a, b in pairwise(anchors)):
        raise ValueError(
            f"anchors must increase strictly from 0 or later, got {reprlib.repr(list(anchors))}"
        )


def _dumps(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1)
