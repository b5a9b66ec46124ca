"""The step gate: at which denoising steps attention is regularized.

The model is told a timestep, not a step. The step is looked up in the scheduler's ``timesteps``, so
that nothing is counted: loops that restart (FreeInit) or call the model twice in a step need no
care.
"""

from __future__ import annotations

import operator
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vstar_kernels.models.hooks import Handle
from vstar_kernels.reading import shorten

Steps = int | float | Callable[[int, float], bool] | None


def check_steps(steps: Steps) -> None:
    """Raises if ``steps`` is not of a kind that :class:`StepGate` takes.

    Raises:
        TypeError, ValueError: It is not.
    """
    if steps is None or callable(steps):
        return
    if isinstance(steps, bool) or not isinstance(steps, int | float):
        raise TypeError(
            "steps must be an int (the last step index), a float (a share of the schedule), None "
            f"(all) or a callable (step, timestep) -> bool, got {type(steps).__name__}"
        )
    if isinstance(steps, int):
        if steps < 0:
            raise ValueError(f"steps as an index must be at least 0, got {steps}")
    elif not 0 < steps <= 1:
        raise ValueError(f"steps as a share of the schedule must be in (0, 1], got {steps}")


def as_indices(name: str, value: Any, allowed: str) -> frozenset[int] | None:
    """Returns indices, such as those of steps, as a set; None for all.

    Args:
        name: The argument's name, for messages.
        value: What was given for it.
        allowed: What it may be, for messages.

    Raises:
        TypeError: They are not integers, or no collection.
        ValueError: One is negative.
    """
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    found = set()
    for item in value:
        try:
            index = operator.index(item)
        except TypeError:
            index = None
        if index is None or isinstance(item, bool):
            raise TypeError(f"{name} must be {allowed}, got one of {item!r}")
        if index < 0:
            raise ValueError(f"{name} counts from 0, and from the first only, got {index}")
        found.add(index)
    return frozenset(found)


def describe_steps(steps: Steps) -> str:
    """Returns when that is, in words."""
    if steps is None:
        return "at all steps"
    if callable(steps):
        return f"where {getattr(steps, '__name__', repr(steps))}(step, timestep)"
    if isinstance(steps, int):
        return f"at steps 0 to {steps}"
    return f"in the first {steps:.0%} of the steps"


class StepGate:
    """Decides whether a forward pass is at a regularized step.

    The index of a step is its place in ``scheduler.timesteps``, the whole schedule's even where
    img2vid's ``strength`` skips its beginning: a step index always means the same noise level. It
    counts denoising steps, not calls of the model, with second-order schedulers (Heun, KDPM2), and
    a timestep that a first-order one visits twice (PNDM) is one step.

    Args:
        steps: See :class:`vstar_kernels.TARConfig`.
        find_scheduler: See :func:`scheduler_of`.

    Attributes:
        announced: The step that the caller announces, instead of looking it up.
    """

    def __init__(self, steps: Steps, find_scheduler: FindScheduler) -> None:
        check_steps(steps)
        self.steps = steps
        self.announced = AnnouncedStep()
        self._find_scheduler = find_scheduler

    def is_on(self, model: nn.Module, timestep: Any, step: int | None = None) -> bool:
        """Returns whether TAR is on for a forward pass that begins in this thread.

        Args:
            model: The model.
            timestep: What the model is given: a number, or a tensor of equal ones.
            step: The step, where the model is told it (the official code).

        Raises:
            ValueError: The step cannot be known, or the schedule has been cut so that no step is
                regularized.
            RuntimeError: Several other threads have announced a step, and this one has not.
        """
        if self.steps is None:
            return True
        told = self.announced.get()
        told = step if told is None else told
        scheduler = self._find_scheduler(model)
        if told is not None:
            return self._decide(told, timestep, scheduler)
        step = look_up_step(timestep, scheduler, f"steps={self.steps!r}")
        on = self._decide(step, timestep, scheduler)
        if not on and not callable(self.steps):
            self._check_begin(scheduler, timestep)
        return on

    def find(self, model: nn.Module, timestep: Any) -> int:
        """Returns the step of a forward pass that begins in this thread.

        Raises:
            ValueError: It cannot be known.
            RuntimeError: Several other threads have announced a step, and this one has not.
        """
        announced = self.announced.get()
        if announced is not None:
            return announced
        scheduler = self._find_scheduler(model)
        return look_up_step(timestep, scheduler, "a rule for each step")

    def _decide(self, step: int, timestep: Any, scheduler: Any) -> bool:
        if callable(self.steps):
            return bool(self.steps(step, timestep_value(timestep)))
        if isinstance(self.steps, int):
            return step <= self.steps
        assert self.steps is not None
        # 0.56 × 25 is a little more than 14 in floating point.
        return step < round(self.steps * self._num_steps(scheduler), 6)

    def _num_steps(self, scheduler: Any) -> int:
        if scheduler is None:
            raise ValueError(
                f"steps={self.steps} is a share of the schedule: give apply_tar the scheduler=, or "
                "give steps as an index"
            )
        return count_steps(scheduler)

    def _check_begin(self, scheduler: Any, timestep: Any) -> None:
        begin = getattr(scheduler, "begin_index", None)
        if not begin:
            return
        first_step = begin // scheduler.order
        if not self._decide(first_step, timestep, scheduler):
            raise ValueError(
                f"steps={self.steps!r} regularizes no step: the schedule is entered at step "
                f"{first_step} (strength of the pipeline), and step indices are those of the whole "
                f"schedule of {self._num_steps(scheduler)}. Allow more steps, or use steps=None"
            )


