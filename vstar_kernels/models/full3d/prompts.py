"""A text for each frame, or for each stage, in full-3D transformers that attend to text crosswise.

The texts lie side by side in the place of the pipeline's one, so that the model's own layers embed
and project them. In cross-attention each text is a "frame" of the keys, and a rule says which frame
of the video hears which text: its own (VSTAR, arXiv 2403.13501, §3.4), or all of them, each under
Prompt Relay's penalty (arXiv 2604.10030).
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.forwards import ForwardPasses, called_without_hooks, unwatch, watch
from vstar_kernels.models.full3d.families import Family, find_family
from vstar_kernels.models.full3d.layouts import Call
from vstar_kernels.models.full3d.model import RuledPass
from vstar_kernels.models.full3d.processors import ProcessorRoute
from vstar_kernels.models.full3d.prompt_processor import Group, PromptChange, PromptProcessor
from vstar_kernels.models.full3d.seats import (
    FrameChange,
    FrameLayer,
    Reading,
    Seat,
    Traced,
    seat_of,
)
from vstar_kernels.models.full3d.stages import stage_layout
from vstar_kernels.models.hooks import Argument, Handle, Hooks, plain_name, put_back
from vstar_kernels.models.schedule import running_scheduler

OWN = FrameRule.window(0)  # each frame hears the text of its own time


class TextLayers(NamedTuple):
    """Where models attend to text, and how their pipelines guide.

    Attributes:
        classes: The names of the models' classes; subclasses count.
        layers: Matches the names of their cross-attention modules.
        in_turns: Whether pipelines call the model for each side of guidance, first with the prompt,
            not once for a batch of both.
        mask: The argument with the mask of the text's tokens, if there is one.
    """

    classes: tuple[str, ...]
    layers: str
    in_turns: bool
    mask: str | None = None


_BLOCKS = r"transformer_blocks\.\d+\.attn2"
TEXT_LAYERS = (
    TextLayers(
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "ChronoEditTransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
        ),
        r"(vace_)?blocks\.\d+\.attn2",
        in_turns=True,
    ),
    TextLayers(("CosmosTransformer3DModel",), _BLOCKS, in_turns=True),
    TextLayers(("AnyFlowTransformer3DModel",), r"blocks\.\d+\.attn2", in_turns=False),
    TextLayers(
        ("LTXVideoTransformer3DModel", "AllegroTransformer3DModel"),
        _BLOCKS,
        in_turns=False,
        mask="encoder_attention_mask",
    ),
)


def find_text_layers(model: nn.Module) -> TextLayers | None:
    """Returns where a model attends to text; None where its text is no cross-attention's."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((x for x in TEXT_LAYERS if not names.isdisjoint(x.classes)), None)


@dataclass(frozen=True, eq=False)
class StagePrompts:
    """The arguments of ``condition_frames`` for a full-3D transformer, checked one by one.

    Attributes:
        embeddings, negative: ``(batch, stages, tokens, channels)``.
        mask, negative_mask: ``(batch, stages, tokens)`` booleans on the CPU: which tokens exist.
        guidance: See ``condition_frames``.
        rule: Which frame hears which stage; None: each its own, of as many as there are frames.
    """

    embeddings: Tensor
    negative: Tensor | None
    mask: Tensor | None
    negative_mask: Tensor | None
    guidance: bool | None
    rule: FrameRule | None

    @property
    def prompts(self) -> int:
        """How many videos they are for."""
        return len(self.embeddings)

    @property
    def stages(self) -> int:
        """How many texts each video has."""
        return self.embeddings.shape[1]


