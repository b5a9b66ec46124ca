"""``vstar-kernels generate --method starvid``: a video by a plan of its subjects, and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vstar_kernels.analysis.plan_plots import plot_guidance, plot_plan, plot_word_maps
from vstar_kernels.cli.options import CommandError, integer, option, parsed
from vstar_kernels.cli.page import figure_uri, render
from vstar_kernels.files import write_atomically
from vstar_kernels.methods.starvid.config import GuidanceConfig
from vstar_kernels.methods.starvid.starvid import GuidedVideo, StarVid
from vstar_kernels.methods.starvid.trajectory import Trajectory
from vstar_kernels.methods.starvid.writer import MOST_KEY_FRAMES, PlanError, TrajectoryWriter
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.progress import OnStep

if TYPE_CHECKING:
    from vstar_kernels.cli.generate.options import GenerateOptions

# Beside those of any method.
FILES = ("report.html", "plan.json", "guidance.json")


@dataclass(frozen=True)
class PlanOptions:
    """A plan of the subjects and their boxes: --method starvid."""

    plan: Annotated[Path | Trajectory | None, parsed(Path, "FILE"), option()] = None
    """JSON that Trajectory.save wrote, or a list of such from which --prompt chooses. Without it
    --writer or --writer-local plans."""
    guidance: Annotated[
        Path | GuidanceConfig | None, parsed(Path, "FILE"), option(default="GuidanceConfig()")
    ] = None
    """JSON that GuidanceConfig.save wrote."""
    key_frames: Annotated[
        int | None,
        parsed(integer(1, MOST_KEY_FRAMES), "N"),
        option(default="the writer's choice"),
    ] = None
    """For how many frames the writer plans boxes."""

    def check(self, options: GenerateOptions) -> None:
        """Raises CommandError unless there is one source of the plan."""
        has_writer = options.synopsis.has_writer
        if (self.plan is not None) == has_writer:
            raise CommandError(
                "--method starvid needs --plan, or a writer of plans (--writer, --writer-url or "
                "--writer-local)" + (": give one of them" if has_writer else "")
            )
        if has_writer and options.video.prompt is None:
            raise CommandError("a writer of plans needs --prompt")
        if not has_writer and self.key_frames is not None:
            raise CommandError("--key-frames is for a writer: give --writer or --writer-local")

    def read_config(self) -> GuidanceConfig:
        """Returns how latents are guided."""
        try:
            if isinstance(self.guidance, Path):
                return GuidanceConfig.load(self.guidance)
            return GuidanceConfig() if self.guidance is None else self.guidance
        except (OSError, ValueError, TypeError) as error:
            raise CommandError(f"--guidance: {error}") from error

    def read_plan(self, prompt: str | None) -> str | Trajectory:
        """Returns the prompt for the writer, or the plan that is in the file."""
        if isinstance(self.plan, Trajectory):
            return self.plan
        if self.plan is None:
            assert prompt is not None
            return prompt
        try:
            if prompt is None:
                return Trajectory.load(self.plan)
            return TrajectoryWriter.from_file(self.plan).write(prompt)
        except (OSError, ValueError, PlanError) as error:
            hint = "" if prompt else " (several plans need --prompt)"
            raise CommandError(f"--plan: {error}{hint}") from error


def starvid(
    options: GenerateOptions, tar: TARConfig | None, image: dict[str, Any]
) -> Callable[[Any, OnStep], GuidedVideo]:
    """Returns what makes the video from a pipeline, all files of the options read."""
    config, plan = options.plan.read_config(), options.plan.read_plan(options.video.prompt)
    writer = options.synopsis.make_writer(TrajectoryWriter)

    def make(pipe: Any, on_step: OnStep) -> GuidedVideo:
        return StarVid(pipe, config, writer=writer, tar=tar)(
            plan,
            num_frames=options.video.frames,
            key_frames=options.plan.key_frames,
            refresh=options.synopsis.refresh,
            **options.arguments(on_step),
            **image,
        )

    return make


def record_of(video: GuidedVideo) -> dict[str, Any]:
    """Returns what it takes to make the video again beside what it does by any method."""
    return {
        "plan": json.loads(video.plan.to_json()),
        "guidance": json.loads(video.config.to_json()),
        "config": None if video.tar is None else json.loads(video.tar.to_json()),
        "updates": [vars(update) for update in video.updates],
    }


def writers_of(video: GuidedVideo, record: dict[str, Any]) -> dict[str, Callable[[Path], object]]:
    """Returns what writes the files of this method."""
    writers: dict[str, Callable[[Path], object]] = {
        "plan.json": video.plan.save,
        "guidance.json": video.config.save,
        "report.html": lambda path: write_atomically(path, page(video, record)),
    }
    if video.tar is not None:
        writers["config.json"] = video.tar.save
    return writers


def page(video: GuidedVideo, record: dict[str, Any]) -> str:
    """Returns the page that shows the plan over the frames, the words' maps and the losses."""
    boxes, present = video.plan.boxes(len(video.frames))
    labels = [
        subject.noun if subject.verb is None else f"{subject.noun}, {subject.verb}"
        for subject in video.plan.subjects
    ]
    subjects = _subjects_of_words(video)
    texts = video.words.texts

    def maps_figure(maps: Any) -> str:
        return figure_uri(plot_word_maps(maps, texts, boxes, present, subjects))

    guided = {step: maps_figure(maps) for step, maps in _ends(video.guided_maps).items()}
    own = {}
    if video.maps is not None:
        steps = sorted({item.step for item in video.maps.maps if item.step is not None})
        size = video.config.size
        own = {step: maps_figure(video.maps.mean(step=step, size=size)[0]) for step in steps}
    facts = [
        ("prompt", video.plan.prompt),
        ("subjects", "; ".join(labels)),
        ("background", video.plan.background or "not planned"),
        ("pipeline", record["pipeline"]),
        ("model", record["model"]),
        ("frames", str(record["frames"])),
        ("seed", str(video.seed)),
        ("temporal regularization", "none" if video.tar is None else "see config.json"),
    ]
    return render(
        "starvid.html",
        facts=facts,
        plan=figure_uri(plot_plan(boxes, present, labels, video.frames)),
        guided=guided,
        own=own,
        losses=figure_uri(plot_guidance(video.updates)) if video.updates else None,
        first=video.updates[0] if video.updates else None,
        last=video.updates[-1] if video.updates else None,
    )


def _subjects_of_words(video: GuidedVideo) -> list[Sequence[int]]:
    """Returns of each word the subjects whose noun or verb it is."""
    pairs = list(zip(video.words.nouns, video.words.verbs, strict=True))
    return [
        [subject for subject, pair in enumerate(pairs) if column in pair]
        for column in range(len(video.words.texts))
    ]


def _ends(maps: dict[int, Any]) -> dict[int, Any]:
    """Returns the first and the last of some maps by step."""
    steps = sorted(maps)
    return {step: maps[step] for step in dict.fromkeys(steps[:1] + steps[-1:])}
