"""A text for each frame, in one forward pass: what video synopsis prompting conditions on.

VSTAR (arXiv 2403.13501, §3.4) interpolates the embeddings of a few stage descriptions over
the frames. diffusers' video models take one text for the whole video, ``UNetMotionModel`` excepted;
here each frame's rows of the spatial cross-attention get their own. Full-3D transformers, whose
tokens of all frames are one sequence, are in ``full3d/prompts.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.conditional import in_conditional_passes
from vstar_kernels.models.forwards import (
    ForwardPass,
    ForwardPasses,
    called_without_hooks,
    unwatch,
    watch,
)
from vstar_kernels.models.front_end import models_with_temporal_attention
from vstar_kernels.models.full3d.apply import find_full3d
from vstar_kernels.models.full3d.prompts import PromptedModels, StagePrompts
from vstar_kernels.models.hooks import Argument, Handle, Hooks, is_compiled, put_back
from vstar_kernels.models.sharded.parts import SpreadPass, running_part
from vstar_kernels.models.text import (
    EqualFrames,
    equal_rows,
    mark_equal_rows,
    share_text,
    text_blocks,
    unshare_text,
)

MODELS = (
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "UNetMotionModel",
    "LatteTransformer3DModel",
)
NO_TEXT = ", which is conditioned on an image and has no text"
SHAPES = "(frames, tokens, channels) or (batch, frames, tokens, channels)"
MASKS = ("attention_mask", "encoder_attention_mask")


def condition_frames(
    pipe_or_model: Any,
    embeddings: Tensor,
    *,
    negative: Tensor | None = None,
    guidance: bool | None = None,
    rule: FrameRule | None = None,
    mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
) -> Handle:
    """Conditions every frame on a text embedding of its own.

    >>> with vk.condition_frames(pipe, embeddings):  # (16, 77, 1024)
    ...     video = pipe(prompt, num_frames=16).frames

    It works on ``UNet3DConditionModel`` (ModelScope, Zeroscope; LaVie has one of its own),
    ``I2VGenXLUNet``, ``UNetMotionModel`` (AnimateDiff, PIA) and ``LatteTransformer3DModel``; and on
    the full-3D transformers with cross-attention to text, Wan's, SkyReels-V2's, AnyFlow's, LTX's,
    Allegro's and Cosmos', whose frames are latent ones, ``(num_frames − 1) // 4 + 1`` for Wan. The
    prompt that the pipeline is given no longer matters; its negative prompt does, unless
    ``negative`` replaces it too, and so do images and IP adapters. Compiled models are compiled
    anew.

    Args:
        pipe_or_model: The model, or a pipeline with it as ``unet`` or ``transformer``.
        embeddings: ``(frames, tokens, channels)`` for one video, or
            ``(batch, frames, tokens, channels)`` for as many as there are prompts: what the text
            encoder gives for each frame, or interpolations of it. Any floating-point type and
            device; they are moved to the model's.
        negative: The same for the unconditional half under classifier-free guidance, of embeddings'
            shape. None leaves that half as the pipeline passes it.
        guidance: Whether the first half of the model's batch is the unconditional one. None decides
            by sizes: guided if the batch is twice that of embeddings, unguided if it is the same,
            and anything else raises. True or False also allow several videos for each prompt. Wan,
            SkyReels-V2 and Cosmos are called for each half in turn, the conditional one first; None
            then takes a later call of a step for unconditional if it has another text. Where no
            pipeline calls the model, a run that was stopped between the two and then begins again
            with the same latents needs a handle of its own.
        rule: For full-3D transformers: which frame hears which text, where these are of stages,
            however many: :meth:`FrameRule.relay` is Prompt Relay's (arXiv 2604.10030). The stages
            are at the coordinates 0, 1, 2, … of its keys. None: each frame its own.
        mask, negative_mask: For full-3D transformers: which tokens exist, of embeddings' shape
            without the channels. None: all of them. LTX and Allegro are trained with masks, which
            their pipelines' ``encode_prompt`` returns.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        ValueError: The model takes no text or has frame prompts already, or an argument is wrong.
            At a forward pass: the embeddings do not fit the sample or the text that is replaced.
        TypeError: ``pipe_or_model`` or another argument is of the wrong kind.
    """
    check_embeddings(embeddings, "embeddings")
    check_mask(mask, embeddings, "mask", "embeddings")
    check_mask(negative_mask, negative, "negative_mask", "negative")
    if rule is not None and not isinstance(rule, FrameRule):
        raise TypeError(f"rule must be a FrameRule, got {type(rule).__name__}")
    if guidance is not None:
        check_flag(guidance, "guidance")
    if negative is not None:
        check_embeddings(negative, "negative")
        if negative.shape != embeddings.shape:
            raise ValueError(
                f"negative must have the shape of embeddings, {tuple(embeddings.shape)}, "
                f"got {tuple(negative.shape)}"
            )
        if guidance is False:
            raise ValueError("guidance=False contradicts negative, which is for guidance only")
        guidance = True
    full3d = _full3d_models(pipe_or_model)
    if full3d:
        return PromptedModels(
            full3d,
            StagePrompts(
                batched(embeddings),
                None if negative is None else batched(negative),
                None if mask is None else mask.bool().cpu().reshape(batched(embeddings).shape[:3]),
                (
                    None
                    if negative is None or negative_mask is None
                    else negative_mask.bool().cpu().reshape(batched(negative).shape[:3])
                ),
                guidance,
                rule,
            ),
        )
    model = _text_model(pipe_or_model)
    for name, given in (("rule", rule), ("mask", mask), ("negative_mask", negative_mask)):
        if given is not None:
            raise ValueError(
                f"{name} is for full-3D transformers with cross-attention to text, "
                f"got a {type(model).__name__}"
            )
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    if any(isinstance(owner, FramePromptsHandle) for owner in owners):
        raise ValueError(
            f"this {type(model).__name__} has frame prompts already: remove() their handle first"
        )
    return FramePromptsHandle(model, FramePrompts(embeddings, negative, guidance))


@dataclass(frozen=True)
class Fit:
    """How the frame prompts fit into one call of the model.

    Attributes:
        rows: batch × frames.
        tokens: Of the text that is replaced.
        guided: Whether the first half of the batch is the unconditional one.
        videos_per_prompt: How many videos of the batch have the same prompt.
    """

    rows: int
    tokens: int
    guided: bool
    videos_per_prompt: int


@dataclass
class FramePrompts:
    """The arguments of :func:`condition_frames`, checked one by one."""

    embeddings: Tensor
    negative: Tensor | None
    guidance: bool | None
    _told_apart: Tensor | None = None  # the text by whose halves guidance was last recognised

    def fit(self, sample: torch.Size, text: Tensor) -> Fit:
        """Returns how they fit into a call of the model.

        Args:
            sample: The shape ``(batch, channels, frames, height, width)`` of the latents.
            text: The embedding that they replace, ``(rows, tokens, channels)``.

        Raises:
            ValueError: They do not.
        """
        prompts, frames, tokens, channels = batched(self.embeddings).shape
        batch = sample[0]
        for name, given, needed in (
            ("frames", frames, sample[2]),
            ("channels", channels, text.shape[-1]),
        ):
            if given != needed:
                raise ValueError(
                    f"embeddings have {given} {name} (shape {tuple(self.embeddings.shape)}), "
                    f"the model was called with {needed}"
                )
        guided = self._is_guided(batch, prompts, text)
        conditional = batch // 2 if guided else batch
        if conditional * (1 + guided) != batch or conditional % prompts:
            raise ValueError(
                f"embeddings for {prompts} prompts (shape {tuple(self.embeddings.shape)}) with "
                f"guidance={guided} need a batch that is a multiple of {prompts * (1 + guided)}, "
                f"the model was called with {batch}"
            )
        if guided and self.negative is None and tokens != text.shape[1]:
            raise ValueError(
                f"embeddings have {tokens} tokens, the text of the unconditional half, which the "
                f"pipeline passes, has {text.shape[1]}: they must be as many, or pass negative"
            )
        return Fit(batch * frames, text.shape[1], guided, conditional // prompts)

    def _is_guided(self, batch: int, prompts: int, text: Tensor) -> bool:
        if in_conditional_passes():
            return False
        if self.guidance is not None:
            return self.guidance
        if batch not in (prompts, 2 * prompts):
            raise ValueError(
                f"cannot tell whether a batch of {batch} with embeddings for {prompts} prompts is "
                "under classifier-free guidance: pass guidance=True or guidance=False"
            )
        if batch == prompts:
            return False
        # Two videos for each prompt, unguided, have the same text in both halves.
        if text is not self._told_apart:
            unconditional, conditional = text.chunk(2)
            if unconditional.equal(conditional):
                raise ValueError(
                    f"cannot tell whether a batch of {batch} with embeddings for {prompts} "
                    "prompts is under classifier-free guidance, as both halves of "
                    "encoder_hidden_states are the same: pass guidance=True or guidance=False"
                )
            self._told_apart = text
        return True


class _PromptedPass(ForwardPass):
    """One forward pass of a model with frame prompts.

    Args:
        fit: How the frame prompts fit into it.
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.fit = fit
        self.replaced: tuple[Any, Any] = (None, None)  # the blocks' context, and ours

    def end(self) -> None:
        """Lets go of the context."""
        super().end()
        self.replaced = (None, None)

    def is_like(self, other: Any) -> bool:
        """Returns whether the frame prompts fit into both in the same way."""
        return bool(self.fit == other.fit)