class PromptedModel(Handle):
    """Texts of stages on one full-3D transformer: a context manager, with :meth:`remove`.

    It is the controller of the cross-attention's seats, and its hook runs before each forward pass.
    """

    def __init__(self, model: nn.Module, prompts: StagePrompts) -> None:
        family, text_layers = find_family(model), find_text_layers(model)
        assert family is not None
        if text_layers is None:
            raise ValueError(
                f"{type(model).__name__} has no cross-attention to text that is known here: where "
                "text and video are one sequence, frames cannot be given texts of their own. Known "
                f"are {', '.join(name for x in TEXT_LAYERS for name in x.classes)}"
            )
        if any(
            isinstance(getattr(hook, "__self__", None), PromptedModel)
            for hook in model._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"this {type(model).__name__} has frame prompts already: remove() their handle "
                "first"
            )
        self._model = model
        self._prompts = prompts
        self._family: Family = family
        self._text_layers = text_layers
        self._passes: ForwardPasses[RuledPass] = ForwardPasses(
            f"condition_frames was removed from this {type(model).__name__} while it ran, in "
            "another thread: a part of its blocks had the stages' texts and a part had not"
        )
        self._text = Argument(model, "encoder_hidden_states")
        self._mask = None if text_layers.mask is None else Argument(model, text_layers.mask)
        self._hooks = Hooks()
        self._lock = threading.RLock()  # of the seats
        self._removed = False
        self._seats: list[Seat] = []  # all that were ever taken
        self._traced = Traced()
        self._thread = _Sides()
        self._untraced_begin = torch.compiler.disable(self._begin)
        try:
            watch(model, self._passes)
            self._keep_seats()
            self._hooks.before(model, self._before)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the hook off, and leaves the seats; nothing happens the second time."""
        super().remove()
        with self._lock:
            put_back(
                self._close,
                self._hooks.remove,
                *(functools.partial(self._leave, seat) for seat in list(self._seats)),
                lambda: unwatch(self._model, self._passes),
            )

    def change(self) -> FrameChange | None:
        """Returns what is done in the forward pass that calls a layer.

        Raises:
            RuntimeError: The layer is called outside of a forward pass of the model.
        """
        forward = self._passes.current()
        if forward is not None:
            return forward.change
        if self._removed:
            return None
        raise called_without_hooks(self._model, "cross-attention", "condition_frames")

    def _close(self) -> None:
        self._removed = True
        self._passes.close()

    def _leave(self, seat: Seat) -> None:
        if seat.controller is self:
            seat.controller = None
        seat.release()

    def _keep_seats(self) -> None:
        pattern = re.compile(self._text_layers.layers)
        index = itertools.count()
        for name, module in self._model.named_modules():
            if not hasattr(module, "processor") or not pattern.fullmatch(plain_name(name)):
                continue
            seat = seat_of(FrameLayer(name, next(index), module))
            if seat.controller is not self:
                self._seats.append(seat)  # noted first, so that it can be left at any time
                seat.controller, seat.traced = self, self._traced
            seat.keep(lambda seat: ProcessorRoute(seat, PromptProcessor))

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Another thread may just have taken the hook off: it is called without kwargs then.
        return None if kwargs is None else self._untraced_begin(args, kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            if self._removed:
                return None
            self._keep_seats()
        call = Call(self._model, args, kwargs)
        text = self._text.get(args, kwargs)
        if not isinstance(text, Tensor):
            raise ValueError(
                f"{type(self._model).__name__} must be called with one tensor of "
                f"encoder_hidden_states, which frame prompts replace, got {type(text).__name__}"
            )
        # Allegro's may be (batch, 1, tokens, channels).
        rows = text.flatten(1, -2)
        sides = self._sides(rows, call)
        if sides == [False] and self._prompts.negative is None:
            self._passes.begin(RuledPass(None, self._traced))
            return None
        mask = None if self._mask is None else self._mask.get(args, kwargs)
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"frame prompts need {self._text_layers.mask} of shape (batch, tokens), "
                f"got {tuple(mask.shape)}"
            )
        context, exists = self._context(rows, mask, sides)
        self._passes.begin(RuledPass(self._find_change(call, exists, context), self._traced))
        args, kwargs = self._text.replace(
            args, kwargs, context.view(len(rows), *(1,) * (text.ndim - 3), *context.shape[1:])
        )
        if self._mask is not None:
            args, kwargs = self._mask.replace(args, kwargs, None)
        return args, kwargs

    def _sides(self, text: Tensor, call: Call) -> list[bool]:
        """Returns which sides of guidance a call has, in its order: true for the conditional."""
        prompts, guidance = self._prompts, self._prompts.guidance
        if self._text_layers.in_turns:
            scheduler = running_scheduler(self._model)
            branch = self._passes.turns.branch(call.timestep, call.sample, scheduler)
            sides = [guidance is False or self._thread.is_conditional(branch, text, guidance)]
        elif guidance is None:
            if len(text) not in (prompts.prompts, 2 * prompts.prompts):
                raise ValueError(
                    f"cannot tell whether a batch of {len(text)} with embeddings for "
                    f"{prompts.prompts} prompts is under classifier-free guidance: pass "
                    "guidance=True or guidance=False"
                )
            sides = [True] if len(text) == prompts.prompts else [False, True]
        else:
            sides = [False, True] if guidance else [True]
        if len(text) % (len(sides) * prompts.prompts):
            raise ValueError(
                f"embeddings for {prompts.prompts} prompts need a batch that is a multiple of "
                f"{len(sides) * prompts.prompts}, the model was called with {len(text)}"
            )
        return sides

    def _context(
        self, text: Tensor, mask: Tensor | None, sides: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the stages' texts side by side, and which of their tokens exist.

        ``(batch, stages · tokens, channels)`` and ``(batch, stages, tokens)``, None for all.
        """
        prompts = self._prompts
        stages, tokens, channels = prompts.embeddings.shape[1:]
        if channels != text.shape[-1]:
            raise ValueError(
                f"embeddings have {channels} channels (shape {tuple(prompts.embeddings.shape)}), "
                f"the model was called with {text.shape[-1]}"
            )
        texts, masks = [], []
        parts = zip(text.chunk(len(sides)), _chunks(mask, len(sides)), sides, strict=True)
        for given, given_mask, conditional in parts:
            rows, exists = (
                (prompts.embeddings, prompts.mask)
                if conditional
                else (prompts.negative, prompts.negative_mask)
            )
            if rows is None:
                # A text as often as there are stages is heard as it is once, whatever the biases.
                if given.shape[1] != tokens:
                    raise ValueError(
                        f"embeddings have {tokens} tokens, the text of the unconditional half, "
                        f"which the pipeline passes, has {given.shape[1]}: they must be as many, "
                        "or pass negative"
                    )
                rows, exists = given[:, None].expand(-1, stages, -1, -1), None
                if given_mask is not None:
                    exists = given_mask.bool().cpu()[:, None].expand(-1, stages, -1)
            else:
                videos = len(given) // len(rows)
                rows = rows.to(text.device, text.dtype).repeat_interleave(videos, 0)
                exists = None if exists is None else exists.repeat_interleave(videos, 0)
            texts.append(rows.flatten(1, 2))
            everything = torch.ones(len(given), stages, tokens, dtype=torch.bool, device="cpu")
            masks.append(everything if exists is None else exists)
        exists = torch.cat(masks)
        return torch.cat(texts), None if bool(exists.all()) else exists

    def _find_change(self, call: Call, exists: Tensor | None, context: Tensor) -> PromptChange:
        reading = self._family.read(call)
        prompts, layout = self._prompts, reading.layout
        times: Sequence[float] = range(prompts.stages)
        if prompts.rule is None:
            times = sorted(layout.coordinates)
            if len(times) != prompts.stages:
                raise ValueError(
                    f"embeddings must be for each of the video's {len(times)} latent frames, where "
                    f"no rule says which stage they hear, got {prompts.stages} of them (shape "
                    f"{tuple(prompts.embeddings.shape)})"
                )
        tokens = prompts.embeddings.shape[2]
        groups = tuple(_groups(exists, times, tokens))
        rule = OWN if prompts.rule is None else prompts.rule
        return PromptChange(
            rule,
            Reading(layout, reading.source),
            None,
            f"prompts {id(self)} {rule!r} {layout!r} {[group.layout for group in groups]!r}",
            tokens=context.shape[1],
            groups=groups,
        )


