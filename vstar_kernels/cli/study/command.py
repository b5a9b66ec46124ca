"""``vstar-kernels study``: prompts × variants × seeds, with their scores and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from vstar_kernels.cli.generate.batch import RunOptions, make_all, tell
from vstar_kernels.cli.generate.command import PACKAGES
from vstar_kernels.cli.generate.options import MAX_SEED, GenerateOptions
from vstar_kernels.cli.jobs import Outcome
from vstar_kernels.cli.options import (
    SHOWN,
    CommandError,
    check_packages,
    integer,
    option,
    several,
)
from vstar_kernels.cli.output import say
from vstar_kernels.cli.study.plan import StudyPlan, Video, read_study
from vstar_kernels.cli.study.report import PAGE, write_report
from vstar_kernels.cli.study.scores import SCORES, check_scores, load_scorer, score_video
from vstar_kernels.cli.study.table import Row
from vstar_kernels.reading import shorten


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RunOptions):
    """What is compared."""

    file: Annotated[Positional[Path], option("FILE")]
    """YAML or JSON with prompts, variants, seeds, options and scores; or prompts alone: the
    official prompt_list.json, a text of one a line, or a CSV such as ChronoMagic-Bench's."""
    variants: Annotated[
        tuple[str, ...] | None,
        several(str, "NAME"),
        option(default="the file's; else baseline, VSP, TAR and both, without stages two of them"),
    ] = None
    """Variants: baseline, VSP, TAR, both, or presets."""
    seeds: Annotated[
        tuple[int, ...] | None,
        several(integer(0, MAX_SEED), "N"),
        option(default="the file's, or 0"),
    ] = None
    """Seeds."""
    scores: Annotated[
        tuple[str, ...] | None, several(str, "NAME"), option(default="the file's, or none")
    ] = None
    """Scores with their usual settings: frame_similarity, temporal_distance, clip_vl. Those by
    models of yours (mt_score, numeracy, action_binding) are described in the file."""
    rescore: bool = False
    """Compute scores again that were."""


@dataclass(frozen=True)
class Study(GenerateOptions):
    """Videos of prompts × variants × seeds, with their scores and a page; run again, it goes on."""

    study: StudyOptions

    def run(self) -> int:
        """Makes what is missing, scores all, and writes the page; returns 1 if anything failed.

        Raises:
            CommandError: The study is not one, or cannot be begun.
        """
        self._check_free()
        check_packages(PACKAGES, extra="generate")
        options = self.study
        plan = read_study(
            options.file, variants=options.variants, seeds=options.seeds, scores=options.scores
        )
        check_scores(plan.scores)
        videos = plan.videos(self)
        output = self.output.output
        jobs = [video.job for video in videos]
        outcomes = make_all(jobs, output, self.video, options, more_files=[SCORES])
        status = tell(outcomes, output)
        rows, unscored = self._score(plan, videos, outcomes)
        failures = [(x.name, x.error or "") for x in outcomes if x.status == "failed"]
        self._report(plan, videos, rows, [*failures, *unscored])
        for name, error in unscored:
            say(f"  not scored: {shorten(name, 60)}: {error}")
        say(f"page: {shorten(str(output / PAGE), SHOWN)}")
        return 1 if unscored else status

    def _score(
        self, plan: StudyPlan, videos: Sequence[Video], outcomes: Sequence[Outcome]
    ) -> tuple[list[Row], list[tuple[str, str]]]:
        """Returns the scores of all videos that are there, and what could not be scored and why."""
        failures: list[tuple[str, str]] = []
        scorers: dict[str, Any] = {}
        for name, settings in plan.scores.items():
            identity = json.dumps([name, settings], sort_keys=True, ensure_ascii=False)
            try:
                scorers[name] = (identity, load_scorer(name, settings))
            except CommandError as error:
                failures.append((name, str(error)))
        rows = []
        for video, outcome in zip(videos, outcomes, strict=True):
            if outcome.folder is None:
                continue
            values: dict[str, float] = {}
            curves: dict[str, Sequence[float]] = {}
            matrices: dict[str, Sequence[Sequence[float]]] = {}
            place = self.output.output / outcome.folder
            for name, scorer in scorers.items():
                try:
                    found = score_video(place, video, {name: scorer}, again=self.study.rescore)
                    values |= found[name].values
                    curves |= found[name].curves
                    matrices |= found[name].matrices
                except Exception as error:  # whatever models of others raise
                    reason = shorten(str(error)) or type(error).__name__
                    failures.append((outcome.name, f"{name}: {reason}"))
            text, variant = video.prompt.text, video.variant
            what = (outcome.number, outcome.folder, text, variant, video.seed)
            rows.append(Row(*what, values, curves, matrices))
        return rows, failures

    def _report(
        self,
        plan: StudyPlan,
        videos: Sequence[Video],
        rows: Sequence[Row],
        failures: Sequence[tuple[str, str]],
    ) -> None:
        facts = [
            ("model", self.video.model),
            ("prompts", str(len(plan.prompts))),
            ("variants", ", ".join(variant.name for variant in plan.variants)),
            ("seeds", ", ".join(map(str, plan.seeds))),
            ("videos", f"{len(rows)} of {len(videos)}"),
        ]
        title = f"Study: {self.study.file.stem}"
        try:
            write_report(self.output.output, title, videos, rows, failures, facts)
        except OSError as error:
            raise CommandError(f"--output: {error}") from error

    def _check_free(self) -> None:
        """Raises CommandError for options that the study's file decides."""
        given = {
            "--prompt": self.video.prompt,
            "--synopsis": self.synopsis.synopsis,
            "--plan": self.plan.plan,
            "--seed": self.video.seed,
            "--overwrite": self.output.overwrite or None,
        }
        for name, value in given.items():
            if value is not None:
                raise CommandError(f"{name} is for one video: a study's are in its file")
