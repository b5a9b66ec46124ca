"""Many videos by one model: the pipeline is loaded once, and each video is a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vstar_kernels.cli.generate.options import GenerateOptions, VideoOptions
from vstar_kernels.cli.generate.results import FILES, write_files
from vstar_kernels.cli.generate.video import load_pipeline, sampler
from vstar_kernels.cli.jobs import INDEX, Job, JobFolder, Outcome, Place, run_jobs
from vstar_kernels.cli.options import CommandError
from vstar_kernels.cli.progress import JobReport
from vstar_kernels.models.progress import OnStep
from vstar_kernels.reading import shorten

FACTS = ("seed",)  # of a record, which the index shows
MOST_SHOWN = 10  # failures


class VideoMaker:
    """Makes the videos of jobs by one pipeline; see :class:`vstar_kernels.cli.jobs.Make`.

    Args:
        options: The pipeline.
        device: Where it runs.

    Raises:
        CommandError: It cannot be loaded.
    """

    def __init__(self, options: VideoOptions, device: str) -> None:
        self._device = device
        self._pipe: Any = load_pipeline(options, device)
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
    jobs: Sequence[Job], output: Path, video: VideoOptions, device: str, *, retries: int
) -> list[Outcome]:
    """Makes all videos that are not in a folder yet; returns what became of each.

    Raises:
        CommandError: The folder cannot be made, or the model cannot be loaded.
    """
    try:
        folder = JobFolder(output, jobs, FILES, facts=FACTS)
        if not folder.places:
            folder.write_index(folder.done)
            return folder.done
        make = VideoMaker(video, device)
        with JobReport(len(jobs), len(folder.done)) as report:
            return run_jobs(folder, make, report, retries=retries)
    except OSError as error:
        raise CommandError(f"--output: {error}") from error


def tell(outcomes: Sequence[Outcome], output: Path) -> int:
    """Prints what became of all jobs; returns the exit status, 1 where one has failed."""
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    made = sum(outcome.seconds is not None for outcome in outcomes)
    there = len(outcomes) - made - len(failures)
    print(f"{made} made, {there} there already, {len(failures)} failed: {output / INDEX}")
    for outcome in failures[:MOST_SHOWN]:
        print(f"  {outcome.number}: {shorten(outcome.name, 60)}: {outcome.error}")
    if len(failures) > MOST_SHOWN:
        print(f"  and {len(failures) - MOST_SHOWN} more")
    return 1 if failures else 0