class PromptedModels(Handle):
    """Texts of stages on all transformers of a pipeline: Wan 2.2 has two.

    Attributes:
        models: The transformers.
    """

    def __init__(self, models: Sequence[nn.Module], prompts: StagePrompts) -> None:
        self.models = tuple(models)
        self._prompted: list[PromptedModel] = []
        try:
            for model in models:
                self._prompted.append(PromptedModel(model, prompts))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the texts off; nothing happens the second time."""
        super().remove()
        put_back(*(model.remove for model in self._prompted))


def _groups(exists: Tensor | None, times: Sequence[float], tokens: int) -> list[Group]:
    """Returns the groups of a batch, whose texts are of frames at these times.

    Raises:
        ValueError: A text has no token.
    """
    if exists is None:
        return [Group(None, None, stage_layout([tokens] * len(times), times))]
    counts = exists.sum(-1)
    if not bool((counts > 0).all()):
        raise ValueError("mask must leave each text a token at least")
    kinds, kind_of = exists.flatten(1).unique(dim=0, return_inverse=True)
    groups = []
    for kind, keep in enumerate(kinds):
        rows = None if len(kinds) == 1 else (kind_of == kind).nonzero().flatten()
        sizes = keep.view(len(times), tokens).sum(-1).tolist()
        groups.append(Group(rows, keep.nonzero().flatten(), stage_layout(sizes, times)))
    return groups


def _chunks(mask: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if mask is None else mask.chunk(count)


class _Sides(threading.local):
    """Which side of guidance a thread's calls are of, where a model is called for each in turn."""

    def __init__(self) -> None:
        self.text: Tensor | None = None  # that of the step's first call

    def is_conditional(self, branch: int, text: Tensor, guidance: bool | None) -> bool:
        """Returns whether a call is a conditional one, before which came ``branch`` of its step.

        The first of a step is; a later one, if it has the first one's text (as those of perturbed
        guidance have), but not the second where it is known that there is guidance.
        """
        if branch == 0 or self.text is None:
            self.text = text
            return True
        same = text is self.text or (text.shape == self.text.shape and text.equal(self.text))
        return bool(same and not (guidance and branch == 1))
