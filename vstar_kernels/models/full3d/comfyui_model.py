"""ComfyUI's full-3D transformers, and attention within single calls of them done in another way.

ComfyUI hands every attention of such a model to ``optimized_attention_override``, self-attention
and cross-attention alike. Which of them is meant is told by the modules that are being called
meanwhile. As for TAR (``models/comfyui.py``) all is put back when the call of the model ends.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vstar_kernels.attention.frames.layout import Frames
from vstar_kernels.models.hooks import Argument, Hooks

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class ComfyFamily:
    """Full-3D transformers of ComfyUI that are reached in the same way.

    Attributes:
        name: As people call it.
        models: The names of its models' classes; others, subclasses too, are not known to fit.
        layers: Matches the names of the modules in each of which the video attends to itself once.
        text_first: Whether tokens that belong to no frame may come before those of the video: a
            text, or a reference image.
        every: How many frames of the video a latent one is made of; the first is of one.
        text_layers: Matches the names of the modules in each of which the video attends to the text
            once; None where text and video are one sequence.
        refused: Arguments that put tokens of other times or videos into the sequence.
        text_last: The attribute of a layer that is true where the text comes after the video.
    """

    name: str
    models: tuple[str, ...]
    layers: str
    text_first: bool
    every: int
    text_layers: str | None = None
    refused: tuple[str, ...] = ()
    text_last: str | None = None

    def frames(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str
    ) -> Frames:
        """Returns the video's frames of tokens in a call of the model.

        Args:
            model, args, kwargs: The model, and what it is called with.
            what: What counts the frames, for errors, such as "a frame rule".

        Raises:
            ValueError: The sequence is not that of one video.
        """
        for name in self.refused:
            if Argument(model, name).get(args, kwargs) is not None:
                raise ValueError(
                    f"with {what}, {self.name} does not support {name}, which puts frames of "
                    "other times or videos into the sequence"
                )
        sample = Argument(model, 0).get(args, kwargs)
        if not isinstance(sample, Tensor) or sample.ndim != 5:
            given = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(
                f"{what} needs the latents of a video, (batch, channels, frames, height, width); "
                f"this {type(model).__name__} is called with {given}"
            )
        patch: Any = getattr(model, "patch_size", (1, 1, 1))
        count, height, width = (
            math.ceil(size / step) for size, step in zip(sample.shape[2:], patch, strict=True)
        )
        return Frames(count, height * width)


FAMILIES = (
    ComfyFamily(
        "Wan",
        ("WanModel", "VaceWanModel", "CameraWanModel"),
        r"blocks\.\d+\.self_attn",
        text_first=True,
        every=4,
        text_layers=r"(?:vace_)?blocks\.\d+\.cross_attn",
        refused=("time_dim_concat", "context_latents"),
    ),
    ComfyFamily(
        "HunyuanVideo",
        ("HunyuanVideo",),
        r"(?:double|single)_blocks\.\d+",
        text_first=True,
        every=4,
        text_last="flipped_img_txt",  # of ComfyUI before 0.20
    ),
    ComfyFamily(
        "LTX-Video",
        ("LTXVModel",),
        r"transformer_blocks\.\d+\.attn1",
        text_first=False,
        every=8,
        text_layers=r"transformer_blocks\.\d+\.attn2",
        refused=("keyframe_idxs",),
    ),
)


def family_of(model: nn.Module) -> ComfyFamily | None:
    """Returns the family of a diffusion model; None where it is of none."""
    return next((x for x in FAMILIES if type(model).__name__ in x.models), None)


def listed(families: tuple[ComfyFamily, ...]) -> str:
    """Returns families with the names of their classes, for errors."""
    return ", ".join(f"{family.name} ({', '.join(family.models)})" for family in families)


def layers_named(model: nn.Module, pattern: str, what: str) -> list[tuple[str, nn.Module]]:
    """Returns the modules whose names match as a whole, in the model's order, one of each block.

    Args:
        model: Whose they are.
        pattern: Begins with the lists of the model's blocks.
        what: What is to change them, for errors.

    Raises:
        ValueError: A block has none, as where something else has been put around it.
    """
    found = [x for x in model.named_modules() if re.fullmatch(pattern, x[0])]
    lists = pattern.partition(r"\.")[0]
    blocks = [x for name, x in model.named_children() if re.fullmatch(lists, name)]
    count = sum(len(x) for x in blocks if isinstance(x, nn.ModuleList))
    if len(found) != count or not found:
        raise ValueError(
            f"{what} finds its layers in {len(found)} of the {count} blocks of this "
            f"{type(model).__name__}: another node has put something around the others, such as "
            "torch.compile around each block, and the two cannot be on together"
        )
    return found


def options_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str
) -> dict[str, Any]:
    """Returns the ``transformer_options`` of a call, by which attention is reached.

    Raises:
        ValueError: There are none.
    """
    options = Argument(model, "transformer_options").get(args, kwargs)
    if options is None:
        raise ValueError(
            f"this {type(model).__name__} is called without transformer_options, by which alone "
            f"{what} reaches its attention"
        )
    found: dict[str, Any] = options
    return found


@dataclass(frozen=True, eq=False)
class Attention:
    """A call of one of ComfyUI's attention functions.

    Attributes:
        query, key, value: ``(batch, tokens, heads, head_dim)``; keys may have fewer heads.
        mask: As it was given; None for none.
        scale: The factor on logits; None for 1/√head_dim.
        heads_first: Whether the result is ``(batch, heads, tokens, head_dim)``, and not ``(batch,
            tokens, channels)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    heads_first: bool

    @classmethod
    def of_call(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        scale: float | None = None,
        **unused: Any,
    ) -> Attention:
        """Reads the arguments of such a function.

        ``unused`` are hints on how to compute it, which frame_attention does in float32.
        """
        if skip_reshape:  # (batch, heads, tokens, head_dim)
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        else:  # (batch, tokens, channels); fewer heads of keys have fewer channels
            head_dim = q.shape[-1] // heads
            query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        return cls(query, key, value, mask, scale, skip_output_reshape)

    def result(self, out: Tensor) -> Tensor:
        """Returns what attended, ``(batch, tokens, heads, head_dim)``, as the function does."""
        return out.transpose(1, 2) if self.heads_first else out.flatten(-2)