class FramePromptsHandle(Handle):
    """Frame prompts on a model: a context manager, with :meth:`remove`."""

    def __init__(self, model: nn.Module, prompts: FramePrompts) -> None:
        self._model = model
        self._prompts = prompts
        self._project = getattr(model, "caption_projection", nn.Identity())  # Latte's
        self._equal = EqualFrames(prompts.embeddings)
        self._equal_negative = EqualFrames(prompts.negative)
        self._passes: ForwardPasses[_PromptedPass] = ForwardPasses(
            f"condition_frames was removed from this {type(model).__name__} while it ran, in "
            "another thread: a part of its blocks had the frames' texts and a part had not"
        )
        self._hooks = Hooks()
        self._removed = False

        self._sample = Argument(model, 0)
        self._text = Argument(model, "encoder_hidden_states")
        parameters = inspect.signature(type(model).forward).parameters
        self._masks = [Argument(model, name) for name in MASKS if name in parameters]
        self._untraced_begin = torch.compiler.disable(self._begin)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the hooks off; nothing happens the second time."""
        super().remove()
        put_back(
            self._close,
            self._hooks.remove,
            lambda: unshare_text(self._model, self),
            lambda: unwatch(self._model, self._passes),
        )

    def _close(self) -> None:
        self._removed = True
        self._passes.close()

    def _install(self) -> None:
        model = self._model
        watch(model, self._passes)
        share_text(model, self)
        self._hooks.before(model, self._before_model)
        for block in text_blocks(model):
            hook = self._before_block(Argument(block, "encoder_hidden_states"))
            self._hooks.before(block, hook)

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is not None:  # another thread has not just taken the hook off
            self._untraced_begin(model, args, kwargs)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for mask in self._masks:
            if mask.get(args, kwargs) is not None:
                raise ValueError(f"frame prompts cannot be combined with {mask.name}")
        text = self._text.get(args, kwargs)
        if text is None:
            raise ValueError(
                f"{type(model).__name__} was called without encoder_hidden_states, "
                "which frame prompts replace"
            )
        fit = self._prompts.fit(self._sample.get(args, kwargs).shape, text)
        self._passes.begin(_PromptedPass(fit))

    def _before_block(self, argument: Argument) -> Callable[..., Any]:
        def hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
        ) -> Any:
            if kwargs is None or self._removed:
                return None
            forward = self._passes.current()
            if forward is None:
                raise called_without_hooks(self._model, "a block", "condition_frames")
            context = argument.get(args, kwargs)
            # Made once for all blocks of a forward pass; where there are gradients, in each block,
            # as checkpointing wants each to do the same again.
            if torch.is_grad_enabled():
                return argument.replace(args, kwargs, self._replace(forward.fit, context))
            if context is not forward.replaced[0]:
                forward.replaced = (context, self._replace(forward.fit, context))
            return argument.replace(args, kwargs, forward.replaced[1])

        return hook

    def _replace(self, fit: Fit, context: Any) -> Any:
        """Returns the spatial blocks' context with our text in the place of the pipeline's.

        ``(batch · frames, tokens, channels)``, the text before any tokens of an image; or, with IP
        adapters, a pair of that and the images.
        """
        if isinstance(context, tuple):
            return (self._replace(fit, context[0]), *context[1:])
        prompts, part = self._prompts, running_part(self._model)
        # Where frames are spread over processes, the blocks have those of this one.
        rows = fit.rows if part is None else part.batch * part.count
        if len(context) != rows:
            raise ValueError(
                "encoder_hidden_states must give every frame of the batch a text where frame "
                f"prompts replace them: {rows} rows, got {len(context)}"
            )
        text = self._rows(prompts.embeddings, fit, context, part)
        if fit.guided:
            unconditional = (
                context[: rows // 2, : fit.tokens]
                if prompts.negative is None
                else self._rows(prompts.negative, fit, context, part)
            )
            text = torch.cat([unconditional, text])
        image = context[:, fit.tokens :]
        if image.shape[1]:
            text = torch.cat([text, image], dim=1)
        if part is None and not torch.compiler.is_compiling():
            self._mark_equal_rows(text, fit, context, has_image=bool(image.shape[1]))
        return text

    def _mark_equal_rows(self, text: Tensor, fit: Fit, context: Tensor, *, has_image: bool) -> None:
        """Notes which rows of the new context are equal, as far as is known."""
        given, videos = equal_rows(context), fit.videos_per_prompt
        frames = batched(self._prompts.embeddings).shape[1]
        if has_image and len(given) != fit.rows // frames:
            return  # or else a video's images are the same for all of its frames
        equal = self._equal.rows(videos)
        if fit.guided:
            kept = given[: len(given) // 2]
            replaced = self._equal_negative.rows(videos)
            equal = [*(kept if self._prompts.negative is None else replaced), *equal]
        mark_equal_rows(text, equal)

    def _rows(
        self, embeddings: Tensor, fit: Fit, context: Tensor, part: SpreadPass | None
    ) -> Tensor:
        """Returns embeddings as the blocks take them, with a row for each frame of each video."""
        videos = batched(embeddings).repeat_interleave(fit.videos_per_prompt, dim=0)
        if part is not None:
            videos = videos[:, part.first : part.first + part.count]
        return self._project(videos.flatten(0, 1).to(context.device, context.dtype))


def batched(embeddings: Tensor) -> Tensor:
    """Returns the embeddings as ``(batch, frames, tokens, channels)``."""
    return embeddings if embeddings.ndim == 4 else embeddings[None]


def check_embeddings(embeddings: Tensor, name: str) -> None:
    """Raises TypeError or ValueError unless they are embeddings of frames."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(embeddings).__name__}")
    if embeddings.ndim not in (3, 4) or not embeddings.numel():
        raise ValueError(f"{name} must be {SHAPES}, none of them 0, got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point type, got {embeddings.dtype}")