class ChosenSteps:
    """Says which steps a capture wants, and the step of a forward pass.

    Args:
        steps: The indices; None for all.
        find_scheduler: See :func:`scheduler_of`.

    Attributes:
        announced: The step that the caller announces, instead of looking it up.
    """

    def __init__(self, steps: Collection[int] | None, find_scheduler: FindScheduler) -> None:
        self.find_scheduler = find_scheduler
        self.announced = AnnouncedStep()
        self._steps = steps
        self._others: set[int] = set()

    def find(self, model: nn.Module, timestep: Any, told: int | None = None) -> int | None:
        """Returns the step of a forward pass that begins in this thread, None if it is not known.

        Args:
            model: The model.
            timestep: What the model is called with.
            told: The step, where the model is told it (the official code).

        Raises:
            ValueError: It is not known, and some steps are wanted.
            RuntimeError: Several other threads have announced a step, and this one has not.
        """
        announced = self.announced.get()
        told = told if announced is None else announced
        if told is not None:
            return told
        scheduler = self.find_scheduler(model)
        if scheduler is None and self._steps is None:
            return None
        return look_up_step(timestep, scheduler, "steps")

    def wants(self, step: int | None) -> bool:
        """Returns whether a step is one of those; takes note of it otherwise."""
        if self._steps is None or step in self._steps:
            return True
        if step is not None:
            self._others.add(step)
        return False

    def forget(self) -> None:
        """Forgets at which other steps the model was called."""
        self._others = set()

    def warn_without_maps(self) -> None:
        """Warns whoever reads no maps, if the model was called, but at other steps alone."""
        others = self._others
        if not self._steps or not others:
            return
        asked = ", ".join(map(str, sorted(self._steps)))
        called = ", ".join(map(str, sorted(others)))
        warnings.warn(
            f"there are no maps: steps names {shorten(asked, 60)}, and the model was called at "
            f"{shorten(called, 60)}",
            stacklevel=3,
        )


T = TypeVar("T")