class AttentionChange:
    """Attention in some layers during one call of a model, done in another way.

    Args:
        family: Of the model.
        frames: The video's tokens.
        what: What changes it, for errors.
    """

    def __init__(self, family: ComfyFamily, frames: Frames, what: str) -> None:
        self._family, self._frames, self._what = family, frames, what
        self._layer: str | None = None  # the one that is being called
        self._attended = False  # in it

    @contextmanager
    def inside(
        self, layers: list[tuple[str, nn.Module]], options: dict[str, Any]
    ) -> Iterator[None]:
        """Changes attention in these layers, and has all other be what it was.

        Raises:
            RuntimeError: A layer was called, and did not attend as :meth:`attend` knows.
        """
        hooks, before = Hooks(), options.get(OVERRIDE)

        def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            rest = func if before is None else functools.partial(before, func)
            plain = functools.partial(rest, *args, **kwargs)
            if self._layer is None:
                return plain()
            return self.attend(Attention.of_call(*args, **kwargs), plain)

        try:
            for name, module in layers:
                hooks.before(module, self._entering(name))
                hooks.after(module, self._leave)
            options[OVERRIDE] = override
            yield
        finally:
            hooks.remove()
            options.pop(OVERRIDE, None)
            if before is not None:
                options[OVERRIDE] = before

    def attend(self, attention: Attention, plain: Callable[[], Tensor]) -> Tensor:
        """Returns the attention of a layer, and notes that it attended.

        Args:
            attention: What is asked for.
            plain: Computes it as if nothing were changed.
        """
        raise NotImplementedError

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._layer, self._attended = name, False

        return hook

    def _leave(self, *_: object) -> None:
        layer, self._layer = self._layer, None
        if not self._attended:
            raise RuntimeError(
                f"{layer} attends by something that another node has put in the place of "
                f"ComfyUI's attention, and {self._what} cannot be part of that"
            )

    def _tokens_before(self, attention: Attention) -> int:
        """Returns how many of a layer's queries come before the video's, and are of no frame.

        Raises:
            ValueError: The queries are not those of the latents.
        """
        queries = attention.query.shape[1]
        others = queries - self._frames.count * self._frames.tokens
        if others < 0 or (others > 0 and not self._family.text_first):
            raise self._unknown_tokens(attention)
        return others

    def _unknown_tokens(self, attention: Attention) -> ValueError:
        """Returns the error of a layer whose tokens are not those of the latents."""
        queries, keys = attention.query.shape[1], attention.key.shape[1]
        return ValueError(
            f"{self._layer} attends from {queries} to {keys} tokens, and the latents are "
            f"{self._frames}, {self._frames.count * self._frames.tokens} tokens: something has "
            f"been added to the sequence that {self._what} does not know"
        )
