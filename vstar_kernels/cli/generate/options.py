"""The options of ``vstar-kernels generate``, and what can be found wrong with them at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import create_mutex_group

from vstar_kernels.cli.generate.regularization import RegularizationOptions
from vstar_kernels.cli.generate.starvid import PlanOptions
from vstar_kernels.cli.options import (
    MAX_STEPS,
    CommandError,
    check_model,
    folder,
    integer,
    number,
    option,
    parsed,
    several,
    size,
)
from vstar_kernels.methods.arguments import check_text
from vstar_kernels.methods.grid.video import SIDE, Decode
from vstar_kernels.methods.llm.chat_model import ChatModel
from vstar_kernels.methods.vstar.embeddings import Interpolation, Rounding
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.writer import LEAST_STAGES, MOST_STAGES
from vstar_kernels.methods.writers import Writer
from vstar_kernels.models.progress import OnStep

AnyWriter = TypeVar("AnyWriter", bound=Writer)
# What says what a method's video is of.
TEXTS = {"vstar": "--prompt or --synopsis", "grid": "--prompt", "starvid": "--prompt or --plan"}
OF_STAGES = ("--synopsis", "--writer", "--stages", "--mode", "--rounding")
MIN_SIZE = 8  # pixels
MAX_SEED = 2**32 - 1
MAX_FPS = 120
MAX_FRAMES = 10_000

one_choice_of_maps = create_mutex_group(required=False, title="attention maps: one of")


@dataclass(frozen=True)
class VideoOptions:
    """What is made, and with which model."""

    model: Annotated[str, option("ID_OR_PATH")]
    """A saved pipeline, or one on the Hugging Face hub: TextToVideoSDPipeline, AnimateDiffPipeline,
    I2VGenXLPipeline or LattePipeline; of full-3D transformers WanPipeline, SkyReelsV2Pipeline,
    AnyFlowPipeline, LTXPipeline, AllegroPipeline, CosmosTextToWorldPipeline, CogVideoXPipeline,
    HunyuanVideoPipeline or MochiPipeline; for --method grid StableDiffusionPipeline or
    StableDiffusionXLPipeline."""
    method: Literal["vstar", "grid", "starvid"] = "vstar"
    """VSTAR, the frames as a grid in one image (ETC), or each subject in its boxes (StarVid)."""
    adapter: Annotated[str | None, option("ID_OR_PATH")] = None
    """AnimateDiff's motion adapter, which makes --model an image pipeline's."""
    prompt: Annotated[str | None, option("TEXT")] = None
    """The video in a sentence."""
    negative_prompt: Annotated[str | None, option("TEXT")] = None
    """What it should not be."""
    image: Annotated[Path | None, option("FILE")] = None
    """The image to animate, for I2VGen-XL."""
    frames: Annotated[int, parsed(integer(1, MAX_FRAMES), "N")] = 16
    """How many frames. Full-3D transformers make certain numbers: 17, 25, 49 or 97 fits each of
    them but Mochi, whose are 19, 25, 49 or 97. Of others, the error names those next to it."""
    size: Annotated[
        tuple[int, int] | None,
        parsed(size(MIN_SIZE), "HEIGHTxWIDTH"),
        option(default=f"the model's; {SIDE}x{SIDE} for --method grid"),
    ] = None
    """Of a frame in pixels, multiples of 8."""
    steps: Annotated[int, parsed(integer(1, MAX_STEPS), "N")] = 25
    """Denoising steps."""
    guidance_scale: Annotated[
        float | None, parsed(number, "X"), option(default="the pipeline's")
    ] = None
    """How much the prompt counts, in classifier-free guidance."""
    seed: Annotated[int | None, parsed(integer(0, MAX_SEED), "N"), option(default="drawn")] = None
    """Decides the noise; generation.json says which it was."""
    device: Annotated[str | None, option("NAME", default="a GPU if there is one")] = None
    """Where the model runs."""


@dataclass(frozen=True)
class SynopsisOptions:
    """The stages that the video goes through. Without a source, every frame has --prompt."""

    synopsis: Annotated[Path | Synopsis | None, parsed(Path, "FILE"), option()] = None
    """JSON with prompt and stages, or a list of those from which --prompt chooses; or the saved
    answer of a language model, with stages alone."""
    writer: Annotated[str | None, option("NAME", default="$OPENAI_MODEL")] = None
    """A language model behind an OpenAI-compatible interface; the key is $OPENAI_API_KEY."""
    writer_url: Annotated[str | None, option("URL", default="$OPENAI_BASE_URL")] = None
    """Address of the interface."""
    writer_local: Annotated[str | None, option("ID_OR_PATH")] = None
    """A chat model of transformers, run here."""
    stages: Annotated[
        int | None,
        parsed(integer(LEAST_STAGES, MOST_STAGES), "N"),
        option(default="the writer's choice"),
    ] = None
    """How many stages the writer is asked for."""
    refresh: bool = False
    """Ask the writer even for what is in its cache."""
    mode: Interpolation = "linear"
    """How the prompt changes between stages."""
    rounding: Rounding = "down"
    """How evenly spaced stages are put on frames: down, as in the official code, or nearest."""

    @property
    def has_endpoint(self) -> bool:
        """Whether a language model at a server writes the synopsis."""
        return self.writer is not None or self.writer_url is not None

    @property
    def has_writer(self) -> bool:
        """Whether a language model writes it, at a server or here."""
        return self.has_endpoint or self.writer_local is not None

    def make_writer(self, kind: type[AnyWriter]) -> AnyWriter | None:
        """Returns a writer of a kind, None where no language model is named.

        Raises:
            CommandError: It cannot be made.
        """
        option = "--writer"
        try:
            if self.has_endpoint:
                return kind.from_endpoint(self.writer, base_url=self.writer_url)
            if self.writer_local is not None:
                option = "--writer-local"
                return kind(_local_model(self.writer_local))
        except (ImportError, ValueError) as error:
            raise CommandError(f"{option}: {error}") from error
        return None


@functools.lru_cache(maxsize=1)
def _local_model(name: str) -> ChatModel:
    """Returns a language model that is run here, and is loaded once for many videos."""
    return ChatModel(name)


@dataclass(frozen=True)
class GridOptions:
    """A grid of frames in one image: --method grid."""

    embedding: Annotated[
        Path | None, option("FILE", default="the paper's mixed embedding, untrained")
    ] = None
    """A trained embedding that GridEmbedding.save wrote."""
    rows: Annotated[int | None, parsed(integer(1), "N"), option(default="the most square grid")] = (
        None
    )
    """Rows of the grid; they divide --frames."""
    decode: Decode = "frames"
    """Decode the latents frame by frame, or the grid at once."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written."""

    output: Annotated[Path, parsed(folder, "FOLDER")]
    """A new folder, or an empty one; of many videos any one."""
    overwrite: bool = False
    """Replace the files of an earlier run in --output."""
    fps: Annotated[int, parsed(integer(1, MAX_FPS), "N")] = 8
    """Frames per second of the video, and what a grid's trained embedding is told."""
    map_steps: Annotated[
        tuple[int, ...] | None,
        several(integer(0), "STEP"),
        one_choice_of_maps,
        option(default="the first, the middle, the last"),
    ] = None
    """Steps whose attention maps are shown."""
    no_maps: Annotated[bool, one_choice_of_maps] = False
    """Show no attention maps."""
    keep_frames: bool = False
    """Keep the frames without loss, too, as an array in frames.npz."""


