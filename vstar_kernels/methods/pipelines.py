"""What differs between diffusers' pipelines: how they are called, and how they encode a text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PIPELINES = (
    "TextToVideoSDPipeline",
    "AnimateDiffPipeline",
    "I2VGenXLPipeline",
    "LattePipeline",
)
FRAMES = ("num_frames", "video_length")
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
# Arguments of pipelines that are given otherwise here, and how.
OURS = {
    "prompt": "give the prompt or a Synopsis as the first argument",
    "prompt_embeds": "give the prompt or a Synopsis as the first argument",
    "negative_prompt_embeds": "give negative_prompt",
    "generator": "give seed",
    "return_dict": "the result is a Generation",
    **dict.fromkeys(FRAMES, "give num_frames"),
    **dict.fromkeys(COUNTS, "call again with another seed"),
}
# What a pipeline passes from its own arguments to `encode_prompt`, where it has them.
TEXT_OPTIONS = ("negative_prompt", "clip_skip", "clean_caption", "mask_feature")


class PipelineCall:
    """A call of a pipeline for one video.

    Args:
        pipe: One of ``PIPELINES``, or of a class derived from one.
        options: Its arguments, but for those in ``OURS``; the rest have the pipeline's defaults.

    Raises:
        TypeError: ``pipe`` is not such a pipeline, or does not know an option.
        ValueError: An option is one of ``OURS``, or the image to animate is missing.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        check_pipeline(pipe)
        self._pipe = pipe
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        for name in options:
            if name in OURS:
                raise ValueError(f"{name} is set here: {OURS[name]}")
            if name not in self._parameters:
                raise TypeError(f"{type(pipe).__name__} takes no argument {name!r}")
        if "image" in self._parameters and options.get("image") is None:
            raise ValueError(f"image must be given: {type(pipe).__name__} animates one")
        self._options = dict(options)

    @property
    def guided(self) -> bool:
        """Whether it is under classifier-free guidance."""
        return self._get("guidance_scale") > 1

    @torch.no_grad()
    def encode(self, texts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Returns the embeddings of some texts, and of the negative prompt if it is needed.

        Each text is encoded as the pipeline encodes a prompt. Latte's cuts the padding off: shorter
        texts are filled with zeros, which is what it does to several prompts.

        Returns:
            ``(texts, tokens, channels)``, and ``(tokens, channels)`` or None.
        """
        arguments = self._text_arguments()
        with _text_model(self._pipe):
            pairs = [self._pipe.encode_prompt(text, **arguments) for text in texts]
        positive = [pair[0][0] for pair in pairs]
        embeddings = torch.nn.utils.rnn.pad_sequence(positive, batch_first=True)
        if not self.guided:
            return embeddings, None
        # The negative prompt is cut as the positive one is: of the longest nothing is missing.
        negative = max((pair[1][0] for pair in pairs), key=len)
        return embeddings, negative

    def sample(self, prompt: str, num_frames: int, seed: int) -> Any:
        """Makes one video, in the pipeline's ``output_type``, by default PIL images."""
        frames_name = next(name for name in FRAMES if name in self._parameters)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        settings = {"output_type": "pil", **self._options, frames_name: num_frames}
        with _text_model(self._pipe), _seeded(seed, self._pipe._execution_device):
            return self._pipe(prompt=prompt, generator=generator, **settings).frames[0]

    def _get(self, name: str) -> Any:
        return self._options.get(name, self._parameters[name].default)

    def _text_arguments(self) -> dict[str, Any]:
        pipe, known = self._pipe, inspect.signature(type(self._pipe).encode_prompt).parameters
        arguments: dict[str, Any] = {name: 1 for name in COUNTS if name in known}
        arguments |= {
            name: self._get(name)
            for name in TEXT_OPTIONS
            if name in known and name in self._parameters
        }
        arguments["device"] = pipe._execution_device
        if "lora_scale" in known:
            arguments["lora_scale"] = (self._get("cross_attention_kwargs") or {}).get("scale")
        if "do_classifier_free_guidance" in known:
            arguments["do_classifier_free_guidance"] = self.guided
        else:  # I2VGenXLPipeline reads it off itself, and is told by its own call only
            pipe._guidance_scale = self._get("guidance_scale")
        return arguments


def check_pipeline(pipe: Any) -> None:
    """Raises TypeError unless it is one of ``PIPELINES``."""
    if {cls.__name__ for cls in type(pipe).__mro__}.isdisjoint(PIPELINES):
        raise TypeError(
            f"pipe must be one of diffusers' {', '.join(PIPELINES)}, got {type(pipe).__name__}; "
            "with others, combine apply_tar, condition_frames and capture_maps"
        )


@contextmanager
def _text_model(pipe: Any) -> Iterator[None]:
    """Gives the text encoder its ``text_model`` for a while.

    Pipelines take ``text_encoder.text_model.final_layer_norm`` under ``clip_skip``, I2VGen-XL's by
    default; in transformers 5 the encoder is that model itself.
    """
    encoder = pipe.text_encoder
    if hasattr(encoder, "text_model") or not hasattr(encoder, "final_layer_norm"):
        yield
        return
    try:
        # Not by assignment, which would make the module a part of itself.
        encoder.__dict__["text_model"] = encoder
        yield
    finally:
        encoder.__dict__.pop("text_model", None)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators for a while: I2VGen-XL encodes its image with them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
