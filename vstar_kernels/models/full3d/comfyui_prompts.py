"""ComfyUI: prompts over time, around single calls of its full-3D transformers.

The stages' texts lie side by side in one conditioning, which the model's own layers embed and
project; in cross-attention each text is a "frame" of the keys, under Prompt Relay's penalty (arXiv
2604.10030), as ``condition_frames`` has it for diffusers' models (``full3d/prompts.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from vstar_kernels.models.full3d.stages import stage_layout, stage_segments
from vstar_kernels.models.hooks import Argument
from vstar_kernels.models.schedule import Steps

WHAT = "VSTAR Apply Prompts over Time"
TIME = 2  # the dimension of latents, (batch, channels, frames, height, width)
# What a conditioning has that is not for all of the schedule.
RANGE = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")


@dataclass(frozen=True, eq=False)
class StageTexts:
    """The texts of stages in one conditioning, one after the other.

    Attributes:
        text: ``(1, tokens, channels)``.
        tokens: How many of them each stage has.
        anchors: The frame of the video at which each begins; None for equal parts of the video.
        shared: How many tokens come before them, which all frames hear alike.
    """

    text: Tensor
    tokens: tuple[int, ...]
    anchors: Sequence[int] | None = None
    shared: int = 0

    @property
    def layout(self) -> Layout:
        """Whose each token is."""
        return stage_layout(self.tokens, range(len(self.tokens)), self.shared)

    def rows_in(self, context: Any) -> list[int]:
        """Returns which rows of a context, ``(rows, tokens, channels)``, are these texts.

        ComfyUI may repeat all tokens of a text that is shorter than another in its batch, which
        leaves attention to it as it is.
        """
        text = self.text
        if not isinstance(context, Tensor) or context.ndim != 3:
            return []
        if context.shape[2] != text.shape[2] or context.shape[1] % text.shape[1]:
            return []
        text = text.to(context.device, context.dtype)
        same = context.unflatten(1, (-1, text.shape[1])) == text
        return [int(row) for row in same.flatten(1).all(1).nonzero()]


def find_text_family(model: nn.Module) -> ComfyFamily:
    """Returns the family of a diffusion model with cross-attention to its text.

    Raises:
        ValueError: It is of none.
    """
    family = family_of(model)
    if family is not None and family.text_layers is not None:
        return family
    known = tuple(x for x in FAMILIES if x.text_layers is not None)
    raise ValueError(
        f"{WHAT} takes no {type(model).__name__} as model: it is for {listed(known)}; "
        + (
            f"text and video of {family.name} are one sequence, and its frames cannot hear texts "
            "of their own"
            if family
            else "AnimateDiff takes VSTAR Synopsis"
        )
    )


class PromptsWrapper:
    """Prompts over time around the calls of a diffusion model, for ``add_wrapper_with_key``.

    Which part of a batch is with the stages' texts is told by what it is conditioned on, not by the
    side of guidance: samplers number their sides as they like. All else stays as it is.

    Args:
        texts: The stages.
        w: In latent frames, how far from the middle of its part a stage is heard undiminished;
            None: in all of its part.
        sigma: σ > 0 of the decay beyond it, in latent frames. See :meth:`FrameRule.relay`.
        steps: When the rule ends, as of a :class:`vstar_kernels.FrameTAR`; a share is of the steps
            that the sampler runs. At other steps all frames hear all stages.
        start: The share of steps before the first one under the rule.
        backend: As for :func:`vstar_kernels.frame_attention`.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """

    def __init__(
        self,
        texts: StageTexts,
        *,
        w: float | None = None,
        sigma: float = 0.5,
        steps: Steps = None,
        start: float = 0.0,
        backend: str | None = None,
    ) -> None:
        FrameRule.relay([(0, 0)], w, sigma)  # raises where one of them is wrong
        self._texts, self._w, self._sigma = texts, w, sigma
        self._gate = ComfyGate(steps, start, None)
        self._backend = backend
        self._was_on = self._was_heard = False
        self._latent_frames: int | None = None  # of the video that is sampled, where it is known

    def begin(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a sampler (``WrappersMP.OUTER_SAMPLE``), if it is given the stages' texts.

        Raises:
            ValueError: Its positive conditioning is another.
            RuntimeError: Something changed the texts on their way to the model.
        """
        given = executor.class_obj.conds
        positive = given.get("positive", list(itertools.chain(*given.values())))
        ours = [x for x in positive if self._texts.rows_in(x.get("cross_attn"))]
        if not ours:
            raise ValueError(
                f"positive must be the conditioning that {WHAT} returned with this model: the "
                "sampler was given another text"
            )
        # Those of a range of the schedule are rightly not there at other steps.
        is_always = any(all(x.get(name) is None for name in RANGE) for x in ours)
        self._latent_frames = _frames_of(args[0] if args else kwargs.get("noise"))
        self._was_on = self._was_heard = False
        out = executor(*args, **kwargs)
        if is_always and self._was_on and not self._was_heard:
            raise RuntimeError(
                f"the model was not called with the texts of {WHAT}, though the sampler was given "
                "them: another node changes what the model is conditioned on, and prompts over "
                "time cannot be part of that"
            )
        return out

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model (``WrappersMP.DIFFUSION_MODEL``), under the rule where it is to be.

        Raises:
            ValueError: The model is not known, the sequence is not that of one video, or the video
                has too few frames for the stages; the step cannot be known, or the rule is off at
                each of them.
            RuntimeError: A layer attends to the text in another way.
        """
        model = executor.class_obj
        family = find_text_family(model)
        sampling = Sampling.of_call(model, args, kwargs)
        if not self._gate.is_on(model, sampling):
            return executor(*args, **kwargs)
        context = Argument(model, "context").get(args, kwargs)
        rows = self._texts.rows_in(context)
        self._was_on = True
        if not rows:
            return executor(*args, **kwargs)
        self._was_heard = True
        options = options_of(model, args, kwargs, WHAT)
        frames = family.frames(model, args, kwargs, WHAT)
        times, total = _times(frames, options.get("context_window"), self._latent_frames)
        stages, anchors = len(self._texts.tokens), self._texts.anchors
        segments = stage_segments(stages, total, anchors, family.every)
        rule = FrameRule.relay(segments, self._w, self._sigma)
        heard = _Heard(self._texts, rows, *context.shape[:2])
        change = _PromptedAttention(family, frames, times, heard, rule, self._backend)
        assert family.text_layers is not None
        with change.inside(layers_named(model, family.text_layers, WHAT), options):
            return executor(*args, **kwargs)


def _frames_of(latents: Any) -> int | None:
    """Returns how many frames latents of one video have, ``(batch, channels, frames, …)``."""
    return latents.shape[2] if isinstance(latents, Tensor) and latents.ndim == 5 else None


def _times(frames: Frames, window: Any, sampled: int | None) -> tuple[list[int], int]:
    """Returns the times of the latent frames in a call, and how many the whole video has.

    Args:
        frames: Of the call.
        window: ComfyUI's context window, of some of the video's frames; None where there is none.
        sampled: How many latent frames are sampled; None where that is not known.

    Raises:
        ValueError: The window is of other frames, or there are not all frames without one.
    """
    if window is None:
        if sampled not in (None, frames.count):
            raise ValueError(
                f"positive must be for the whole video, {sampled} latent frames, and not for an "
                f"area of {frames.count} of them, whose times {WHAT} does not know"
            )
        return list(range(frames.count)), frames.count
    if getattr(window, "dim", TIME) != TIME:
        raise ValueError(
            f"a context window must be of the video's frames, dimension {TIME} of the latents, "
            f"and is of dimension {window.dim}"
        )
    times = list(window.index_list)
    if len(times) != frames.count:
        raise ValueError(
            f"a context window of {len(times)} latent frames is sampled with {frames.count}: "
            f"something has been added to it that {WHAT} does not know"
        )
    return times, window.total_frames


class _Heard(NamedTuple):
    """What the batch of one call of a model is conditioned on.

    Attributes:
        texts: The stages' texts.
        rows: Which rows of the batch hear them.
        batch: Of how many.
        tokens: How many tokens the context has, those of the texts once or several times.
    """

    texts: StageTexts
    rows: list[int]
    batch: int
    tokens: int


class _PromptedAttention(AttentionChange):
    """Cross-attention to the texts of stages, during one call of a model."""

    def __init__(
        self,
        family: ComfyFamily,
        frames: Frames,
        times: list[int],
        heard: _Heard,
        rule: FrameRule,
        backend: str | None,
    ) -> None:
        super().__init__(family, frames, WHAT)
        self._heard, self._rule, self._backend = heard, rule, backend
        self._video = [Frames(1, frames.tokens, first=time) for time in times]
        self._texts = heard.texts.layout
        self._open_mask: Tensor | None = None  # all layers have the same: a look at it waits once

    def attend(self, attention: Attention, plain: Callable[[], Tensor]) -> Tensor:
        """Returns the attention of a layer, to the texts under the rule in the rows with them.

        Wan's image-to-video models attend to an image in the same layers, which stays as it is.

        Raises:
            ValueError: The queries are not those of the latents, or the texts are masked.
            RuntimeError: The layer attends to as many tokens as the texts have more than once.
        """
        heard = self._heard
        batch, keys = attention.key.shape[:2]
        if keys != heard.tokens:
            return plain()
        if self._attended or batch != heard.batch:
            raise RuntimeError(
                f"{self._layer} attends to {keys} tokens of {batch} sequences, and cannot be told "
                f"from its attention to the text, {heard.tokens} tokens of {heard.batch}, which "
                f"{WHAT} changes"
            )
        self._attended = True
        self._refuse_mask(attention.mask)
        is_whole = len(heard.rows) == batch
        some = torch.tensor(heard.rows, device=attention.query.device)
        rows: Any = slice(None) if is_whole else some  # no copy where the whole batch hears them
        tokens = self._texts.tokens
        out = frame_attention(
            attention.query[rows],
            attention.key[rows, :tokens],
            attention.value[rows, :tokens],
            Layout(Text(self._tokens_before(attention)), *self._video),
            self._rule,
            key_layout=self._texts,
            scale=attention.scale,
            backend=self._backend,
        )
        result = attention.result(out)
        if is_whole:
            return result
        # The other rows are those of a plain call, bit for bit, as their batch is the same.
        whole = plain()
        return whole.index_copy(0, some, result.to(whole.dtype))

    def _refuse_mask(self, mask: Tensor | None) -> None:
        """Raises ValueError where a mask hides a token of the texts, or weighs one."""
        if mask is None or mask is self._open_mask:
            return
        given = mask
        if len(mask) == self._heard.batch:
            mask = mask[self._heard.rows]
        if not bool((mask if mask.dtype == torch.bool else mask == 0).all()):
            raise ValueError(
                f"{self._layer} masks its attention to the text, {tuple(mask.shape)}: {WHAT} "
                "cannot be part of that"
            )
        self._open_mask = given
