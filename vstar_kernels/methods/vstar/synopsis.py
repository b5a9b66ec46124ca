"""The synopsis of a video: its prompt, told in stages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

STAGES_KEYS = ("stages", "subprompts")
KEYS = ("prompt", *STAGES_KEYS, "anchors")


@dataclass(frozen=True)
class Synopsis:
    """A video in stages, one description for each (VSTAR, arXiv 2403.13501, section 3.1).

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
        _check_text(self.prompt, "prompt")
        if isinstance(self.stages, str) or not isinstance(self.stages, Sequence):
            raise TypeError(f"stages must be a list of texts, got {type(self.stages).__name__}")
        if not self.stages:
            raise ValueError("stages must hold at least one description, got none")
        for index, stage in enumerate(self.stages):
            _check_text(stage, f"stages[{index}]")
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.anchors is not None:
            check_anchors(self.anchors, len(self.stages))
            object.__setattr__(self, "anchors", tuple(self.anchors))

    def to_json(self) -> str:
        """``{"prompt": …, "stages": […]}``, with ``"anchors"`` where there are any."""
        return _dumps(self._fields("stages"))

    @classmethod
    def from_json(cls, text: str) -> Synopsis:
        """What :meth:`to_json` gave; ``"subprompts"`` may stand for ``"stages"``.

        Raises:
            ValueError: It is not JSON, not one such object, or its content is not a synopsis.
        """
        return cls._from_fields(_loads(text))

    @classmethod
    def list_from_json(cls, text: str) -> list[Synopsis]:
        """Several: a list of ``{"prompt": …, "subprompts": […]}``, or a single object.

        Raises:
            ValueError: As :meth:`from_json`, or the list is empty or has a prompt twice.
        """
        content = _loads(text)
        synopses = [
            cls._from_fields(x) for x in (content if isinstance(content, list) else [content])
        ]
        if not synopses:
            raise ValueError("a list of synopses must hold at least one, got none")
        prompts = [synopsis.prompt for synopsis in synopses]
        for prompt in prompts:
            if prompts.count(prompt) > 1:
                raise ValueError(
                    f"a list of synopses must have each prompt once, got {prompt!r} twice"
                )
        return synopses

    @staticmethod
    def list_to_json(synopses: Iterable[Synopsis]) -> str:
        """The list that :meth:`list_from_json` reads."""
        return _dumps([synopsis._fields("subprompts") for synopsis in synopses])

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Synopsis:
        """Read what :meth:`save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def _fields(self, stages_key: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"prompt": self.prompt, stages_key: list(self.stages)}
        if self.anchors is not None:
            fields["anchors"] = list(self.anchors)
        return fields

    @classmethod
    def _from_fields(cls, fields: Any) -> Synopsis:
        if not isinstance(fields, dict):
            raise ValueError(f"a synopsis must be a JSON object, got {type(fields).__name__}")
        for key in fields:
            if key not in KEYS:
                raise ValueError(
                    f"unknown key {key!r} in a synopsis: allowed are {', '.join(KEYS)}"
                )
        given = [key for key in STAGES_KEYS if key in fields]
        if "prompt" not in fields or len(given) != 1:
            raise ValueError(
                "a synopsis must have a prompt and either stages or subprompts, got the keys "
                f"{', '.join(fields) or '(none)'}"
            )
        try:
            return cls(fields["prompt"], fields[given[0]], fields.get("anchors"))
        except TypeError as error:  # of JSON the types are part of the value
            raise ValueError(str(error)) from None


def check_anchors(anchors: Any, num_stages: int) -> None:
    """Raise unless there is an anchor frame for each stage, increasing from 0.

    Raises:
        TypeError, ValueError: They are not.
    """
    if isinstance(anchors, str) or not isinstance(anchors, Sequence):
        raise TypeError(f"anchors must be a list of frames, got {type(anchors).__name__}")
    if not all(isinstance(frame, int) and not isinstance(frame, bool) for frame in anchors):
        raise TypeError(f"anchors must be integers, got {list(anchors)}")
    if len(anchors) != num_stages:
        raise ValueError(
            f"anchors must hold a frame for each of the {num_stages} stages, got {len(anchors)}"
        )
    if anchors[0] < 0 or any(a >= b for a, b in pairwise(anchors)):
        raise ValueError(f"anchors must increase strictly from 0 or later, got {list(anchors)}")


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r}")


def _dumps(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a synopsis must be JSON: {error}") from None
