"""How far a command is: bars on a terminal, and a line for each video that is finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vstar_kernels.cli.output import say
from vstar_kernels.models.progress import OnStep
from vstar_kernels.reading import shorten

if TYPE_CHECKING:
    from vstar_kernels.cli.jobs import Outcome, Place

SHOWN = 32  # characters of a job's name beside its bar


def _bar(**options: Any) -> Any:
    """Returns a bar on standard error, which is not drawn where that is no terminal."""
    from tqdm import tqdm

    return tqdm(disable=None, dynamic_ncols=True, **options)


class StepBar:
    """A bar of the denoising steps of one video after another; itself an ``on_step``."""

    def __init__(self, **options: Any) -> None:
        self._bar = _bar(unit="step", **options)

    def begin(self, name: str) -> None:
        """Begins another video."""
        self._bar.set_description(shorten(name, SHOWN), refresh=False)
        self._bar.reset()

    def __call__(self, step: int, total: int) -> None:
        """Shows that a step begins."""
        if self._bar.total != total or step < self._bar.n:
            self._bar.reset(total)
        self._bar.update(step - self._bar.n)

    def finish(self) -> None:
        """Shows that the last step is done."""
        if self._bar.total:
            self._bar.update(self._bar.total - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


@contextmanager
def step_bar() -> Iterator[OnStep]:
    """Gives an ``on_step`` that shows the steps of one video."""
    bar = StepBar(leave=True)
    try:
        yield bar
        bar.finish()
    finally:
        bar.close()


class JobReport:
    """Reports jobs: a bar of them, one of the steps of the one that runs, and a line for each.

    Args:
        total: How many jobs there are.
        done: How many of them are there already.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._jobs = _bar(total=total, initial=done, unit="video", position=0)
        self._steps = StepBar(leave=False, position=1)

    def begins(self, place: Place) -> OnStep:
        """Shows a job's name; returns what shows its steps."""
        self._steps.begin(place.folder)
        return self._steps

    def ends(self, outcome: Outcome) -> None:
        """Prints what became of a job."""
        if outcome.status == "done":
            seconds = "" if outcome.seconds is None else f", {outcome.seconds:.1f} s"
            text = f"{outcome.folder}: done{seconds}"
        else:
            text = f"{shorten(outcome.name, SHOWN)}: failed: {outcome.error}"
        say(f"[{outcome.number}/{self._total}] {text}", self._jobs.write)
        self._jobs.update()

    def __enter__(self) -> JobReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()
        self._jobs.close()
