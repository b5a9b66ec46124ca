"""How far a pipeline has come, told step by step, and how to stop it: the hook of ``on_step``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import modules_of
from vstar_kernels.models.full3d.apply import find_full3d
from vstar_kernels.models.full3d.families import Family
from vstar_kernels.models.full3d.layouts import Call
from vstar_kernels.models.hooks import Argument, Handle, put_back
from vstar_kernels.models.schedule import count_steps, look_up_step, scheduler_of

# Is told the index of a step that begins, and how many there are in the whole schedule.
OnStep = Callable[[int, int], object]
# What diffusers' video pipelines call the models that predict the noise.
DENOISERS = ("unet", "transformer", "transformer_2")


class Cancelled(Exception):  # noqa: N818 - it says what happened, and is no error
    """Somebody does not want the video any more; what ``on_step`` raises to stop the sampling.

    The library raises it nowhere by itself.
    """


def watch_steps(pipe: Any, on_step: OnStep) -> StepWatch:
    """Calls a function at the beginning of each denoising step of a pipeline.

    >>> with vk.watch_steps(pipe, lambda step, total: print(step, "of", total)):
    ...     video = pipe(prompt).frames

    It is called before the model's first forward pass of a step, in the thread that samples, and
    whatever it raises ends the pipeline's call there: :class:`Cancelled`, for one. Nothing that
    the pipeline computes changes by it. Diffusers' own callbacks come after a step, and some
    pipelines have none.

    Args:
        pipe: A pipeline of diffusers: one with a scheduler, and a model among its components that
            is called ``unet`` or ``transformer``.
        on_step: Is called with the index of the step, as :class:`vstar_kernels.TARConfig` counts
            them, and the number of steps in the whole schedule; what it returns is ignored. Where
            the pipeline enters its schedule later (``strength``), the first index is not 0, and
            where it runs it several times (FreeInit), indices begin again.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        TypeError: ``pipe`` is not such a pipeline, or ``on_step`` cannot be called.
    """
    if not callable(on_step):
        raise TypeError(
            f"on_step must be a callable of (step, total), got {type(on_step).__name__}"
        )
    has_scheduler = getattr(pipe, "scheduler", None) is not None
    models = modules_of(pipe) if has_scheduler and not isinstance(pipe, nn.Module) else {}
    models = {name: models[name] for name in DENOISERS if name in models}
    if not models:
        raise TypeError(
            "pipe must be a pipeline of diffusers, with a scheduler and a unet or a transformer, "
            f"got {type(pipe).__name__}"
        )
    families = find_full3d(pipe)
    return StepWatch(
        on_step,
        scheduler_of(pipe, None),
        [
            (model, families[name][1] if name in families else None)
            for name, model in models.items()
        ],
    )


def steps_told(pipe: Any, on_step: OnStep | None) -> AbstractContextManager[StepWatch | None]:
    """Returns :func:`watch_steps`, or nothing where there is nobody to be told."""
    return nullcontext() if on_step is None else watch_steps(pipe, on_step)


class StepWatch(Handle):
    """What tells of a pipeline's steps: a context manager, with :meth:`remove`."""

    def __init__(
        self,
        on_step: OnStep,
        find_scheduler: Callable[[nn.Module], Any],
        models: list[tuple[nn.Module, Family | None]],
    ) -> None:
        self._on_step = on_step
        self._find_scheduler = find_scheduler
        self._here = threading.local()
        self._watches = [_ModelWatch(self, model, family) for model, family in models]
        try:
            for one in self._watches:
                watch(one.model, one.passes)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Tells nobody any more; nothing happens the second time."""
        super().remove()
        put_back(*(one.leave for one in self._watches))

    def tell(self, model: nn.Module, timestep: Any) -> None:
        """Calls the function where a forward pass of this thread begins another step."""
        scheduler = self._find_scheduler(model)
        step = look_up_step(timestep, scheduler, "on_step")
        timesteps = getattr(scheduler, "timesteps", None)
        # They are set anew for each run, of which the first step may be the last one's of another.
        run = weakref.ref(timesteps) if isinstance(timesteps, Tensor) else None
        last_run, last_step = getattr(self._here, "last", (None, None))
        if run is last_run and step == last_step:
            return
        self._here.last = run, step  # first: whoever catches what is raised now has been told
        self._on_step(step, count_steps(scheduler))


class _ModelWatch:
    """One model whose calls tell of steps.

    Attributes:
        passes: Through which it sees each call before the model's hooks, compiled or not.
    """

    def __init__(self, owner: StepWatch, model: nn.Module, family: Family | None) -> None:
        self.model = model
        self.passes: ForwardPasses[ForwardPass] = ForwardPasses(opens=self._open)
        self._owner = owner
        self._family = family

    def leave(self) -> None:
        """Ends it."""
        unwatch(self.model, self.passes)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._family is None:
            timestep = Argument(self.model, "timestep").get(args, kwargs)
        else:
            timestep = self._family.read_timestep(Call(self.model, args, kwargs))
        self._owner.tell(self.model, timestep)