class Announced(Generic[T]):
    """What the caller announces of a forward pass, by the thread that announces it.

    A thread that announces nothing has what the thread that does announces: a pool of threads may
    run what one thread directs. What a thread has announced ends with the thread.
    """

    name = "a value"  # in messages

    def __init__(self) -> None:
        # By the thread itself: its number is given to another one when it has ended.
        self._values: dict[threading.Thread, T] = {}

    def get(self) -> T | None:
        """Returns what holds for this thread's forward pass, or None if nothing is announced.

        Raises:
            RuntimeError: Several other threads have announced one.
        """
        values = {thread: x for thread, x in dict(self._values).items() if thread.is_alive()}
        thread = threading.current_thread()
        if thread in values or len(values) < 2:
            return values.get(thread, next(iter(values.values()), None))
        raise RuntimeError(
            f"{len(values)} threads have announced {self.name}, and the one that calls the model "
            "has not: announce it in that thread"
        )

    def set(self, value: T | None) -> None:
        """Announces it for this thread, None to announce nothing."""
        for thread in list(self._values):
            if not thread.is_alive():
                self._values.pop(thread, None)
        if value is None:
            self._values.pop(threading.current_thread(), None)
        else:
            self._values[threading.current_thread()] = value

    @contextmanager
    def during(self, value: T | None) -> Iterator[None]:
        """Announces it for this thread, and in the end what this thread had announced before."""
        before = self._values.get(threading.current_thread())
        self.set(value)
        try:
            yield
        finally:
            self.set(before)


class AnnouncedStep(Announced[int]):
    """The step that the caller announces, by the thread that announces it."""

    name = "a step"

    def set(self, value: int | None) -> None:
        """Announces the step of this thread, None to announce none.

        Raises:
            ValueError: It is not an index.
        """
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0
        ):
            raise ValueError(f"step must be an index of at least 0 or None, got {value!r}")
        super().set(value)


class SteppedHandle(Handle):
    """A handle on models whose step the caller may announce.

    Args:
        announced: What the caller announces.
    """

    def __init__(self, announced: AnnouncedStep) -> None:
        self._announced = announced

    @property
    def step(self) -> int | None:
        """The step that the caller announces, which goes before the scheduler's; None for that."""
        return self._announced.get()

    @step.setter
    def step(self, step: int | None) -> None:
        self._announced.set(step)


FindScheduler = Callable[[nn.Module], Any]


def scheduler_of(pipe_or_model: Any, scheduler: Any) -> FindScheduler:
    """Returns a function that finds the scheduler of a model that is called in this thread.

    That is the scheduler of the pipeline that calls the model, which may be another one than the
    handle was made for; where no pipeline calls it, the scheduler that was given, else that of
    ``pipe_or_model``, else None. It is looked up at each call, because it can be exchanged.

    Raises:
        TypeError: What was given is no scheduler.
    """
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(
            f"scheduler must have timesteps, as diffusers' have, got {type(scheduler).__name__}"
        )

    def find(model: nn.Module) -> Any:
        running = running_scheduler(model)
        if running is not None:
            return running
        return scheduler if scheduler is not None else getattr(pipe_or_model, "scheduler", None)

    return find


def running_scheduler(model: nn.Module) -> Any:
    """Returns the scheduler of the pipeline that is calling a model, None if there is none.

    Several pipelines may share the model, each with a scheduler of its own, and nothing that the
    model is given says which of them calls it. Hence the pipeline is looked for in the call stack:
    the innermost method of an object with a ``scheduler`` that has the model among its
    ``components``.
    """
    return getattr(running_pipeline(model), "scheduler", None)


