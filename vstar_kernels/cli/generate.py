"""``vstar-kernels generate``: a video from a prompt by a whole method, in a folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import create_mutex_group

from vstar_kernels.analysis.maps import mean_maps
from vstar_kernels.analysis.plots import plot_maps
from vstar_kernels.cli.info import info
from vstar_kernels.cli.options import (
    MAX_STEPS,
    SHOWN,
    CommandError,
    check_device,
    check_model,
    check_output,
    check_packages,
    folder,
    integer,
    number,
    option,
    output_folder,
    parsed,
    several,
    size,
    write_results,
)
from vstar_kernels.cli.starvid import FILES as PLAN_FILES
from vstar_kernels.cli.starvid import PlanOptions, record_of, starvid, writers_of
from vstar_kernels.files import write_atomically
from vstar_kernels.methods.arguments import check_text
from vstar_kernels.methods.grid.video import SIDE, Decode, GridVideo
from vstar_kernels.methods.starvid.starvid import GuidedVideo
from vstar_kernels.methods.starvid.writer import PlanError
from vstar_kernels.methods.vstar.embeddings import Interpolation, Rounding
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.vstar import PAPER, VSTAR, Generation
from vstar_kernels.methods.vstar.writer import (
    LEAST_STAGES,
    MOST_STAGES,
    SynopsisError,
    SynopsisWriter,
)
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.models.grid.embedding import GridEmbedding
from vstar_kernels.reading import decode, read_bytes, read_text, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = ("diffusers", "transformers", "av", "jinja2", "matplotlib", "PIL", "pydantic")
FILES = ("video.mp4", "video.gif", "maps.png", "generation.json", "synopsis.json", "config.json")
# What says what a method's video is of.
TEXTS = {"vstar": "--prompt or --synopsis", "grid": "--prompt", "starvid": "--prompt or --plan"}
OF_STAGES = ("--synopsis", "--writer", "--stages", "--mode", "--rounding")
MIN_SIZE = 8  # pixels
MAX_SEED = 2**32 - 1
MAX_FPS = 120
MAX_FRAMES = 10_000
MAPS_DPI = 120
ONLY_FRAME_TAR = ("layers", "heads")  # fields, which FrameTAR.save always writes
CONSTANT_RATE_FACTOR = "18"  # x264's: hardly to be told from the original

one_config = create_mutex_group(required=False, title="temporal attention regularization: one of")
one_choice_of_maps = create_mutex_group(required=False, title="attention maps: one of")


@dataclass(frozen=True)
class VideoOptions:
    """What is made, and with which model."""

    model: Annotated[str, option("ID_OR_PATH")]
    """A saved pipeline, or one on the Hugging Face hub: TextToVideoSDPipeline, AnimateDiffPipeline,
    I2VGenXLPipeline or LattePipeline; of full-3D transformers WanPipeline, SkyReelsV2Pipeline,
    LTXPipeline, AllegroPipeline, CosmosTextToWorldPipeline, CogVideoXPipeline, HunyuanVideoPipeline
    or MochiPipeline; for --method grid StableDiffusionPipeline or StableDiffusionXLPipeline."""
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

    synopsis: Annotated[Path | None, option("FILE")] = None
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


@dataclass(frozen=True)
class RegularizationOptions:
    """Temporal attention regularization (TAR)."""

    preset: Annotated[
        str | None,
        one_config,
        option(
            "NAME",
            default="sigma 1 at the finest level in the first 56 percent of the steps; none for "
            "--method grid",
        ),
    ] = None
    """Such as 64D1_32D8: sigma 1 at width 64 and 8 at width 32, in steps 0 to 13. Full-3D
    transformers have none; their default is sigma 1 in the first 30 percent."""
    config: Annotated[Path | None, one_config, option("FILE")] = None
    """JSON that TARConfig.save wrote, or for a full-3D transformer FrameTAR.save."""
    no_tar: Annotated[bool, one_config] = False
    """Sample without it: the baseline, or with stages synopsis prompting alone."""
    extend_positions: bool = False
    """Allow more frames than AnimateDiff or Latte have positions for."""


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
    """A new folder, or an empty one."""
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


@dataclass(frozen=True)
class GenerateOptions:
    """A video from a prompt, with a whole method."""

    video: VideoOptions
    synopsis: SynopsisOptions
    regularization: RegularizationOptions
    grid: GridOptions
    plan: PlanOptions
    output: OutputOptions

    def __post_init__(self) -> None:
        """Raises CommandError for what can be found wrong without loading anything."""
        check_model(self.video.model)
        files = (self.synopsis.synopsis, self.plan.plan)
        if self.video.prompt is None and files == (None, None):
            raise CommandError(f"{TEXTS[self.video.method]} must be given")
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
        check_output(self.output.output, overwrite=self.output.overwrite)

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
                "--writer": stages.has_endpoint or stages.writer_local is not None,
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
        if video.method == "starvid":
            plan.check(self)

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
            if is_given and not (options.has_endpoint or options.writer_local):
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

    def run(self) -> int:
        """Makes the video and writes its folder; returns the exit status 0.

        Raises:
            CommandError: It could not be done; nothing was written.
        """
        check_packages(PACKAGES, extra="generate")
        device = self.video.device or _best_device()
        check_device(device)
        make = METHODS[self.video.method](self)
        output = self.output.output
        names = (*FILES, *PLAN_FILES)  # what another method wrote must not be left there
        with output_folder(output, names, overwrite=self.output.overwrite) as scratch:
            pipe = _load(self.video, device)
            with _errors_of_the_call():
                generation = make(pipe)
            record = _record(self, type(pipe).__name__, generation, device)
            write_results(scratch, _writers(generation, record, self.output.fps))
        for line in _told(generation):
            print(line)
        print(f"video: {shorten(str(output / 'video.mp4'), SHOWN)}")
        return 0


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _vstar(options: GenerateOptions) -> Callable[[Any], Generation]:
    """Returns what makes the video from a pipeline by VSTAR, all files read."""
    config, writer = _config(options.regularization, PAPER), _writer(options.synopsis)
    prompt, image = _prompt(options), _image(options.video.image)

    def make(pipe: Any) -> Generation:
        vstar = VSTAR(
            pipe,
            config,
            writer=writer,
            mode=options.synopsis.mode,
            rounding=options.synopsis.rounding,
            extend_positions=options.regularization.extend_positions,
        )
        return vstar(
            prompt,
            num_frames=options.video.frames,
            seed=options.video.seed,
            num_stages=options.synopsis.stages,
            refresh=options.synopsis.refresh,
            maps=options.captured_steps or False,
            **options.settings,
            **image,
        )

    return make


def _grid(options: GenerateOptions) -> Callable[[Any], Generation]:
    """Returns what makes the video from a pipeline as a grid of frames, all files read."""
    config, grid = _config(options.regularization, None), options.grid
    if isinstance(config, FrameTAR):
        raise CommandError("--config: FrameTAR is for full-3D transformers, a grid has TARConfig")
    embedding: bool | GridEmbedding = True
    if grid.embedding is not None:
        try:
            embedding = GridEmbedding.load(grid.embedding)
        except (OSError, ValueError) as error:
            raise CommandError(f"--embedding: {error}") from error

    def make(pipe: Any) -> Generation:
        video = GridVideo(pipe, config, embedding=embedding, rows=grid.rows, decode=grid.decode)
        return video(
            _prompt(options),
            frames=options.video.frames,
            fps=options.output.fps,
            seed=options.video.seed,
            maps=options.captured_steps or False,
            **options.settings,
        )

    return make


def _starvid(options: GenerateOptions) -> Callable[[Any], GuidedVideo]:
    """Returns what makes the video from a pipeline by StarVid, all files read."""
    tar, image = _config(options.regularization, None), _image(options.video.image)
    if isinstance(tar, FrameTAR):
        raise CommandError("--config: FrameTAR is for full-3D transformers, StarVid has TARConfig")
    return starvid(options, tar, image)


METHODS: dict[str, Callable[[GenerateOptions], Callable[[Any], Generation | GuidedVideo]]]
METHODS = {"vstar": _vstar, "grid": _grid, "starvid": _starvid}


def _told(generation: Generation | GuidedVideo) -> list[str]:
    """Returns what is said of a finished video."""
    if isinstance(generation, GuidedVideo):
        updates = sum(update.applied for update in generation.updates)
        return [f"seed {generation.seed}, {updates} updates of the latents"]
    stages = enumerate(generation.synopsis.stages, start=1)
    tar = f"TAR on {len(generation.layers)} layers" if generation.config else "no TAR"
    told = [f"stage {index}: {shorten(stage, SHOWN)}" for index, stage in stages]
    return [*told, f"seed {generation.seed}, {tar}"]


def _config(
    options: RegularizationOptions, default: TARConfig | None
) -> TARConfig | FrameTAR | None:
    """Returns the configuration; PAPER, where none is given, is full-3D transformers' own too."""
    if options.no_tar:
        return None
    option = "--preset" if options.preset is not None else "--config"
    try:
        if options.preset is not None:
            return TARConfig.preset(options.preset)
        return default if options.config is None else _load_config(options.config)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{option}: {error}") from error


