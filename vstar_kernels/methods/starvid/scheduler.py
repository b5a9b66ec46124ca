"""A pipeline's scheduler under guidance: it tells of the latents, and steps from the new ones.

``scale_model_input`` is given the latents at every evaluation of the model, which are noted.
``step`` gets what has been put in their place. Which evaluations it goes on from, and what noise
is in the latents, is asked of diffusers' schedulers here and nowhere else.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vstar_kernels.models import schedule
from vstar_kernels.models.classes import ClassChange

if TYPE_CHECKING:
    from vstar_kernels.methods.starvid.config import Decay


class Noted(NamedTuple):
    """What the scheduler was asked to scale for the next evaluation of the model.

    Attributes:
        latents, scaled: The pipeline's batch, before and after.
        timestep: Of the evaluation.
    """

    latents: Tensor
    scaled: Tensor
    timestep: Any


class GuidedScheduler:
    """The scheduler of a pipeline whose latents are replaced between its two calls of a step.

    Attributes:
        noted: Of the evaluation that comes next; None where the scheduler has not been called.
        is_removed: Whether nothing is noted or replaced any more, but for a step that has begun.

    Raises:
        ValueError: Its pipeline is under guidance already.
    """

    def __init__(self, scheduler: Any) -> None:
        before = _guidance_of(scheduler)
        if before is not None and not before.is_removed:
            raise ValueError("this pipeline is under guide_latents already: remove() that handle")
        if before is not None:  # its last run did not come to the step that it was kept for
            before._take_off()
        self.noted: Noted | None = None
        self.is_removed: bool = False
        self._scheduler = scheduler
        self._own_scale = type(scheduler).scale_model_input
        self._lock = threading.Lock()  # of what is replaced and whether it is removed
        self._changed: tuple[Tensor, Tensor] | None = None  # the pipeline's latents, and ours

    def install(self) -> None:
        """Has the scheduler tell of its latents."""
        _GUIDED[self._scheduler] = weakref.ref(self)
        _GUIDING.put_on(self._scheduler)

    def remove(self) -> None:
        """Leaves the scheduler as it was; nothing happens the second time.

        Where the model has been given new latents, and the pipeline is yet to step from them, that
        is what it does first.
        """
        with self._lock:
            self.is_removed = True
            if self._changed is not None and _is_running(self._scheduler):
                _GUIDED[self._scheduler] = lambda: self  # the handle may be dropped
            else:
                self._take_off()

    def _take_off(self) -> None:
        if _guidance_of(self._scheduler) is self:
            _GUIDING.take_off(self._scheduler)
            del _GUIDED[self._scheduler]

    # What the scheduler's own calls tell and are told.

    def note(self, latents: Tensor, scaled: Tensor, timestep: Any) -> None:
        """Notes what the scheduler has scaled for the next evaluation of the model."""
        self.noted, self._changed = Noted(latents, scaled, timestep), None
        if self.is_removed:  # before a step that has not come
            self._take_off()

    def replace(self, latents: Tensor, updated: Tensor) -> None:
        """Has the next step go on from updated latents in the place of the pipeline's.

        Raises:
            RuntimeError: The handle was removed meanwhile.
        """
        with self._lock:
            if self.is_removed:
                raise RuntimeError(
                    "guide_latents was removed from this pipeline while it ran, within an update "
                    "of the latents"
                )
            self._changed = latents, updated

    def latents_of_step(self, latents: Tensor) -> tuple[Tensor, bool]:
        """Returns the latents for the scheduler's step, and whether they have been updated.

        Raises:
            RuntimeError: They are not those that the model was called with.
        """
        with self._lock:
            changed, self._changed, self.noted = self._changed, None, None
            if self.is_removed:
                self._take_off()
        if changed is None:
            return latents, False
        before, after = changed
        if latents.shape != before.shape:  # some pipelines step with a row for each frame
            before, after = (x.transpose(1, 2).flatten(0, 1) for x in (before, after))
        if latents.shape != before.shape or not torch.equal(latents, before):
            raise RuntimeError(
                "the pipeline steps from other latents than it called the model with: "
                "guide_latents cannot tell what to make of them"
            )
        return after, True

    # The schedule.

    @property
    def num_steps(self) -> int:
        """The number of denoising steps."""
        return schedule.count_steps(self._scheduler)

    @property
    def first_step(self) -> int:
        """The step at which the pipeline begins."""
        return int((getattr(self._scheduler, "begin_index", None) or 0) // self._scheduler.order)

    @property
    def goes_on(self) -> bool:
        """Whether the next step goes on from the latents of an earlier evaluation."""
        return goes_on(self._scheduler)

    def find_step(self, timestep: Any) -> int:
        """Returns the step of a timestep."""
        return schedule.find_step(timestep, self._scheduler)

    def decay(self, decay: Decay, noted: Noted, step: int) -> float:
        """Returns how much an update weighs, see :class:`GuidanceConfig`.

        Raises:
            ValueError: It is to follow the noise, of which the scheduler does not tell.
        """
        alphas = getattr(self._scheduler, "alphas_cumprod", None)
        if decay == "auto":
            decay = "linear" if alphas is None else "noise"
        if decay == "linear":
            return 1 - 0.5 * step / max(self.num_steps - 1, 1)
        if alphas is None:
            raise ValueError(
                f'decay="noise" needs a scheduler with alphas_cumprod, and '
                f'{type(self._scheduler).__name__} has none: use "linear"'
            )
        place = min(max(round(float(noted.timestep)), 0), len(alphas) - 1)
        return math.sqrt(1 - float(alphas[place]))

    # The scale of latents.

    def scale(self, latents: Tensor, timestep: Any) -> Tensor:
        """Returns what the scheduler gives the model, without noting it."""
        scaled: Tensor = self._own_scale(self._scheduler, latents, timestep)
        return scaled

    def factor(self, noted: Noted) -> float:
        """Returns the factor by which the scheduler scales latents at an evaluation."""
        one = torch.ones(1, device=noted.latents.device)
        return float(self.scale(one, noted.timestep))


def goes_on(scheduler: Any) -> bool:
    """Returns whether the next step goes on from the latents of an earlier evaluation.

    What is done to the latents of this one is then lost, but for the model's output.
    """
    first = getattr(scheduler, "state_in_first_order", None)  # Heun, KDPM2, DPM-Solver SDE
    if first is not None:
        return not first
    orders, place = (getattr(scheduler, name, None) for name in ("order_list", "step_index"))
    if orders is not None and place is not None:  # DPM-Solver singlestep
        return bool(orders[place] > 1)
    if getattr(scheduler, "counter", 0) == 0:
        return False
    return getattr(scheduler, "cur_sample", None) is not None  # PNDM


def _is_running(scheduler: Any) -> bool:
    """Returns whether a pipeline with a scheduler is being called, in whatever thread."""
    for frame in list(sys._current_frames().values()):
        at: Any = frame
        while at is not None:
            owner = at.f_locals.get("self") if at.f_code.co_name == "__call__" else None
            if hasattr(owner, "components") and getattr(owner, "scheduler", None) is scheduler:
                return True
            at = at.f_back
    return False


def _guidance_of(scheduler: Any) -> GuidedScheduler | None:
    """Returns what guides the pipeline of a scheduler, if anything does."""
    found = _GUIDED.get(scheduler)
    return None if found is None else found()


def _guided_calls(base: Any) -> dict[str, Callable[..., Any]]:
    """Returns the methods of a guided scheduler; their signatures, which pipelines ask, stay."""

    @functools.wraps(base.scale_model_input)
    def scale_model_input(scheduler: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scaled: Tensor = base.scale_model_input(scheduler, sample, *args, **kwargs)
        guided = _guidance_of(scheduler)
        if guided is not None:
            guided.note(sample, scaled, args[0] if args else kwargs.get("timestep"))
        return scaled

    @functools.wraps(base.step)
    def step(
        scheduler: Any, model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        guided = _guidance_of(scheduler)
        if guided is not None:
            sample, is_changed = guided.latents_of_step(sample)
            # UniPC and SA-Solver correct the result of the step before, which is not there now.
            if is_changed and getattr(scheduler, "last_sample", None) is not None:
                scheduler.last_sample = None
        return base.step(scheduler, model_output, timestep, sample, *args, **kwargs)

    return {"scale_model_input": scale_model_input, "step": step}


_GUIDING = ClassChange(_guided_calls)
# The handle, which the model's hook holds, holds what is here: pipelines that are dropped under
# guidance are not kept by this.
_GUIDED: WeakKeyDictionary[Any, Callable[[], GuidedScheduler | None]] = WeakKeyDictionary()
