"""Many videos by one model: the pipeline is loaded once, and each video is a job."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vstar_kernels.cli.generate.options import GenerateOptions, VideoOptions
from vstar_kernels.cli.generate.results import FILES, write_files
from vstar_kernels.cli.generate.video import best_device, load_pipeline, sampler
from vstar_kernels.cli.jobs import INDEX, Job, JobFolder, Outcome, Place, run_jobs
from vstar_kernels.cli.options import CommandError, check_device, integer, option, optional, parsed
from vstar_kernels.cli.output import say
from vstar_kernels.cli.progress import JobReport
from vstar_kernels.models.progress import OnStep
from vstar_kernels.reading import shorten

FACTS = ("seed",)  # of a record, which the index shows
MOST_SHOWN = 10  # failures
MOST_RETRIES = 100
MOST_WORKERS = 10_000
LOCAL = "local"  # what ray.init takes for a cluster of this machine, while the command runs


@dataclass(frozen=True)
class RunOptions:
    """How many videos are made."""

    retries: Annotated[int, parsed(integer(0, MOST_RETRIES), "N")] = 1
    """How often a video is tried again that failed for another reason than its options."""
    ray: Annotated[str | None, optional("ADDRESS", LOCAL), option()] = None
    """On a Ray cluster, whose machines share --output: its address, or auto; without a value, one
    of this machine alone."""
    workers: Annotated[
        int | None,
        parsed(integer(1, MOST_WORKERS), "N"),
        option(default="one for each GPU, or for each machine if there is none"),
    ] = None
    """How many models --ray holds at once."""

    def __post_init__(self) -> None:
        """Raises CommandError for options that do not fit each other."""
        if self.workers is not None and self.ray is None:
            raise CommandError("--workers is for --ray")


class VideoMaker:
    """Makes the videos of jobs by one pipeline; see :class:`vstar_kernels.cli.jobs.Make`.

    Args:
        options: The pipeline, and its device.

    Raises:
        CommandError: It cannot be loaded, or not where the options have it.
    """

    def __init__(self, options: VideoOptions) -> None:
        self._device = options.device or best_device()
        check_device(self._device)
        self._pipe: Any = load_pipeline(options, self._device)
        self._pipe.set_progress_bar_config(disable=True)

    def __call__(self, task: GenerateOptions, scratch: Path, place: Place, on_step: OnStep) -> None:
        """Makes a video and writes its files."""
        generation = sampler(task)(self._pipe, on_step)
        write_files(
            scratch,
            task,
            generation,
            pipeline=type(self._pipe).__name__,
            device=self._device,
            mark=place.mark,
        )


def make_all(
    jobs: Sequence[Job],
    output: Path,
    video: VideoOptions,
    options: RunOptions,
    *,
    more_files: Collection[str] = (),
) -> list[Outcome]:
    """Makes all videos that are not in a folder yet; returns what became of each.

    Args:
        jobs: All of them.
        output: The folder.
        video: The model.
        options: How.
        more_files: The names of others' files beside a video, which go with an earlier one.

    Raises:
        CommandError: The folder cannot be made, the model cannot be loaded, or there is no such
            cluster.
    """
    try:
        folder = JobFolder(output, jobs, (*FILES, *more_files), facts=FACTS)
        if not folder.places:
            folder.write_index(folder.done)
            return folder.done
        load = functools.partial(VideoMaker, video)
        if options.ray is None:
            make = load()
            with JobReport(len(jobs), len(folder.done)) as report:
                return run_jobs(folder, make, report, retries=options.retries)
        from vstar_kernels.cli.cluster import run_on_ray

        with JobReport(len(jobs), len(folder.done)) as report:
            return run_on_ray(
                folder,
                load,
                report,
                address=options.ray,
                workers=options.workers,
                retries=options.retries,
                gpus=(video.device or "cuda").startswith("cuda"),
            )
    except OSError as error:
        raise CommandError(f"--output: {error}") from error


def tell(outcomes: Sequence[Outcome], output: Path) -> int:
    """Prints what became of all jobs; returns the exit status, 1 where one has failed."""
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    made = sum(outcome.seconds is not None for outcome in outcomes)
    there = len(outcomes) - made - len(failures)
    say(f"{made} made, {there} there already, {len(failures)} failed: {output / INDEX}")
    for outcome in failures[:MOST_SHOWN]:
        say(f"  {outcome.number}: {shorten(outcome.name, 60)}: {outcome.error}")
    if len(failures) > MOST_SHOWN:
        say(f"  and {len(failures) - MOST_SHOWN} more")
    return 1 if failures else 0
