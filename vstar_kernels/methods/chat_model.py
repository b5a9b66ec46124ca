"""Language models of ``transformers``, run here."""

from __future__ import annotations

from typing import Any

from vstar_kernels.methods.sources import Messages, SourceError, shorten
from vstar_kernels.methods.vstar.instruction import Request


class ChatModel:
    """Asks a chat model of ``transformers``, greedily, so that an answer can be had again.

    Args:
        model: A folder or a name on the Hugging Face hub, loaded here; or a causal language model
            that is loaded already.
        tokenizer: With a chat template; None loads the one of ``model``, if that is a name.
        device: For a model that is loaded here; None is a GPU where there is one.
        max_new_tokens: The longest answer.

    Raises:
        ImportError: ``transformers`` is not installed.
        ValueError: The tokenizer is missing or has no chat template, the model cannot be loaded, or
            an argument is out of its range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not isinstance(model, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given with a model that is loaded already")
            if device is not None:
                raise ValueError("device is for a model that is loaded here: move yours yourself")
        self._model, self._tokenizer = _load(model, tokenizer, device)
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"tokenizer must have a chat template, {type(self._tokenizer).__name__} has none: "
                "choose a model that is made for chat"
            )
        self._max_new_tokens = max_new_tokens
        self._known_as = model if isinstance(model, str) else ""
        self.name = self._known_as or type(self._model).__name__

    @property
    def key(self) -> dict[str, Any] | None:
        """The model's name and the longest answer; None where a model has been given without."""
        if not self._known_as:
            return None
        return {"transformers": self._known_as, "max_new_tokens": self._max_new_tokens}

    def answer(self, request: Request, messages: Messages) -> str:
        """The text that the model gives for a conversation.

        Raises:
            SourceError: The conversation does not fit the model or its template.
        """
        import torch

        try:
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self._model.device)
            length = inputs["input_ids"].shape[1]
            self._check_length(length)
            with torch.no_grad():
                output = self._model.generate(
                    **inputs, max_new_tokens=self._max_new_tokens, do_sample=False
                )
        # Templates are programs of their own, which may refuse, say, a system message.
        except (ValueError, _template_error()) as error:
            raise SourceError(f"{type(error).__name__}: {shorten(str(error))}") from error
        return self._tokenizer.decode(output[0, length:], skip_special_tokens=True)

    def _check_length(self, length: int) -> None:
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None and length + self._max_new_tokens > room:
            raise ValueError(
                f"the conversation has {length} tokens, which with max_new_tokens, "
                f"{self._max_new_tokens}, are more than the model's {room}"
            )


def _load(model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"local language models need transformers ({error}): "
            "pip install 'vstar_kernels[diffusers]'"
        ) from error
    if not isinstance(model, str):
        return model, tokenizer
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {model} cannot be loaded: {shorten(str(error))}") from error
    return loaded.eval().to(device), tokenizer


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError
