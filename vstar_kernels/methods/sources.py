"""Where a synopsis can come from: what the sources share, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from vstar_kernels.methods.vstar.instruction import Request
from vstar_kernels.methods.vstar.synopsis import Synopsis

SHOWN = 300  # characters of somebody else's text in a message
Messages = list[dict[str, str]]


class SynopsisError(RuntimeError):
    """There is no synopsis; the message says why."""


class SourceError(SynopsisError):
    """A source gave no answer.

    Attributes:
        transient: Whether asking again may help.
        wait: For how many seconds the source asks to be left alone; None if it does not say.
    """

    def __init__(self, message: str, *, transient: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.transient = transient
        self.wait = wait


class Source(Protocol):
    """Answers the request for a synopsis.

    Attributes:
        name: For messages.
        key: What answers depend on beside the request, as JSON takes it; None if answers are not to
            be kept.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> dict[str, Any] | None: ...

    def answer(self, request: Request, messages: Messages) -> str | Synopsis:
        """A language model's text for a conversation, or a finished synopsis.

        Raises:
            SourceError: There is none.
        """


class File:
    """A file of synopses, or the answer of a language model that was put into a file.

    JSON is an object ``{"prompt": …, "stages": […]}`` or a list of them, ``"subprompts"`` being
    another name for ``"stages"``; the request's prompt chooses. Any other text is read as an answer
    to whatever is asked.
    """

    key = None

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.name = f"the file {self._path}"

    def answer(self, request: Request, messages: Messages) -> str | Synopsis:
        """The file's synopsis of the prompt, or its text.

        Raises:
            SourceError: The file cannot be read, or has no synopsis of this prompt.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"it cannot be read: {error}") from error
        if not _holds_synopses(text):
            return text
        try:
            synopses = Synopsis.list_from_json(text)
        except ValueError as error:
            raise SourceError(str(error)) from error
        for synopsis in synopses:
            if synopsis.prompt == request.prompt:
                return synopsis
        there = ", ".join(repr(synopsis.prompt) for synopsis in synopses)
        raise SourceError(f"it has none, but synopses of {shorten(there)}")


def _holds_synopses(text: str) -> bool:
    """Whether a text is JSON with a prompt in it, rather than a language model's answer."""
    try:
        content = json.loads(text)
    except ValueError:
        return False
    items = content if isinstance(content, list) else [content]
    return any(isinstance(item, dict) and "prompt" in item and len(item) > 1 for item in items)


def shorten(text: str) -> str:
    """A text on one line, of limited length."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
