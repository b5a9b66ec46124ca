"""Language models behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from vstar_kernels.methods.sources import Messages, SourceError, shorten
from vstar_kernels.methods.vstar.instruction import Request

MODEL_VARIABLE = "OPENAI_MODEL"
KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
NO_KEY = "none"  # the client insists on a key where local servers want none
TRANSIENT = (408, 409, 425, 429)  # and 5xx
SHORTEST_SECRET = 8  # characters; shorter are placeholders, such as EMPTY, and may be words
LARGEST_BODY = 2**20  # bytes; a synopsis is about one thousand


class Endpoint:
    """Asks a chat model over HTTP with the ``openai`` client.

    The key goes into the requests' header and nowhere else: not into messages, the cache or
    :attr:`key`, not even where a server repeats it.

    Args:
        model: The model's name there; None is ``$OPENAI_MODEL``.
        base_url: Such as ``"http://localhost:8000/v1"``; None is ``$OPENAI_BASE_URL``, or else the
            client's own default.
        api_key: None is ``$OPENAI_API_KEY``; a server named by ``base_url`` may need none.
        timeout: Seconds after which an answer that is still coming in is given up, and the longest
            wait for its next bytes.
        options: Of the request, such as ``{"temperature": 0.7}``.

    Raises:
        ImportError: ``openai`` is not installed.
        ValueError: There is no model or key, or an argument is out of its range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                f"synopses over HTTP need openai ({error}): pip install 'vstar_kernels[synopsis]'"
            ) from error
        model = model or os.environ.get(MODEL_VARIABLE)
        base_url = base_url or os.environ.get(URL_VARIABLE) or None
        api_key = api_key or os.environ.get(KEY_VARIABLE)
        if not model:
            raise ValueError(f"model must be given, or be in ${MODEL_VARIABLE}, got none")
        if base_url is not None:
            _check_url(base_url)
        elif not api_key:
            raise ValueError(f"api_key must be given, or be in ${KEY_VARIABLE}, got none")
        if not timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
        self._openai = openai
        self._secret = api_key
        self._timeout = timeout
        self._client: Any = openai.OpenAI(
            api_key=api_key or NO_KEY, base_url=base_url, timeout=timeout, max_retries=0
        )
        self._request = {"model": model, **(options or {})}
        self.name = f"{model} at {self._client.base_url}"

    @property
    def key(self) -> dict[str, Any]:
        """The server, the model and the options."""
        return {"base_url": str(self._client.base_url), **self._request}

    def answer(self, request: Request, messages: Messages) -> str:
        """The text that the model gives for a conversation.

        Raises:
            SourceError: None came in time, or not in the interface's form.
        """
        try:
            return _content(self._redact(self._fetch(messages).decode("utf-8", errors="replace")))
        except self._openai.OpenAIError as error:
            raise self._failure(error) from None  # it holds the request and the key

    def _fetch(self, messages: Messages) -> bytes:
        """The body of the response; read here, so that a slow one can be given up."""
        create = self._client.chat.completions.with_streaming_response.create
        deadline = time.monotonic() + self._timeout
        body = b""
        with create(messages=messages, **self._request) as response:
            chunks = response.iter_bytes()
            while (chunk := self._next(chunks)) is not None:
                body += chunk
                if time.monotonic() > deadline:
                    raise SourceError(f"no answer in {self._timeout:g} s", transient=True)
                if len(body) > LARGEST_BODY:
                    raise SourceError(f"an answer of more than {LARGEST_BODY} bytes")
        return body

    @staticmethod
    def _next(chunks: Any) -> bytes | None:
        try:
            return next(chunks, None)
        # Of the HTTP library, which is one or another depending on the client's version.
        except Exception as error:
            name = type(error).__name__
            raise SourceError(f"the answer broke off ({name})", transient=True) from None

    def _failure(self, error: Any) -> SourceError:
        if isinstance(error, self._openai.APITimeoutError):
            return SourceError(f"no answer in {self._timeout:g} s", transient=True)
        status = getattr(error, "status_code", None)
        if status is None:
            reason = shorten(self._redact(str(error.__cause__ or error)))
            return SourceError(reason, transient=isinstance(error, self._openai.APIConnectionError))
        wait = _seconds(error.response.headers.get("retry-after"))
        transient = status in TRANSIENT or status >= 500
        return SourceError(
            f"HTTP status {status}: {shorten(self._redact(str(error)))}",
            transient=transient,
            wait=wait,
        )

    def _redact(self, text: str) -> str:
        if self._secret is None or len(self._secret) < SHORTEST_SECRET:
            return text
        return text.replace(self._secret, "[key]")


def _content(body: str) -> str:
    """The text in a response of the chat completions interface."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        shown = shorten(body) or "nothing"
        raise SourceError(f"not a chat completion: {shown}", transient=True) from None
    if not isinstance(content, str):
        raise SourceError("a chat completion without a text", transient=True)
    return content


def _check_url(base_url: str) -> None:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must be an http or https address, got {base_url!r}")
    if parts.username is not None or parts.query:  # they would be shown and stored
        raise ValueError("base_url must hold no credentials and no query: give the key as api_key")


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:  # a date
        return None
