"""Writes synopses: asks a source, reads its answer, asks again, keeps the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vstar_kernels.methods.answers import parse_stages
from vstar_kernels.methods.cache import Cache, default_folder
from vstar_kernels.methods.chat_model import ChatModel
from vstar_kernels.methods.endpoint import Endpoint
from vstar_kernels.methods.sources import File, Source, SourceError, SynopsisError, shorten
from vstar_kernels.methods.vstar import instruction
from vstar_kernels.methods.vstar.instruction import Request
from vstar_kernels.methods.vstar.synopsis import Synopsis

LEAST_STAGES, MOST_STAGES = 2, 12
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for


class SynopsisWriter:
    """Video synopsis prompting: splits a prompt into stages (VSTAR, arXiv 2403.13501, section 3.1).

    >>> writer = vk.SynopsisWriter.from_endpoint("llama3", base_url="http://localhost:11434/v1")
    >>> writer.write("A rose blooms in a garden.", num_stages=4)

    A language model is told the rules and shown one example
    (:mod:`vstar_kernels.methods.vstar.instruction`). An answer that is not understood, or has the
    wrong number of stages, is sent back with what is wrong; a server that fails is tried again,
    later each time.

    Args:
        source: What answers; see :meth:`from_endpoint`, :meth:`from_transformers` and
            :meth:`from_file`.
        least_stages, most_stages: How many stages a synopsis may have.
        attempts: How often to ask, at most.
        wait: Seconds before asking a failing server again, doubled each time; its ``Retry-After``
            goes before.
        cache: The folder that keeps answers; True is ``$VSTAR_KERNELS_CACHE`` or
            ``$XDG_CACHE_HOME/vstar_kernels/synopses``, False is none. Files are not cached.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        source: Source,
        *,
        least_stages: int = LEAST_STAGES,
        most_stages: int = MOST_STAGES,
        attempts: int = 3,
        wait: float = 1.0,
        cache: str | Path | bool = True,
    ) -> None:
        if not 1 <= least_stages <= most_stages:
            raise ValueError(
                "least_stages must be at least 1 and at most most_stages, got "
                f"{least_stages} and {most_stages}"
            )
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        if wait < 0:
            raise ValueError(f"wait must be at least 0 seconds, got {wait}")
        self._source = source
        self._limits = least_stages, most_stages
        self._attempts = attempts
        self._wait = wait
        self._cache: Cache | None = None
        if cache is not False and source.key is not None:
            self._cache = Cache(default_folder() if cache is True else cache)

    @classmethod
    def from_endpoint(
        cls,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> SynopsisWriter:
        """Ask a model over HTTP: :class:`vstar_kernels.methods.endpoint.Endpoint`'s arguments.

        Those that are left out are taken from ``$OPENAI_MODEL``, ``$OPENAI_BASE_URL`` and
        ``$OPENAI_API_KEY``. ``settings`` are those of :class:`SynopsisWriter`.
        """
        endpoint = Endpoint(
            model, base_url=base_url, api_key=api_key, timeout=timeout, options=options
        )
        return cls(endpoint, **settings)

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        max_new_tokens: int = 1024,
        **settings: Any,
    ) -> SynopsisWriter:
        """Ask a model here: :class:`vstar_kernels.methods.chat_model.ChatModel`'s arguments."""
        chat_model = ChatModel(model, tokenizer, device=device, max_new_tokens=max_new_tokens)
        return cls(chat_model, **settings)

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> SynopsisWriter:
        """Take synopses, or an answer, from a :class:`vstar_kernels.methods.sources.File`."""
        return cls(File(path), **{"attempts": 1, **settings})

    def write(
        self, prompt: str, *, num_stages: int | None = None, refresh: bool = False
    ) -> Synopsis:
        """The synopsis of a prompt.

        Args:
            prompt: The video as a whole, in a sentence.
            num_stages: How many stages; None leaves it to the source, within the limits.
            refresh: Ask even if there is an answer in the cache, and replace that.

        Raises:
            SynopsisError: The source has none after all attempts; the message says what came.
            ValueError: The prompt is empty, or num_stages is outside of the limits.
        """
        request = self._request(prompt, num_stages)
        entry = self._entry(request)
        if self._cache is not None and not refresh and (stages := self._cache.get(entry)):
            return Synopsis(prompt, stages)
        synopsis = self._ask(request)
        if self._cache is not None:
            self._cache.put(entry, list(synopsis.stages))
        return synopsis

    def _request(self, prompt: str, num_stages: int | None) -> Request:
        least, most = self._limits
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt must be a text that is not empty, got {prompt!r}")
        if num_stages is None:
            return Request(prompt, least, most)
        if not least <= num_stages <= most:
            raise ValueError(
                f"num_stages must be from {least} to {most} (least_stages, most_stages), "
                f"got {num_stages}"
            )
        return Request(prompt, num_stages, num_stages)

    def _entry(self, request: Request) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "instruction": instruction.VERSION,
            "prompt": request.prompt,
            "stages": [request.least, request.most],
            "source": self._source.key,
        }

    def _ask(self, request: Request) -> Synopsis:
        messages, problems = request.messages, []
        for attempt in range(self._attempts):
            try:
                answer = self._source.answer(request, messages)
            except SourceError as error:
                problems.append(str(error))
                if not error.transient:
                    break
                if attempt + 1 < self._attempts:
                    wait = self._wait * 2**attempt if error.wait is None else error.wait
                    time.sleep(min(wait, LONGEST_WAIT))
                continue
            try:
                return _read(answer, request)
            except ValueError as error:
                problems.append(f"{error}, in {shorten(str(answer))!r}")
                messages = request.messages + instruction.correction(str(answer), str(error))
        raise SynopsisError(
            f"no synopsis of {request.prompt!r} from {self._source.name}: " + _listed(problems)
        )


def _read(answer: str | Synopsis, request: Request) -> Synopsis:
    """The synopsis in an answer, or ValueError."""
    if isinstance(answer, str):
        answer = Synopsis(request.prompt, parse_stages(answer))
    request.check(list(answer.stages))
    return answer


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "; ".join(f"attempt {number}: {what}" for number, what in enumerate(problems, start=1))