def check_mask(mask: Any, embeddings: Tensor | None, name: str, of: str) -> None:
    """Raises TypeError or ValueError unless it is None, or a mask of embeddings' tokens."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if embeddings is None:
        raise ValueError(f"{name} is for {of}, which was not given")
    if mask.shape != embeddings.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {of} without the channels, "
            f"{tuple(embeddings.shape[:-1])}, got {tuple(mask.shape)}"
        )


def _full3d_models(pipe_or_model: Any) -> list[nn.Module]:
    """Returns the full-3D transformers of a pipeline, or a model that is one."""
    models = find_full3d(pipe_or_model)
    for name, (model, _) in models.items():
        if is_compiled(pipe_or_model, name, model):
            torch.compiler.reset()  # or what has been compiled would run on without our hooks
    return [model for model, _ in models.values()]


def _text_model(pipe_or_model: Any) -> nn.Module:
    """Returns the model that takes the text.

    Raises:
        ValueError: There is none that is known here.
        TypeError: It is neither a model nor a pipeline.
    """
    models = models_with_temporal_attention(pipe_or_model)
    for name, model in models.items():
        if not {cls.__name__ for cls in type(model).__mro__}.isdisjoint(MODELS):
            if is_compiled(pipe_or_model, name, model):
                torch.compiler.reset()  # or what has been compiled would run on without our hooks
            return model
    given = ", ".join(type(model).__name__ for model in models.values())
    raise ValueError(
        f"frame prompts work on {', '.join(MODELS)}, got {given}"
        + NO_TEXT * ("UNetSpatioTemporalConditionModel" in given)
    )
