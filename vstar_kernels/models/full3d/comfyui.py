"""ComfyUI: a frame rule around single calls of its full-3D transformers.

ComfyUI hands every attention of such a model to ``optimized_attention_override``, self-attention
and cross-attention alike. Which of them is the video's is told by the modules that are being called
meanwhile. As for TAR (``models/comfyui.py``) all is put back when the call of the model ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.attention.frames.layout import Frames, Layout, Text
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.comfyui import ComfyGate, Sampling
from vstar_kernels.models.full3d.config import checked_indices
from vstar_kernels.models.hooks import Argument, Hooks
from vstar_kernels.models.schedule import Steps

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
        refused: Arguments that put tokens of other times or videos into the sequence.
        text_last: The attribute of a layer that is true where the text comes after the video.
    """

    name: str
    models: tuple[str, ...]
    layers: str
    text_first: bool
    refused: tuple[str, ...] = ()
    text_last: str | None = None

    def layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frames:
        """Returns the video's frames of tokens in a call of the model.

        Raises:
            ValueError: The sequence is not that of one video.
        """
        for name in self.refused:
            if Argument(model, name).get(args, kwargs) is not None:
                raise ValueError(
                    f"a frame rule on {self.name} does not support {name}, which puts frames of "
                    "other times or videos into the sequence"
                )
        sample = Argument(model, 0).get(args, kwargs)
        if not isinstance(sample, Tensor) or sample.ndim != 5:
            given = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(
                f"a frame rule is for the latents of a video, (batch, channels, frames, height, "
                f"width); this {type(model).__name__} is called with {given}"
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
        r"blocks\.(\d+)\.self_attn",
        True,
        ("time_dim_concat", "context_latents"),
    ),
    ComfyFamily(
        "HunyuanVideo",
        ("HunyuanVideo",),
        r"(?:double|single)_blocks\.(\d+)",
        True,
        text_last="flipped_img_txt",  # of ComfyUI before 0.20
    ),
    ComfyFamily(
        "LTX-Video", ("LTXVModel",), r"transformer_blocks\.(\d+)\.attn1", False, ("keyframe_idxs",)
    ),
)


def find_family(model: nn.Module) -> ComfyFamily:
    """Returns the family of a diffusion model.

    Raises:
        ValueError: It is of none.
    """
    for family in FAMILIES:
        if type(model).__name__ in family.models:
            return family
    raise ValueError(
        f"VSTAR Apply Frame Rule knows no {type(model).__name__}: it is for "
        + ", ".join(f"{family.name} ({', '.join(family.models)})" for family in FAMILIES)
        + "; Stable Video Diffusion and AnimateDiff take VSTAR Apply TAR"
    )


