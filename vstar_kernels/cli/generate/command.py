"""``vstar-kernels generate``: a video from a prompt by a whole method, or many from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vstar_kernels.cli.generate.batch import RunOptions, make_all, tell
from vstar_kernels.cli.generate.options import GenerateOptions
from vstar_kernels.cli.generate.prompts import read_prompts
from vstar_kernels.cli.generate.results import FILES, told, write_files
from vstar_kernels.cli.generate.video import (
    best_device,
    errors_of_the_call,
    load_pipeline,
    sampler,
)
from vstar_kernels.cli.options import (
    SHOWN,
    CommandError,
    check_device,
    check_output,
    check_packages,
    option,
    output_folder,
)
from vstar_kernels.cli.output import say
from vstar_kernels.cli.progress import step_bar
from vstar_kernels.reading import shorten

PACKAGES = ("diffusers", "transformers", "av", "jinja2", "matplotlib", "PIL", "pydantic", "tqdm")


@dataclass(frozen=True)
class BatchOptions(RunOptions):
    """Many videos: --prompts."""

    prompts: Annotated[Path | None, option("FILE")] = None
    """A prompt a line; or JSON Lines, objects with prompt, seed and whatever other options of a
    video, and name. Each video is a folder in --output, those that are there are not made again,
    and one that fails stops nothing."""

    def __post_init__(self) -> None:
        """Raises CommandError for options that do not fit each other."""
        super().__post_init__()
        if self.prompts is not None:
            return
        for name, is_given in {
            "--ray": self.ray is not None,
            "--retries": self.retries != RunOptions.retries,
        }.items():
            if is_given:
                raise CommandError(f"{name} is for --prompts")


@dataclass(frozen=True)
class Generate(GenerateOptions):
    """A video from a prompt, with a whole method; or many, from a file of prompts."""

    batch: BatchOptions

    def run(self) -> int:
        """Makes the video and writes its folder, or many; returns the exit status.

        Raises:
            CommandError: It could not be done; nothing was written.
        """
        if self.batch.prompts is not None:
            return self._run_all(self.batch.prompts)
        self.check_complete()
        output = self.output.output
        check_output(output, overwrite=self.output.overwrite)
        check_packages(PACKAGES, extra="generate")
        device = self.video.device or best_device()
        check_device(device)
        sample = sampler(self)
        with output_folder(output, FILES, overwrite=self.output.overwrite) as scratch:
            pipe = load_pipeline(self.video, device)
            pipe.set_progress_bar_config(disable=True)
            with errors_of_the_call(), step_bar() as on_step:
                generation = sample(pipe, on_step)
            write_files(scratch, self, generation, pipeline=type(pipe).__name__, device=device)
        for line in told(generation):
            say(line)
        say(f"video: {shorten(str(output / 'video.mp4'), SHOWN)}")
        return 0

    def _run_all(self, prompts: Path) -> int:
        """Makes all videos of a file; returns 1 if one has failed."""
        for name, value in {
            "--prompt": self.video.prompt,
            "--overwrite": self.output.overwrite,
        }.items():
            if value:
                raise CommandError(f"{name} is for one video, --prompts for many: give one of them")
        check_packages(PACKAGES, extra="generate")
        jobs = read_prompts(prompts, self)
        output = self.output.output
        return tell(make_all(jobs, output, self.video, self.batch), output)
