"""``apply_frames`` puts a rule between frames on a whole full-3D transformer in one call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from vstar_kernels.attention.dispatch import FRAME_ATTENTION
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.front_end import modules_of
from vstar_kernels.models.full3d.config import Layers, checked_indices, checked_layers
from vstar_kernels.models.full3d.families import UNKNOWN, Family, find_family, known_models
from vstar_kernels.models.full3d.model import Rule, RuledModel
from vstar_kernels.models.full3d.seats import FrameLayer
from vstar_kernels.models.hooks import put_back
from vstar_kernels.models.schedule import (
    StepGate,
    SteppedHandle,
    Steps,
    describe_steps,
    scheduler_of,
)


def apply_frames(
    pipe_or_model: Any,
    rule: Rule,
    *,
    layout: Layout | None = None,
    steps: Steps = None,
    layers: Layers = None,
    heads: Collection[int] | None = None,
    backend: str | None = None,
    scheduler: Any = None,
) -> FramesHandle:
    """Puts a rule between frames on the self-attention of a full-3D video transformer.

    >>> with vk.apply_frames(pipe, vk.FrameRule.attenuate(0.9, window=21)):  # UltraViCo, on Wan
    ...     video = pipe(prompt, num_frames=161).frames

    The layers that attend over all tokens of the video go through
    :func:`vstar_kernels.frame_attention`; text is neither changed nor masked. Which frame a token
    belongs to is read from each call of the model, and held against what the layers are called
    with. Elsewhere, at other steps and in other layers, the model computes what it does by itself,
    by the attention backend that the user has set.

    The model may be compiled before or after this call, as a whole or in blocks
    (``compile_repeated_blocks()``), ``fullgraph=True`` included. Each rule and layout is a graph of
    its own, so a rule that changes in many steps needs a higher
    ``torch._dynamo.config.recompile_limit`` than 8.

    Caches skip calls, and what they kept of a regularized step (PyramidAttentionBroadcast,
    FasterCache, TaylorSeer) they use again after the last one. Under context parallelism, Ulysses
    works for rules of all heads, and ring attention is an error. Gradient checkpointing calls the
    layers again in the backward pass, so remove the handle after that.

    Args:
        pipe_or_model: A pipeline, whose every full-3D transformer is treated (both of Wan 2.2), or
            one model, compiled or not.
        rule: What is done between frames; or a callable of (step, timestep) that returns it, or
            None to leave that forward pass alone.
        layout: The frame of every token, instead of what the call says. With it a model of a class
            that is not known here can be treated, in eager mode.
        steps: When: an int, up to this step index, inclusive; a float in (0, 1], that share of the
            schedule, rounded up; None, always; or a callable ``(step, timestep) -> bool``.
        layers: Which of the video's self-attention layers: their indices, such as ``range(10)``; a
            callable of a :class:`FrameLayer`, which has a ``name`` and an ``index``; None, all.
        heads: The indices of the heads that follow the rule; None, all. A rule for some heads may
            have biases and masks of frames, nothing else.
        backend: As for :func:`vstar_kernels.frame_attention`.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it where steps matter, unless :attr:`FramesHandle.step` is set.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: There is no full-3D transformer that is known, one has a rule already, no layer
            is chosen or an index is beyond the last, or its attention cannot be reached. At a
            forward pass: the sequence is not what the call says, or the step cannot be known.
        ImportError: diffusers is too old.
    """
    if not isinstance(rule, FrameRule) and not callable(rule):
        raise TypeError(
            f"rule must be a FrameRule or a callable of (step, timestep), got {type(rule).__name__}"
        )
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout or None, got {type(layout).__name__}")
    FRAME_ATTENTION.check_name(backend)
    gate = StepGate(steps, scheduler_of(pipe_or_model, scheduler))
    layers, heads = checked_layers(layers), checked_indices(heads, "heads")
    ruled = [
        RuledModel(
            name,
            model,
            family,
            rule,
            gate,
            layout=layout,
            chooses=chooser(layers, family, model),
            heads=heads,
            backend=backend,
        )
        for name, (model, family) in full3d_models(pipe_or_model, layout).items()
    ]
    if not any(model.layers for model in ruled):
        raise ValueError("layers chooses none of the video's self-attention layers")
    return FramesHandle(rule, gate, ruled)


@dataclass(frozen=True)
class RuledLayer:
    """A layer under a rule.

    Attributes:
        model: The model's name in its pipeline; empty for a model by itself.
        name, index: Of the :class:`FrameLayer`.
    """

    model: str
    name: str
    index: int


class FramesHandle(SteppedHandle):
    """A rule on a model or pipeline, from :func:`apply_frames`: a context manager.

    Attributes:
        rule: What was applied.
    """

    def __init__(self, rule: Rule, gate: StepGate, models: list[RuledModel]) -> None:
        super().__init__(gate.announced)
        self.rule = rule
        self._gate = gate
        self._models = models
        self._install_all(models)

    @property
    def layers(self) -> list[RuledLayer]:
        """The layers that follow the rule."""
        return [
            RuledLayer(model.name, layer.name, layer.index)
            for model in self._models
            for layer in model.layers
        ]

    def describe(self) -> str:
        """Returns a line for each model, under one that says what is done and when."""
        rule = self.rule
        what = repr(rule) if isinstance(rule, FrameRule) else getattr(rule, "__name__", repr(rule))
        lines = [f"{what}, {describe_steps(self._gate.steps)}"]
        return "\n".join([*lines, *(f"  {model.describe()}" for model in self._models)])

    def remove(self) -> None:
        """Puts everything back as it was; nothing happens the second time.

        A processor that has been given another attention backend since then keeps that.
        """
        super().remove()
        put_back(*(model.remove for model in self._models))


def full3d_models(
    pipe_or_model: Any, layout: Layout | None = None
) -> dict[str, tuple[nn.Module, Family]]:
    """Returns a pipeline's full-3D transformers and their families by their names.

    See :func:`find_full3d`.

    Raises:
        ValueError: There is none.
    """
    found = find_full3d(pipe_or_model, layout)
    if not found:
        raise ValueError(
            f"{type(pipe_or_model).__name__} is or holds no full-3D transformer that is known "
            f"here: known are {known_models()}. Models with temporal attention of their own take "
            "apply_tar with a TARConfig; others, a layout="
        )
    return found


def find_full3d(
    pipe_or_model: Any, layout: Layout | None = None
) -> dict[str, tuple[nn.Module, Family]]:
    """Returns a pipeline's full-3D transformers and their families by their names, if it has any.

    Compiled models are unwrapped. A model by itself has the name ``""``. Where none is known and
    the caller gives the ``layout``, it is the model, or the pipeline's ``transformer`` and what is
    numbered after that.

    Raises:
        TypeError: It is neither a model nor a pipeline (an object with ``components``).
        ValueError: The layout says nothing of a model's keys.
    """
    models = modules_of(pipe_or_model)
    families = {name: find_family(model) for name, model in models.items()}
    known = {name: (models[name], family) for name, family in families.items() if family}
    if layout is None:
        return known
    for model, family in known.values():
        if family.own_keys:
            raise ValueError(
                f"layout must be None for a {type(model).__name__}, of whose keys some are no "
                "queries: what it is called with says where each is"
            )
    return known or {
        name: (model, UNKNOWN)
        for name, model in models.items()
        if name == "" or name.startswith("transformer")
    }


def chooser(layers: Layers, family: Family, model: nn.Module) -> Callable[[FrameLayer], bool]:
    """Returns whether a layer of a model is one of those that the user wants.

    Args:
        layers: Which, as :func:`vstar_kernels.models.full3d.config.checked_layers` returns it.
        family, model: Whose.

    Raises:
        ValueError: An index is beyond the last.
    """
    if layers is None:
        return lambda layer: True
    if callable(layers):
        return layers
    count = len(family.find_layers(model))
    if max(layers) >= count:
        raise ValueError(
            f"layers names index {max(layers)}, {type(model).__name__} has {count} layers of video "
            f"self-attention (0 to {count - 1})"
        )
    return lambda layer: layer.index in layers
