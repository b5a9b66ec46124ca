"""The command line of ``generate``. Nothing here is slow to import."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from vstar_kernels.cli.options import MAX_STEPS, CommandError, check_model, integer, number, size
from vstar_kernels.methods.vstar.embeddings import MODES, Interpolation
from vstar_kernels.methods.vstar.writer import LEAST_STAGES, MOST_STAGES

MIN_SIZE = 8  # pixels
MAX_SEED = 2**32 - 1
MAX_FPS = 120


@dataclass(frozen=True)
class Options:
    """What the user asked for; None is the pipeline's or the method's own choice.

    ``writer`` is the name of a language model at the server ``writer_url``, ``writer_local`` one to
    be run here; ``size`` is height and width in pixels.
    """

    model: str
    adapter: str | None
    prompt: str | None
    negative_prompt: str | None
    image: Path | None
    synopsis: Path | None
    writer: str | None
    writer_url: str | None
    writer_local: str | None
    stages: int | None
    refresh: bool
    mode: Interpolation
    preset: str | None
    config: Path | None
    extend_positions: bool
    frames: int
    size: tuple[int, int] | None
    steps: int
    guidance_scale: float | None
    seed: int | None
    device: str | None
    map_steps: list[int] | None
    no_maps: bool
    fps: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        """Whatever can be found wrong without loading anything.

        Raises:
            CommandError: It cannot work.
        """
        check_model(self.model)
        if self.prompt is None and self.synopsis is None:
            raise CommandError("--prompt or --synopsis must be given")
        sources = {
            "--synopsis": self.synopsis is not None,
            "--writer and --writer-url": self.has_endpoint,
            "--writer-local": self.writer_local is not None,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1:
            raise CommandError(f"{' and '.join(given)} are two sources of one synopsis: give one")
        for name, value in (("--stages", self.stages), ("--refresh", self.refresh or None)):
            if value is not None and not (self.has_endpoint or self.writer_local):
                raise CommandError(f"{name} is for a writer: give --writer or --writer-local")
        late = [step for step in self.map_steps or () if step >= self.steps]
        if late:
            raise CommandError(f"--map-steps must be below --steps, {self.steps}, got {late[0]}")
        self._check_output()

    @property
    def has_endpoint(self) -> bool:
        """Whether a language model at a server writes the synopsis."""
        return self.writer is not None or self.writer_url is not None

    @property
    def captured_steps(self) -> list[int]:
        """At which steps the maps are captured: by default the first, the middle and the last."""
        if self.no_maps:
            return []
        if self.map_steps is not None:
            return sorted(set(self.map_steps))
        return sorted({0, self.steps // 2, self.steps - 1})

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise CommandError(f"--output must be a folder, {self.output} is a file")
        if any(self.output.iterdir()) and not self.overwrite:
            raise CommandError(
                f"--output: {self.output} is not empty: choose another folder, or give --overwrite"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; :func:`from_arguments` reads them."""
    _add_video(parser.add_argument_group("the video"))
    _add_synopsis(parser.add_argument_group("its synopsis (without one, every frame has --prompt)"))
    _add_regularization(parser.add_argument_group("temporal attention regularization"))
    _add_output(parser.add_argument_group("what is written"))


def _add_video(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_PATH",
        help="a saved pipeline, or one on the Hugging Face hub: TextToVideoSDPipeline, "
        "AnimateDiffPipeline, I2VGenXLPipeline or LattePipeline",
    )
    group.add_argument(
        "--adapter",
        metavar="ID_OR_PATH",
        help="AnimateDiff's motion adapter, which makes --model an image pipeline's",
    )
    group.add_argument("--prompt", help="the video in a sentence")
    group.add_argument("--negative-prompt", help="what it should not be")
    group.add_argument("--image", type=Path, metavar="FILE", help="to animate, for I2VGen-XL")
    group.add_argument("--frames", type=integer(1), default=16, help="default: %(default)s")
    group.add_argument(
        "--size", type=size(MIN_SIZE), metavar="HEIGHTxWIDTH", help="in pixels (default: model's)"
    )
    group.add_argument(
        "--steps", type=integer(1, MAX_STEPS), default=25, help="denoising steps (default: 25)"
    )
    group.add_argument("--guidance-scale", type=number, help="default: the pipeline's")
    group.add_argument(
        "--seed", type=integer(0, MAX_SEED), help="default: drawn, see generation.json"
    )
    group.add_argument("--device", help="default: a GPU if there is one")


def _add_synopsis(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--synopsis",
        type=Path,
        metavar="FILE",
        help="JSON with prompt and stages, or a list of those from which --prompt chooses; or the "
        "answer of a language model, as text",
    )
    group.add_argument(
        "--writer",
        metavar="NAME",
        help="a language model behind an OpenAI-compatible interface (default: $OPENAI_MODEL); "
        "the key is $OPENAI_API_KEY",
    )
    group.add_argument(
        "--writer-url", metavar="URL", help="of the interface (default: $OPENAI_BASE_URL)"
    )
    group.add_argument(
        "--writer-local", metavar="ID_OR_PATH", help="a chat model of transformers, run here"
    )
    group.add_argument(
        "--stages",
        type=integer(LEAST_STAGES, MOST_STAGES),
        help="how many (default: the writer's choice)",
    )
    group.add_argument(
        "--refresh", action="store_true", help="ask the writer even for what is in its cache"
    )
    group.add_argument(
        "--mode",
        choices=MODES,
        default="linear",
        help="between stages (default: %(default)s)",
    )


def _add_regularization(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--preset",
        help="such as 64D1_32D8: sigma 1 at width 64 and 8 at width 32, in steps 0 to 13 (default: "
        "sigma 1 at the finest level in the first 56 %% of the steps)",
    )
    choice.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON that TARConfig.save wrote"
    )
    group.add_argument(
        "--extend-positions",
        action="store_true",
        help="for more frames than AnimateDiff or Latte have positions for",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new or an empty one"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier run in --output"
    )
    group.add_argument("--fps", type=integer(1, MAX_FPS), default=8, help="default: %(default)s")
    maps = group.add_mutually_exclusive_group()
    maps.add_argument(
        "--map-steps",
        type=integer(0),
        nargs="+",
        metavar="STEP",
        help="steps whose attention maps are shown (default: the first, the middle, the last)",
    )
    maps.add_argument("--no-maps", action="store_true", help="no attention maps")


def from_arguments(args: argparse.Namespace) -> Options:
    """The options of a parsed command line.

    Raises:
        CommandError: They cannot work.
    """
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