@dataclass(frozen=True)
class GenerateOptions:
    """What one video is made of, and with what."""

    video: VideoOptions
    synopsis: SynopsisOptions
    regularization: RegularizationOptions
    grid: GridOptions
    plan: PlanOptions
    output: OutputOptions

    def __post_init__(self) -> None:
        """Raises CommandError for what can be found wrong without loading anything."""
        check_model(self.video.model)
        try:
            if self.video.prompt is not None:
                check_text("--prompt", self.video.prompt)
            if self.video.negative_prompt:
                check_text("--negative-prompt", self.video.negative_prompt)
        except ValueError as error:
            raise CommandError(str(error)) from None
        self._check_method()
        self._check_sources()
        steps = self.video.steps
        late = [step for step in self.output.map_steps or () if step >= steps]
        if late:
            raise CommandError(f"--map-steps must be below --steps, {steps}, got {late[0]}")

    def check_complete(self) -> None:
        """Raises CommandError unless they say what the video is of."""
        sources = (self.video.prompt, self.synopsis.synopsis, self.plan.plan)
        if all(source is None for source in sources):
            raise CommandError(f"{TEXTS[self.video.method]} must be given")
        if self.video.method == "starvid":
            self.plan.check(self)

    def _check_method(self) -> None:
        """Raises for options that are for another method."""
        video, stages, grid, plan = self.video, self.synopsis, self.grid, self.plan
        regularization = self.regularization
        given = {
            ("grid",): {
                "--rows": grid.rows is not None,
                "--embedding": grid.embedding is not None,
                "--decode": grid.decode != "frames",
            },
            ("vstar",): {
                "--synopsis": stages.synopsis is not None,
                "--stages": stages.stages is not None,
                "--mode": stages.mode != "linear",
                "--rounding": stages.rounding != "down",
                "--extend-positions": regularization.extend_positions,
            },
            ("vstar", "starvid"): {
                "--adapter": video.adapter is not None,
                "--image": video.image is not None,
                "--writer": stages.has_writer,
            },
            ("starvid",): {
                "--plan": plan.plan is not None,
                "--guidance": plan.guidance is not None,
                "--key-frames": plan.key_frames is not None,
            },
        }
        for methods, options in given.items():
            for name, is_given in options.items():
                if is_given and video.method not in methods:
                    why = ": a grid of frames is one image with one text"
                    raise CommandError(
                        f"{name} is for --method {' and '.join(methods)}, not for {video.method}"
                        + (why if name in OF_STAGES and video.method == "grid" else "")
                    )

    def _check_sources(self) -> None:
        options = self.synopsis
        sources = {
            "--synopsis": options.synopsis is not None,
            "--writer and --writer-url": options.has_endpoint,
            "--writer-local": options.writer_local is not None,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1:
            raise CommandError(f"{' and '.join(given)} are two sources of one synopsis: give one")
        for_writers = {"--stages": options.stages is not None, "--refresh": options.refresh}
        for name, is_given in for_writers.items():
            if is_given and not options.has_writer:
                raise CommandError(f"{name} is for a writer: give --writer or --writer-local")

    @property
    def captured_steps(self) -> list[int]:
        """At which steps maps are captured: by default the first, the middle and the last."""
        if self.output.no_maps:
            return []
        if self.output.map_steps is not None:
            return sorted(set(self.output.map_steps))
        steps = self.video.steps
        return sorted({0, steps // 2, steps - 1})

    @property
    def settings(self) -> dict[str, Any]:
        """The pipeline's own arguments, those that were given."""
        video = self.video
        height, width = video.size or (None, None)
        settings = {
            "num_inference_steps": video.steps,
            "height": height,
            "width": width,
            "guidance_scale": video.guidance_scale,
            "negative_prompt": video.negative_prompt,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def arguments(self, on_step: OnStep) -> dict[str, Any]:
        """Returns what the call of any method takes alike, the pipeline's own arguments too."""
        return {
            "seed": self.video.seed,
            "maps": self.captured_steps or False,
            "on_step": on_step,
            **self.settings,
        }
