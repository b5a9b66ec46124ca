"""A model's mean attention maps while it samples (VSTAR, arXiv 2403.13501, Figs. 3, 10, S.10)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import AttentionMap, Level, Place
from vstar_kernels.models.hooks import HookHandle, is_compiled
from vstar_kernels.models.layers import (
    TemporalLayer,
    models_with_temporal_attention,
    temporal_layers,
)
from vstar_kernels.models.schedule import find_step
from vstar_kernels.models.watch import Selected, Watch


def capture_maps(
    pipe_or_model: Any,
    *,
    steps: Collection[int] | None = None,
    layers: Callable[[TemporalLayer], bool] | None = None,
    scheduler: Any = None,
    max_rows: int = 256,
    differentiable: bool = False,
) -> MapCapture:
    """Collect the mean temporal attention maps of a model while it runs.

    >>> with vk.capture_maps(pipe, steps=[0, 13], layers=lambda layer: layer.level == 0) as capture:
    ...     video = pipe(prompt).frames
    >>> capture.mean(place="up", step=13)  # (2, 16, 16): without and with the prompt

    It sees what runs: under :func:`vstar_kernels.apply_tar` the regularized map A′, elsewhere the
    plain A. The model's output stays the same, bit for bit. Each map is computed a second time for
    it: of all positions where one of the kernels gives maps, otherwise by the reference from some
    of them, at equal distances.

    Memory is ``layers × steps × batch × frames² × 4`` bytes: choose ``layers`` and ``steps`` for
    long videos.

    Args:
        pipe_or_model: As for :func:`vstar_kernels.apply_tar`, but not compiled.
        steps: Indices of denoising steps; None is all.
        layers: Whether to capture a :class:`TemporalLayer`; None is all, ``transformer_in`` too.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it for ``steps``, unless :attr:`MapCapture.step` is set.
        max_rows: For the reference, from how many rows (batch × positions) of a layer a map is
            computed at most; at least one position of each batch element.
        differentiable: Keep the maps on the model's device and in autograd's graph, wherever
            gradients are enabled. Call ``backward()`` before the handle is removed: a model with
            gradient checkpointing then runs its layers again.

    Returns:
        A handle: a context manager, with ``remove()``, which keeps its maps afterwards.

    Raises:
        TypeError: ``pipe_or_model`` is of the wrong kind.
        ValueError: It has no temporal attention or is compiled, or ``layers`` chooses none, or
            ``max_rows`` is less than 1. At a forward pass: the step cannot be known.
        RuntimeError: At a forward pass: a layer was not called, or its projections were not
            (``fuse_qkv_projections``), or it was called several times (FreeNoise).
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    models = models_with_temporal_attention(pipe_or_model)
    for name, model in models.items():
        if is_compiled(pipe_or_model, name, model):
            raise ValueError(f"maps of a compiled {type(model).__name__} cannot be captured")
    selected = layers or (lambda layer: True)
    if not any(selected(layer) for model in models.values() for layer in temporal_layers(model)):
        raise ValueError("layers chooses none of the temporal attention layers")

    def find_scheduler() -> Any:
        return scheduler if scheduler is not None else getattr(pipe_or_model, "scheduler", None)

    return MapCapture(models, steps, selected, find_scheduler, max_rows, differentiable)


class MapCapture(HookHandle):
    """Maps being captured, from :func:`capture_maps`: a context manager, with :meth:`remove`.

    Attributes:
        step: The step that the caller announces, which goes before the scheduler's; None for that.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        steps: Collection[int] | None,
        selected: Selected,
        find_scheduler: Callable[[], Any],
        max_rows: int,
        differentiable: bool,
    ) -> None:
        super().__init__()
        self.step: int | None = None
        self._steps = steps
        self._find_scheduler = find_scheduler
        self._maps: dict[tuple[Any, ...], AttentionMap] = {}
        self._watches = [
            Watch(self, name, model, selected, max_rows, differentiable)
            for name, model in models.items()
        ]
        for watch in self._watches:
            self._hooks += watch.install()

    @property
    def maps(self) -> list[AttentionMap]:
        """What has been captured, in the order of the first calls."""
        return list(self._maps.values())

    def mean(
        self,
        *,
        level: Level | None = None,
        place: Place | None = None,
        step: int | None = None,
        model: str | None = None,
    ) -> Tensor:
        """The mean of the maps of a level, place, step and model, each None for all of them.

        Returns:
            ``(batch, frames, frames)``; the batch is not averaged.

        Raises:
            ValueError: There is none.
        """
        wanted = {"level": level, "place": place, "step": step, "model": model}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        maps = [m.map for m in self.maps if all(getattr(m, k) == v for k, v in wanted.items())]
        if maps:
            return torch.stack(maps).mean(dim=0)
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items()) or "any layer"
        there = (
            f"{name}s {', '.join(sorted({str(getattr(m, name)) for m in self.maps})) or 'none'}"
            for name in ("level", "place", "step", "model")
        )
        raise ValueError(f"no map of {asked} was captured: there are {'; '.join(there)}")

    def clear(self) -> None:
        """Forget the maps captured so far."""
        self._maps.clear()

    def remove(self) -> None:
        """Take the hooks off, and keep the maps; nothing happens the second time."""
        super().remove()
        for watch in self._watches:
            watch.unwatch()

    def find_step(self, timestep: Any) -> int | None:
        """The step of a forward pass, None if it is not known.

        Raises:
            ValueError: It is not known, and ``steps`` asks for it.
        """
        if self.step is not None:
            return self.step
        scheduler = self._find_scheduler()
        if scheduler is not None:
            return find_step(timestep, scheduler)
        if self._steps is not None:
            raise ValueError(
                "steps needs the step of each forward pass: give capture_maps the scheduler=, "
                "announce it by capture.step = i, or use steps=None for all steps"
            )
        return None

    def wants(self, step: int | None) -> bool:
        """Whether a step's maps are captured."""
        return self._steps is None or step in self._steps

    def add(self, new: AttentionMap) -> None:
        """Keep a map, or take it into the mean of what is kept of its layer and step."""
        key = (new.model, new.layer, new.step, new.timestep)
        if key in self._maps:
            self._maps[key].add(new.map)
        else:
            self._maps[key] = new
