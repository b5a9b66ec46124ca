"""What writers have in common: a source that they ask, how often, and a cache of its answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.methods.llm.ask import LanguageModel, Messages, ask
from vstar_kernels.methods.llm.cache import Cache, default_folder
from vstar_kernels.methods.llm.chat_model import ChatModel
from vstar_kernels.methods.llm.endpoint import Endpoint

if TYPE_CHECKING:
    from pydantic import BaseModel
    from typing_extensions import Self

MOST_ATTEMPTS = 100
Form = TypeVar("Form", bound="BaseModel")


class Writer:
    """Asks a language model for something, or takes it from a file.

    Args:
        source: What answers: a language model, or the writer's kind of file.
        attempts: For how many answers to each question to ask, at most.
        cache: The folder that keeps answers; True is ``$VSTAR_KERNELS_CACHE`` or
            ``$XDG_CACHE_HOME/vstar_kernels/synopses``, False is none. Files are not cached.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or out of its range.
    """

    file_type: ClassVar[type]

    def __init__(self, source: Any, *, attempts: int = 3, cache: str | Path | bool = True) -> None:
        check_integer("attempts", attempts, 1, MOST_ATTEMPTS)
        if not isinstance(source, (LanguageModel, self.file_type)):
            raise TypeError(
                f"source must be a language model or a {self.file_type.__name__}, got "
                f"{type(source).__name__}: see from_endpoint, from_transformers and from_file"
            )
        self._source: Any = source
        self._attempts = attempts
        self._cache: Cache | None = None
        if not isinstance(cache, bool | str | os.PathLike) or cache == "":
            raise TypeError(f"cache must be True, False or a folder, got {cache!r}")
        if cache is not False:
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
        attempts: int = 3,
        **settings: Any,
    ) -> Self:
        """Makes a writer that asks an :class:`vstar_kernels.methods.llm.endpoint.Endpoint`.

        Those that are left out are taken from ``$OPENAI_MODEL``, ``$OPENAI_BASE_URL`` and
        ``$OPENAI_API_KEY``. A request that fails is made ``attempts`` times at most. ``settings``
        are those of the class.
        """
        check_integer("attempts", attempts, 1, MOST_ATTEMPTS)
        endpoint = Endpoint(
            model,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            options=options,
            retries=attempts - 1,
        )
        return cls(endpoint, attempts=attempts, **settings)

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        max_new_tokens: int = 1024,
        **settings: Any,
    ) -> Self:
        """Makes a writer that asks a :class:`vstar_kernels.methods.llm.chat_model.ChatModel`."""
        chat_model = ChatModel(model, tokenizer, device=device, max_new_tokens=max_new_tokens)
        return cls(chat_model, **settings)

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> Self:
        """Makes a writer that takes what it writes from a file, its :attr:`file_type`."""
        return cls(cls.file_type(path), **settings)

    def _ask(self, messages: Messages, form: type[Form], *, refresh: bool) -> Form:
        """Returns the language model's answer of a form, or the one in the cache.

        Raises:
            AnswerError: There is none after all attempts.
        """
        return ask(
            self._source,
            messages,
            form,
            attempts=self._attempts,
            cache=self._cache,
            refresh=refresh,
        )
