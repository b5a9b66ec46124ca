"""What :func:`vstar_kernels.capture_maps` wants of models, and what their watches bring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import AttentionMap, Level, Place, find_maps
from vstar_kernels.models.forwards import ForwardPasses
from vstar_kernels.models.full3d.seats import FrameLayer
from vstar_kernels.models.hooks import put_back
from vstar_kernels.models.layers import TemporalLayer
from vstar_kernels.models.schedule import ChosenSteps, SteppedHandle

Layer = TemporalLayer | FrameLayer
Chooses = Callable[[Layer], bool]


class Watch(Protocol):
    """What sees the maps of one model.

    Attributes:
        passes: The model's forward passes.
    """

    passes: ForwardPasses[Any]

    def install(self) -> None:
        """Puts it on the model."""

    def remove(self) -> None:
        """Takes it off; nothing happens the second time."""


class MapCapture(SteppedHandle):
    """The maps that :func:`capture_maps` captures: a context manager, with :meth:`remove`.

    Attributes:
        chooses, max_rows, differentiable: See ``layers`` and the others of :func:`capture_maps`.
        steps: Which steps, and what they are known by.
    """

    def __init__(
        self,
        steps: ChosenSteps,
        chooses: Chooses,
        max_rows: int,
        differentiable: bool,
    ) -> None:
        super().__init__(steps.announced)
        self.chooses = chooses
        self.max_rows = max_rows
        self.differentiable = differentiable
        self.steps = steps
        self._maps: dict[tuple[Any, ...], AttentionMap] = {}
        self._lock = threading.RLock()  # of the maps
        self._watches: list[Watch] = []

    def install(self, watches: list[Watch]) -> MapCapture:
        """Puts on what watches the models; what has been put on is taken off if one cannot be.

        Returns itself, so that no interrupt comes between the last of them and what takes it off.
        """
        self._watches = watches
        try:
            for watch_ in watches:
                watch_.install()
            return self
        except BaseException:
            self.remove()
            raise

    @property
    def maps(self) -> list[AttentionMap]:
        """The maps captured so far, in the order of the layers' first calls.

        Warns where there are none because the model was called at no step that ``steps`` names.
        """
        if not self._maps:
            self.steps.warn_without_maps()
        return list(self._maps.values())

    def mean(
        self,
        *,
        level: Level | None = None,
        place: Place | None = None,
        step: int | None = None,
        model: str | None = None,
        branch: int | None = 0,
    ) -> Tensor:
        """Returns the mean of the maps of a level, place, step and model, each None for all.

        ``branch`` is the side of guidance (see :class:`AttentionMap`), None for both.

        Returns:
            ``(batch, frames, frames)``; the batch is not averaged.

        Raises:
            ValueError: There is none.
        """
        maps = find_maps(
            self._maps.values(), level=level, place=place, step=step, model=model, branch=branch
        )
        return torch.stack([item.map for item in maps]).mean(dim=0)

    def clear(self) -> None:
        """Forgets the maps captured so far; the next call is the first of its step."""
        with self._lock:
            self._maps = {}
            self.steps.forget()
        for watch_ in self._watches:
            watch_.passes.turns.forget()

    def remove(self) -> None:
        """Takes the hooks off, and keeps the maps; nothing happens the second time."""
        super().remove()
        put_back(*(watch_.remove for watch_ in self._watches))

    def add(self, found: Sequence[AttentionMap]) -> None:
        """Keeps the maps of a forward pass, or takes each into the mean of its kind."""
        with self._lock:
            maps = dict(self._maps)
            for new in found:
                key = (new.model, new.layer, new.step, new.timestep, new.branch)
                if key in maps:
                    maps[key] = replace(maps[key])
                    maps[key].add(new)
                else:
                    maps[key] = new
            self._maps = maps  # all of them, or where something is raised none