class FrameRuleWrapper:
    """A frame rule around the calls of a diffusion model, for ``add_wrapper_with_key``.

    Args:
        rule: What is done between frames.
        steps: When it ends, as of a :class:`vstar_kernels.FrameTAR`; a share is of the steps that
            the sampler runs.
        start: The share of steps before the first one that is regularized.
        layers: The indices of the layers, in the model's order; None for all.
        backend: As for :func:`vstar_kernels.frame_attention`.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """

    def __init__(
        self,
        rule: FrameRule,
        *,
        steps: Steps = 0.3,
        start: float = 0.0,
        layers: Collection[int] | None = None,
        backend: str | None = None,
    ) -> None:
        self._rule = rule
        self._gate = ComfyGate(steps, start, "a rule")
        self._indices = checked_indices(layers, "layers")
        self._backend = backend

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, under the rule where it is to be.

        Raises:
            ValueError: The model is not known, a layer is not there, the sequence is not that of
                one video; the step cannot be known, or the rule is off at each of them.
            RuntimeError: A layer attends in another way.
        """
        model = executor.class_obj
        sampling = Sampling.of_call(model, args, kwargs)
        if not self._gate.is_on(model, sampling):
            return executor(*args, **kwargs)
        family = find_family(model)
        options = Argument(model, "transformer_options").get(args, kwargs)
        if options is None:
            raise ValueError(
                f"this {type(model).__name__} is called without transformer_options, by which "
                "alone a frame rule reaches its attention"
            )
        inside = _Inside(self._rule, family, family.layout(model, args, kwargs), self._backend)
        with inside.watching(self._layers(family, model)), inside.overriding(options):
            return executor(*args, **kwargs)

    def _layers(self, family: ComfyFamily, model: nn.Module) -> list[tuple[str, nn.Module]]:
        found = [x for x in model.named_modules() if re.fullmatch(family.layers, x[0])]
        if family.text_last and any(getattr(x, family.text_last, False) for _, x in found):
            raise ValueError(
                f"this ComfyUI puts the text of {family.name} after the video, and a frame rule "
                "counts its frames from after the text: update ComfyUI to 0.20.1 or later"
            )
        indices = range(len(found)) if self._indices is None else self._indices
        if max(indices, default=0) >= len(found):
            raise ValueError(
                f"layers names {max(indices)}, and this {type(model).__name__} has "
                f"{len(found)}, from 0 to {len(found) - 1}"
            )
        return [found[index] for index in indices]


class _Inside:
    """One call of a model under a rule: which layer is being called, and how it attends."""

    def __init__(
        self, rule: FrameRule, family: ComfyFamily, frames: Frames, backend: str | None
    ) -> None:
        self._rule, self._family, self._frames, self._backend = rule, family, frames, backend
        self._layer: str | None = None
        self._attended = False

    @contextmanager
    def watching(self, layers: list[tuple[str, nn.Module]]) -> Iterator[None]:
        """Notes which of some modules is being called."""
        hooks = Hooks()
        try:
            for name, module in layers:
                hooks.before(module, self._entering(name))
                hooks.after(module, self._leave)
            yield
        finally:
            hooks.remove()

    @contextmanager
    def overriding(self, options: dict[str, Any]) -> Iterator[None]:
        """Has attention in those modules follow the rule, and all other be what it was."""
        before = options.get(OVERRIDE)

        def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            if self._layer is not None:
                return self._attend(*args, **kwargs)
            return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

        try:
            options[OVERRIDE] = override
            yield
        finally:
            options.pop(OVERRIDE)
            if before is not None:
                options[OVERRIDE] = before

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._layer, self._attended = name, False

        return hook

    def _leave(self, *_: object) -> None:
        layer, self._layer = self._layer, None
        if not self._attended:
            raise RuntimeError(
                f"{layer} attends by something that another node has put in the place of "
                "ComfyUI's attention, and a frame rule cannot be part of that"
            )

    def _attend(
        self,
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
    ) -> Tensor:
        """Computes what ComfyUI's attention functions do, under the rule.

        ``unused`` are hints on how to compute it, which frame_attention does in float32.
        """
        self._attended = True
        if skip_reshape:  # (batch, heads, tokens, head_dim)
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        else:  # (batch, tokens, channels); fewer heads of keys have fewer channels
            head_dim = q.shape[-1] // heads
            query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        layout = self._layout(query.shape[1], key.shape[1])
        key_layout = None
        if mask is not None:
            exists = self._existing(mask, layout)
            key, value = key[:, exists], value[:, exists]
            key_layout = Layout(Text(int(exists.sum()) - self._video), self._frames)
        out = frame_attention(
            query,
            key,
            value,
            layout,
            self._rule,
            key_layout=key_layout,
            scale=scale,
            backend=self._backend,
        )
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(-2)

    @property
    def _video(self) -> int:
        return self._frames.count * self._frames.tokens

    def _layout(self, queries: int, keys: int) -> Layout:
        """Returns the layout of a layer's tokens.

        Raises:
            ValueError: They are not those of the latents.
        """
        others = queries - self._video
        if queries != keys or others < 0 or (others > 0 and not self._family.text_first):
            raise ValueError(
                f"{self._layer} attends from {queries} to {keys} tokens, and the latents are "
                f"{self._frames}, {self._video} tokens: something has been added to the sequence "
                "that a frame rule does not know"
            )
        return Layout(Text(others), self._frames)

    def _existing(self, mask: Tensor, layout: Layout) -> Tensor:
        """Returns which keys a mask leaves, booleans ``(keys,)``, where only text is masked.

        Raises:
            ValueError: The mask is another one.
        """
        exists = mask if mask.dtype == torch.bool else mask == 0
        rows = exists.reshape(-1, exists.shape[-1])
        first = rows[0]
        # 0 is to attend, a large negative number not to; whatever else is added weighs keys.
        is_bias = mask.dtype != torch.bool and bool(((mask != 0) & ~(mask <= -1000)).any())
        if is_bias or not (rows == first).all() or not first[layout.text_tokens :].all():
            raise ValueError(
                f"{self._layer} masks its attention, {tuple(mask.shape)}, otherwise than tokens of "
                "the text that are the same in the whole batch: a frame rule cannot be part of that"
            )
        return first
