"""ComfyUI: a frame rule around single calls of its full-3D transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.attention.frames.layout import Frames, Layout, Text
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.comfyui import ComfyGate, Sampling
from vstar_kernels.models.full3d.comfyui_model import (
    FAMILIES,
    Attention,
    AttentionChange,
    ComfyFamily,
    family_of,
    layers_named,
    listed,
    options_of,
)
from vstar_kernels.models.full3d.config import checked_indices
from vstar_kernels.models.schedule import Steps

WHAT = "a frame rule"


def find_family(model: nn.Module) -> ComfyFamily:
    """Returns the family of a diffusion model.

    Raises:
        ValueError: It is of none.
    """
    family = family_of(model)
    if family is None:
        raise ValueError(
            f"VSTAR Apply Frame Rule knows no {type(model).__name__}: it is for "
            f"{listed(FAMILIES)}; Stable Video Diffusion and AnimateDiff take VSTAR Apply TAR"
        )
    return family


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
        options = options_of(model, args, kwargs, WHAT)
        frames = family.frames(model, args, kwargs, WHAT)
        change = _RuledAttention(family, frames, self._rule, self._backend)
        with change.inside(self._layers(family, model), options):
            return executor(*args, **kwargs)

    def _layers(self, family: ComfyFamily, model: nn.Module) -> list[tuple[str, nn.Module]]:
        found = layers_named(model, family.layers, WHAT)
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


class _RuledAttention(AttentionChange):
    """The video's attention to itself under a rule, during one call of a model."""

    def __init__(
        self, family: ComfyFamily, frames: Frames, rule: FrameRule, backend: str | None
    ) -> None:
        super().__init__(family, frames, WHAT)
        self._rule, self._backend = rule, backend

    def attend(self, attention: Attention, plain: Callable[[], Tensor]) -> Tensor:
        """Returns the attention of a layer under the rule."""
        self._attended = True
        query, key, value = attention.query, attention.key, attention.value
        others = self._tokens_before(attention)
        if query.shape[1] != key.shape[1]:
            raise self._unknown_tokens(attention)
        layout, key_layout = Layout(Text(others), self._frames), None
        if attention.mask is not None:
            exists = self._existing(attention.mask, layout)
            key, value = key[:, exists], value[:, exists]
            hidden = len(exists) - int(exists.sum())
            key_layout = Layout(Text(others - hidden), self._frames)
        out = frame_attention(
            query,
            key,
            value,
            layout,
            self._rule,
            key_layout=key_layout,
            scale=attention.scale,
            backend=self._backend,
        )
        return attention.result(out)

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
