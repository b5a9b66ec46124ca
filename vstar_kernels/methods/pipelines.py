"""What differs between diffusers' pipelines: how they are called, and how they encode a text."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.models.schedule import as_indices

PIPELINES = (
    "TextToVideoSDPipeline",
    "AnimateDiffPipeline",
    "I2VGenXLPipeline",
    "LattePipeline",
)
# Of full-3D transformers, and what attribute says how many frames make a latent one. Those of
# TEXT_APART attend to text crosswise, so that each latent frame may have its own.
TEXT_APART = {
    "WanPipeline": "vae_scale_factor_temporal",
    "SkyReelsV2Pipeline": "vae_scale_factor_temporal",
    "AnyFlowPipeline": "vae_scale_factor_temporal",
    "LTXPipeline": "vae_temporal_compression_ratio",
    "AllegroPipeline": "vae_scale_factor_temporal",
    "CosmosTextToWorldPipeline": "vae_scale_factor_temporal",
}
FULL3D = TEXT_APART | {
    "CogVideoXPipeline": "vae_scale_factor_temporal",
    "HunyuanVideoPipeline": "vae_scale_factor_temporal",
    "MochiPipeline": "vae_temporal_scale_factor",
}
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
TEXT_OPTIONS = (
    "negative_prompt",
    "clip_skip",
    "clean_caption",
    "mask_feature",
    "max_sequence_length",
)


class Encoded(NamedTuple):
    """Texts as a pipeline encodes its prompts.

    Attributes:
        embeddings: ``(texts, tokens, channels)``.
        negative: Of the negative prompt, ``(tokens, channels)``; None where it is not needed.
        mask, negative_mask: ``(texts, tokens)`` and ``(tokens,)``: which tokens exist; None: all.
    """

    embeddings: Tensor
    negative: Tensor | None = None
    mask: Tensor | None = None
    negative_mask: Tensor | None = None


class PipelineCall:
    """A call of a pipeline for one video.

    Args:
        pipe: One of ``PIPELINES`` or ``FULL3D``, or of a class derived from one.
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

    def check_frames(self, num_frames: int) -> None:
        """Raises ValueError if the pipeline would make another number of frames.

        The message names the numbers next to it that it does make.
        """
        kind = _kind(self._pipe, FULL3D)
        if not kind or _makes(kind, num_frames, self.frames_of_a_latent):
            return
        near = [
            next(n for n in count if _makes(kind, n, self.frames_of_a_latent))
            for count in (itertools.count(num_frames, -1), itertools.count(num_frames))
        ]
        raise ValueError(
            f"num_frames must be a number of frames that {type(self._pipe).__name__} makes, such "
            f"as {near[0]} or {near[1]}, got {num_frames}: a latent frame is of "
            f"{self.frames_of_a_latent}"
        )

    @property
    def frames_of_a_latent(self) -> int:
        """How many frames of the video a latent frame is of; the first may be of fewer."""
        name = _kind(self._pipe, FULL3D)
        return int(getattr(self._pipe, FULL3D[name])) if name else 1

    @torch.no_grad()
    def encode(self, texts: tuple[str, ...]) -> Encoded:
        """Returns the embeddings of some texts, and of the negative prompt if it is needed.

        Each text is encoded as the pipeline encodes a prompt. Latte's cuts the padding off: shorter
        texts are filled with zeros, which is what it does to several prompts.
        """
        arguments = self._text_arguments()
        with _text_model(self._pipe):
            found = [self._pipe.encode_prompt(text, **arguments) for text in texts]
        masked = len(found[0]) == 4  # each embedding is followed by its mask
        positive = [encoded[0][0] for encoded in found]
        embeddings = torch.nn.utils.rnn.pad_sequence(positive, batch_first=True)
        mask = torch.stack([encoded[1][0].bool() for encoded in found]) if masked else None
        if not self.guided:
            return Encoded(embeddings, mask=mask)
        # The negative prompt is cut as the positive one is: of the longest nothing is missing.
        negative = max((encoded[2 if masked else 1][0] for encoded in found), key=len)
        return Encoded(embeddings, negative, mask, found[0][3][0].bool() if masked else None)

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


def check_sampling(pipe: Any, options: Mapping[str, Any], maps: Any) -> None:
    """Raises for what a pipeline would be told too late: its steps, its guidance, steps of maps.

    Args:
        pipe: A pipeline.
        options: Its arguments; those that are left out have its defaults.
        maps: Whether maps are captured, or the indices of the steps at which they are.

    Raises:
        TypeError, ValueError: An option is of the wrong kind, or no sampling has it.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    scale = options.get("guidance_scale", parameters["guidance_scale"].default)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"guidance_scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    has_own = any(options.get(name) is not None for name in ("timesteps", "sigmas"))
    count = options.get("num_inference_steps", parameters["num_inference_steps"].default)
    if not has_own:
        check_integer("num_inference_steps", count, 1)
    if isinstance(maps, bool):
        return
    allowed = "True, False or indices of denoising steps"
    if maps is None:
        raise TypeError(f"maps must be {allowed}, got None")
    steps = as_indices("maps", maps, allowed)
    if steps and not has_own and max(steps) >= count:
        raise ValueError(
            f"maps must be of steps below num_inference_steps, {count}, got {max(steps)}"
        )


def check_pipeline(pipe: Any) -> None:
    """Raises TypeError unless it is one of ``PIPELINES`` or ``FULL3D``."""
    known = (*PIPELINES, *FULL3D)
    if not _kind(pipe, known):
        raise TypeError(
            f"pipe must be one of diffusers' {', '.join(known)}, got {type(pipe).__name__}; "
            "with others, combine apply_tar, condition_frames and capture_maps"
        )


def is_full3d(pipe: Any) -> bool:
    """Returns whether a pipeline's model is a full-3D transformer."""
    return bool(_kind(pipe, FULL3D))


def has_text_apart(pipe: Any) -> bool:
    """Returns whether frames may have texts of their own."""
    return bool(_kind(pipe, (*PIPELINES, *TEXT_APART)))


def _kind(pipe: Any, names: Iterable[str]) -> str:
    """Returns which of the classes a pipeline is of, by name; nothing if it is of none."""
    classes = [cls.__name__ for cls in type(pipe).__mro__]
    return next((name for name in names if name in classes), "")


def _makes(kind: str, num_frames: int, every: int) -> bool:
    """Returns whether a full-3D pipeline makes as many frames as it is asked for.

    It samples ⌊(frames − 1) / every⌋ + 1 latent frames, of which the first is decoded to one frame.
    CogVideoX's decoder takes them two by two, and the first is one frame only where their number is
    odd. Allegro cuts off what is too much, and has an odd latent frame for 3 more than a multiple.
    """
    if kind == "CogVideoXPipeline":
        return num_frames == 1 or num_frames % (2 * every) in (0, 1)
    if kind == "AllegroPipeline":
        return num_frames % 2 == 0 or num_frames % every == 1
    return num_frames % every == 1 or every == 1


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