def _load_config(path: Path) -> TARConfig | FrameTAR:
    """Returns the configuration of a file, of the kind that its fields are of."""
    fields = decode(read_text(path))
    if isinstance(fields, dict) and not fields.keys().isdisjoint(ONLY_FRAME_TAR):
        return FrameTAR.load(path)
    return TARConfig.load(path)


def _writer(options: SynopsisOptions) -> SynopsisWriter | None:
    option = "--writer"
    try:
        if options.has_endpoint:
            return SynopsisWriter.from_endpoint(options.writer, base_url=options.writer_url)
        if options.writer_local is not None:
            option = "--writer-local"
            return SynopsisWriter.from_transformers(options.writer_local)
    except (ImportError, ValueError) as error:
        raise CommandError(f"{option}: {error}") from error
    return None


def _prompt(options: GenerateOptions) -> str | Synopsis:
    """Returns the prompt, or the synopsis that is in a file."""
    prompt, path = options.video.prompt, options.synopsis.synopsis
    if path is None:
        assert prompt is not None
        return prompt
    try:
        if prompt is None:
            return Synopsis.load(path)
        writer = SynopsisWriter.from_file(path, least_stages=1, most_stages=10_000)
        return writer.write(prompt)
    except (OSError, ValueError, SynopsisError) as error:
        hint = "" if prompt else " (several synopses, and saved answers, need --prompt)"
        raise CommandError(f"--synopsis: {error}{hint}") from error


