"""``apply_frames`` puts a rule between frames on a whole full-3D transformer in one call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.models.front_end import unwrap
from vstar_kernels.models.full3d.families import Family, find_family, known_models
from vstar_kernels.models.full3d.model import Rule, RuledModel
from vstar_kernels.models.full3d.seats import FrameLayer
from vstar_kernels.models.hooks import Handle, put_back
from vstar_kernels.models.schedule import StepGate, Steps, scheduler_of

Layers = Collection[int] | Callable[[FrameLayer], bool] | None


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
    """Puts a rule between frames on the self-attention of a full-3D video transformer."""
    models = full3d_models(pipe_or_model)
    gate = StepGate(steps, scheduler_of(pipe_or_model, scheduler))
    ruled = [
        RuledModel(
            name,
            model,
            family,
            rule,
            gate,
            layout=layout,
            chooses=_chooser(layers),
            backend=backend,
        )
        for name, (model, family) in models.items()
    ]
    return FramesHandle(rule, gate, ruled)


class FramesHandle(Handle):
    """A rule on a model or pipeline, from :func:`apply_frames`: a context manager.

    Attributes:
        rule: What was applied.
    """

    def __init__(self, rule: Rule, gate: StepGate, models: list[RuledModel]) -> None:
        self.rule = rule
        self._gate = gate
        self._models = models
        try:
            for model in models:
                model.install()
        except BaseException:
            self.remove()
            raise

    @property
    def step(self) -> int | None:
        """The step that the caller announces, which goes before the scheduler's; None for that."""
        return self._gate.announced.get()

    @step.setter
    def step(self, step: int | None) -> None:
        self._gate.announced.set(step)

    def remove(self) -> None:
        """Puts everything back as it was; nothing happens the second time."""
        put_back(*(model.remove for model in self._models))


def full3d_models(pipe_or_model: Any) -> dict[str, tuple[nn.Module, Family]]:
    """Returns a pipeline's full-3D transformers and their families by their names.

    Compiled models are unwrapped. A model by itself has the name ``""``.

    Raises:
        TypeError: It is neither a model nor a pipeline (an object with ``components``).
        ValueError: There is none.
    """
    found = find_full3d(pipe_or_model)
    if not found:
        raise ValueError(
            f"{type(pipe_or_model).__name__} is or holds no full-3D transformer that is known "
            f"here: known are {known_models()}"
        )
    return found


def find_full3d(pipe_or_model: Any) -> dict[str, tuple[nn.Module, Family]]:
    """Returns what :func:`full3d_models` returns, or nothing where there is none."""
    if isinstance(pipe_or_model, nn.Module):
        components: Any = {"": pipe_or_model}
    else:
        components = getattr(pipe_or_model, "components", None)
        if not isinstance(components, dict):
            raise TypeError(
                "pipe_or_model must be a torch.nn.Module or a diffusers pipeline, "
                f"got {type(pipe_or_model).__name__}"
            )
    return {
        name: (model, family)
        for name, component in components.items()
        if isinstance(component, nn.Module)
        and (family := find_family(model := unwrap(component))) is not None
    }


def _chooser(layers: Layers) -> Callable[[FrameLayer], bool]:
    if layers is None:
        return lambda layer: True
    if callable(layers):
        return layers
    return lambda layer: layer.index in layers