def running_pipeline(model: nn.Module) -> Any:
    """Returns the pipeline that is calling a model, see :func:`running_scheduler`; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if not isinstance(owner, nn.Module) and _holds(owner, model):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _holds(owner: Any, model: nn.Module) -> bool:
    if getattr(owner, "scheduler", None) is None:
        return False
    components = getattr(owner, "components", None)
    if not isinstance(components, dict):
        return False
    return any(getattr(part, "_orig_mod", part) is model for part in components.values())


def look_up_step(timestep: Any, scheduler: Any, what: str) -> int:
    """Returns the step of a timestep, as :func:`find_step` does.

    Args:
        timestep: What the model is called with.
        scheduler: The one that runs; None where it is not known.
        what: What needs the step, for the message.

    Raises:
        ValueError: The scheduler is not known, or the timestep is not one of its own.
    """
    if scheduler is None:
        raise ValueError(
            f"{what} needs the step of each forward pass: give the scheduler=, announce it by "
            "handle.step = i, or use the same for all steps"
        )
    return find_step(timestep, scheduler)


def find_step(timestep: Any, scheduler: Any, *, last: bool = False) -> int:
    """Returns the index of the denoising step that evaluates the model at ``timestep``.

    Heun's scheduler visits a timestep as the end of one step and as the start of the next; its own
    ``step_index`` tells them apart, and where it does not know yet, it is the start.

    Args:
        timestep: A number, or a tensor of one value, any shape.
        scheduler: Has ``timesteps``, in the order of denoising, and perhaps ``order`` and
            ``step_index``, as diffusers' schedulers have.
        last: Of several places take the last.

    Raises:
        ValueError: The timestep is not in the schedule, there is no schedule yet, or the tensor
            holds several timesteps.
    """
    timesteps = _timesteps(scheduler)
    value = timestep_value(timestep)
    nearest = min(timesteps, key=lambda candidate: abs(candidate - value))
    # A model of a 16-bit type may be given the timestep in that type.
    dtype = timestep.dtype if _is_floating(timestep) else torch.float32
    if not abs(nearest - value) <= torch.finfo(dtype).eps * abs(value):
        raise ValueError(
            f"timestep {value:g} is not in the scheduler's timesteps ({_shorten(timesteps)}): does "
            "the model run with the scheduler that apply_tar was given?"
        )
    places = [place for place, candidate in enumerate(timesteps) if candidate == nearest]
    order = getattr(scheduler, "order", 1)
    if order == 1:
        return len(set(timesteps[: places[0]]))
    current = getattr(scheduler, "step_index", None)
    place = current if current in places and not last else places[-1]
    return place // order


def count_steps(scheduler: Any) -> int:
    """Returns the number of denoising steps in the scheduler's whole schedule.

    Raises:
        ValueError: There is no schedule yet.
    """
    return find_step(_timesteps(scheduler)[-1], scheduler, last=True) + 1


def _timesteps(scheduler: Any) -> list[float]:
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        raise ValueError(
            f"{type(scheduler).__name__} has no timesteps yet: call its set_timesteps() first"
        )
    return [float(t) for t in torch.as_tensor(timesteps).tolist()]


def timestep_value(timestep: Any) -> float:
    """Returns the one timestep of a forward pass as a number.

    Raises:
        ValueError: There is none, or a tensor holds several.
    """
    if timestep is None:
        raise ValueError("the model was called without a timestep, which tells the step")
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.flatten().tolist())
    if len(values) != 1:
        raise ValueError(
            "the batch must be at one timestep for TAR to know its step, got "
            f"{_shorten(sorted(values))}; use steps=None, or announce it by handle.step = i"
        )
    return float(values.pop())


def _is_floating(timestep: Any) -> bool:
    return isinstance(timestep, Tensor) and timestep.is_floating_point()


def _shorten(values: list[float]) -> str:
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])


class Turns:
    """Which side of guidance a call of a model is, where samplers call it for each.

    The calls of a step are those of one thread at the same timestep with the same latents, one
    after another, in one run of a scheduler's timesteps: those are set anew for each run. Where no
    scheduler is known, a run that stops between the sides and one of the same seed after it look
    like one step, unless :meth:`forget` comes between them.
    """

    def __init__(self) -> None:
        self._last = threading.local()

    def branch(self, timestep: Any, sample: Tensor, scheduler: Any) -> int:
        """Returns how many calls of its step came before a call.

        Args:
            timestep, sample: What the model is called with.
            scheduler: The one that runs; None where it is not known.
        """
        value = torch.as_tensor(timestep).detach().clone()
        timesteps = getattr(scheduler, "timesteps", None)
        # One object for one tensor as long as it lives, which it does not keep.
        run = weakref.ref(timesteps) if isinstance(timesteps, Tensor) else None
        before = getattr(self._last, "call", None)
        branch = 0
        if (
            before is not None
            and before[0] is run
            and _same(before[1], value)
            and _same(before[2], sample)
        ):
            branch = before[3] + 1
        self._last.call = run, value, sample.detach(), branch
        return branch

    def forget(self) -> None:
        """Has the next call of this thread be the first of its step."""
        vars(self._last).pop("call", None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and bool(torch.equal(one, other))