def _image(path: Path | None) -> dict[str, Any]:
    """Returns the image to animate as an argument, if there is one."""
    if path is None:
        return {}
    from PIL import Image

    try:
        return {"image": Image.open(io.BytesIO(read_bytes(path))).convert("RGB")}
    # Of a picture that would be larger than memory, or is not what its header says.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"--image: {path}: {error}") from error


def _load(options: VideoOptions, device: str) -> Any:
    """Returns the pipeline, in half precision unless on the CPU."""
    import diffusers
    import torch

    more: dict[str, Any] = {} if device == "cpu" else {"torch_dtype": torch.float16}
    name, wanted = "--model", options.model
    try:
        if options.adapter is None:
            return diffusers.DiffusionPipeline.from_pretrained(wanted, **more).to(device)
        name, wanted = "--adapter", options.adapter
        more["motion_adapter"] = diffusers.MotionAdapter.from_pretrained(wanted, **more)
        name, wanted = "--model", options.model
        return diffusers.AnimateDiffPipeline.from_pretrained(wanted, **more).to(device)
    # diffusers raises whatever its parts raise: of the network, of a file, of a wrong class.
    except Exception as error:
        reason = shorten(str(error)) or type(error).__name__
        raise CommandError(f"{name}: cannot load {wanted}: {reason}") from error


@contextmanager
def _errors_of_the_call() -> Iterator[None]:
    """Turns what is wrong with the arguments, the model or the writer into one line."""
    import torch

    wrong = (TypeError, ValueError, FloatingPointError, SynopsisError, PlanError)
    try:
        yield
    except (*wrong, torch.OutOfMemoryError) as error:
        raise CommandError(str(error)) from error


def _record(
    options: GenerateOptions, pipeline: str, generation: Generation | GuidedVideo, device: str
) -> dict[str, Any]:
    """Returns what it takes to make the video again."""
    video = options.video
    common = {
        "method": video.method,
        "model": video.model,
        "adapter": video.adapter,
        "pipeline": pipeline,
        "device": device,
        "frames": video.frames,
        "fps": options.output.fps,
        "seed": generation.seed,
        "image": None if video.image is None else str(video.image),
        "settings": options.settings,
        "versions": info(),
    }
    if isinstance(generation, GuidedVideo):
        return common | record_of(generation)
    config = generation.config
    more: dict[str, Any] = {}
    if video.method == "grid":
        path, grid = options.grid.embedding, options.grid
        more["grid"] = {
            "embedding": None if path is None else str(path),
            "rows": grid.rows,
            "decode": grid.decode,
        }
    else:
        more |= {"mode": options.synopsis.mode, "rounding": options.synopsis.rounding}
    return common | {
        "synopsis": json.loads(generation.synopsis.to_json()),
        "config": None if config is None else json.loads(config.to_json()),
        "extend_positions": options.regularization.extend_positions,
        "layers": len(generation.layers),
        **more,
    }


def _writers(
    generation: Generation | GuidedVideo, record: dict[str, Any], fps: int
) -> dict[str, Callable[[Path], object]]:
    """Returns what writes each of the files."""
    from diffusers.utils.export_utils import export_to_gif

    frames = generation.frames
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "video.mp4": lambda path: write_mp4(path, frames, fps),
        "video.gif": lambda path: export_to_gif(list(frames), str(path), fps),
        "generation.json": lambda path: write_atomically(path, text),
    }
    if isinstance(generation, GuidedVideo):
        return writers | writers_of(generation, record)
    writers["synopsis.json"] = generation.synopsis.save
    if (config := generation.config) is not None:
        writers["config.json"] = config.save
    if (maps := generation.maps) is not None:
        writers["maps.png"] = lambda path: plot_maps(mean_maps(maps, by=("level", "step"))).savefig(
            path, dpi=MAPS_DPI
        )
    return writers


def write_mp4(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Writes an H.264 video of the frames' own size, which diffusers' writer may change."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(
            "libx264", rate=fps, options={"crf": CONSTANT_RATE_FACTOR}
        )
        stream.width, stream.height = frames[0].size
        # What every player shows has half as many colours as pixels on either side.
        halves = stream.width % 2 == stream.height % 2 == 0
        stream.pix_fmt = "yuv420p" if halves else "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
