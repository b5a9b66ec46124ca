"""A chat model of ``transformers`` that is run here."""

from __future__ import annotations

from typing import Any

from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.methods.llm.ask import AnswerError, Messages
from vstar_kernels.reading import require_pydantic, shorten


class ChatModel:
    """A chat model of ``transformers`` that is run here, greedily: an answer can be had again.

    Args:
        model: A folder or a name on the Hugging Face hub, loaded here; or a causal language model
            that is loaded already.
        tokenizer: With a chat template; None loads the one of ``model``, if that is a name.
        device: For a model that is loaded here; None is a GPU where there is one.
        max_new_tokens: The longest answer.

    Raises:
        ImportError: ``transformers`` or ``pydantic`` is not installed.
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
        require_pydantic()
        check_integer("max_new_tokens", max_new_tokens, 1)
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
        self._hub_name = model if isinstance(model, str) else ""
        self.name = self._hub_name or type(self._model).__name__

    @property
    def key(self) -> dict[str, Any] | None:
        """The model's name and the longest answer; None where a model has been given without."""
        if not self._hub_name:
            return None
        return {"transformers": self._hub_name, "max_new_tokens": self._max_new_tokens}

    def redact(self, text: str) -> str:
        """Returns the text: no key is used here."""
        return text

    def answer(self, messages: Messages, schema: dict[str, Any]) -> str:
        """Returns the text that the model gives for a conversation.

        Raises:
            AnswerError: The conversation does not fit the model or its template.
        """
        import torch
        from jinja2 import TemplateError

        try:
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self._model.device)
            length = inputs["input_ids"].shape[1]
            self._check_length(length)
            # A tokenizer may return more, such as token types, which not every model takes.
            taken = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                output = self._model.generate(
                    **taken, max_new_tokens=self._max_new_tokens, do_sample=False
                )
        # Templates are programs of their own, which may refuse, say, a system message.
        except (ValueError, TemplateError) as error:
            raise AnswerError(f"{type(error).__name__}: {shorten(str(error))}") from error
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
    # Which model, and whether its newest revision or a downloaded one, is the caller's to choose.
    try:
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)  # nosec B615
        loaded = transformers.AutoModelForCausalLM.from_pretrained(  # nosec B615
            model, dtype="auto"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {model} cannot be loaded: {shorten(str(error))}") from error
    return loaded.eval().to(device), tokenizer
