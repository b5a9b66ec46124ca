"""``vstar-kernels generate`` from its command line to its folder, on tiny pipelines."""

import json
import os
import re
import signal
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.cli.generate import regularization
from vstar_kernels.cli.generate.regularization import (
    ConfigText,
    Regularization,
    RegularizationOptions,
)
from vstar_kernels.cli.generate.results import write_mp4
from vstar_kernels.cli.generate.video import errors_of_the_call, load_pipeline
from vstar_kernels.cli.main import main
from vstar_kernels.cli.options import CommandError, check_packages

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("openai")
pytest.importorskip("transformers")
import av
import diffusers
from diffusers import MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from examples import tiny, tiny_transformers
from tests.methods.chat_server import ChatServer, fails, tells

pytestmark = [
    pytest.mark.usefixtures("one_thread", "wide_terminal"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PROMPT = "a kite rises over a beach"
SYNOPSIS = vk.Synopsis(PROMPT, ["a kite on the sand", "a kite low", "a kite high"])
FULL3D = ("--prompt", PROMPT, "--size", "32x32", "--seed", 1)
ALL = {"video.mp4", "video.gif", "maps.png", "generation.json", "synopsis.json", "config.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of saved pipelines, made when they are asked for."""
    folder = tmp_path_factory.mktemp("models")

    def find(name):
        if not (folder / name).exists():
            make = getattr(tiny, name, None) or getattr(tiny_transformers, name)
            make().save_pretrained(folder / name)
        return str(folder / name)

    return find


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def generate(models, output, capsys):
    """Run the command with a small video; its exit status and what it printed."""

    def run(*arguments, model="text_to_video", frames=3, steps=2):
        given = ["--model", models(model), "--output", output, "--frames", frames, "--steps", steps]
        status = main(["generate", *map(str, given), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def decode(path):
    """How many frames a video has, and their size and mean."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
        (stream,) = container.streams
        return frames, stream.average_rate


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_nothing_written(output):
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if output.name in path.name]


def test_everything(generate, output, tmp_path):
    SYNOPSIS.save(tmp_path / "synopsis.json")
    options = [
        "--synopsis",
        tmp_path / "synopsis.json",
        "--seed",
        7,
        "--size",
        "32x48",
        "--fps",
        12,
    ]
    status, printed = generate(*options, "--preset", "24D1_12D8", frames=6, steps=3)
    assert status == 0, printed
    assert names(output) == ALL
    assert "stage 3: a kite high" in printed
    assert f"video: {output / 'video.mp4'}" in printed

    frames, rate = decode(output / "video.mp4")
    assert [frame.size for frame in frames] == [(48, 32)] * 6
    assert rate == 12
    with Image.open(output / "video.gif") as gif:
        assert (gif.n_frames, gif.size) == (6, (48, 32))
        first = torch.tensor(list(gif.convert("RGB").resize((6, 4)).tobytes())).float()
    decoded = torch.tensor(list(frames[0].resize((6, 4)).tobytes())).float()
    assert (first - decoded).abs().mean() < 16  # the same picture in both, of 256 values
    with Image.open(output / "maps.png") as figure:
        assert min(figure.size) > 300
        assert len(figure.convert("RGB").getcolors(10**6)) > 50

    record = json.loads((output / "generation.json").read_text())
    assert record["synopsis"] == json.loads(SYNOPSIS.to_json())
    assert record["config"]["by_width"] == {"24": 1.0, "12": 8.0}
    assert record["settings"] == {"num_inference_steps": 3, "height": 32, "width": 48}
    assert (record["seed"], record["frames"], record["fps"]) == (7, 6, 12)
    assert (record["pipeline"], record["layers"]) == ("TextToVideoSDPipeline", 8)
    assert record["versions"]["vstar_kernels"] == vk.__version__
    assert record["versions"]["torch"] == str(torch.__version__)

    # Its own files make it again.
    first_video = (output / "video.gif").read_bytes()
    parts = ["--synopsis", output / "synopsis.json", "--config", output / "config.json"]
    again = [*parts, "--seed", record["seed"], "--size", "32x48", "--fps", 12, "--overwrite"]
    assert generate(*again, frames=6, steps=3)[0] == 0
    assert (output / "video.gif").read_bytes() == first_video
    assert generate(*again, "--mode", "hold", frames=6, steps=3)[0] == 0
    assert (output / "video.gif").read_bytes() != first_video


def test_without_regularization(generate, output):
    status, printed = generate("--prompt", PROMPT, "--no-tar", "--seed", 7, "--no-maps")
    assert status == 0, printed
    assert "seed 7, no TAR" in printed
    assert names(output) == ALL - {"maps.png", "config.json"}
    record = json.loads((output / "generation.json").read_text())
    assert (record["config"], record["layers"]) == (None, 0)
    with pytest.raises(SystemExit) as exit_:  # tyro's own
        generate("--prompt", PROMPT, "--no-tar", "--preset", "8D1")
    assert exit_.value.code == 2


def test_a_language_model_writes_the_synopsis(generate, output, monkeypatch, tmp_path):
    key = "sk-test-987654321"
    monkeypatch.setenv("VSTAR_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with ChatServer(tells("a kite on sand", "a kite in the sky")) as server:
        options = ["--prompt", PROMPT, "--writer", "tiny-chat", "--writer-url", server.url]
        status, printed = generate(*options, "--stages", 2)
        assert status == 0, printed
        assert "stage 2: a kite in the sky" in printed
        assert generate(*options, "--stages", 2, "--overwrite")[0] == 0
        assert len(server.requests) == 1  # the second time from the cache
        assert generate(*options, "--stages", 2, "--overwrite", "--refresh")[0] == 0
        assert len(server.requests) == 2
        assert server.headers[0]["authorization"] == f"Bearer {key}"
    written = [path for folder in (output, tmp_path / "cache") for path in folder.iterdir()]
    assert not any(key.encode() in path.read_bytes() for path in written)
    assert key not in printed


def test_a_language_model_that_fails(generate, output, monkeypatch, tmp_path):
    monkeypatch.setenv("VSTAR_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-987654321")
    with ChatServer(fails(404, "no such model")) as server:
        options = ["--prompt", PROMPT, "--writer", "nobody", "--writer-url", server.url]
        status, printed = generate(*options)
    assert status == 2
    assert "generate: error: no synopsis of 'a kite rises over a beach' from nobody at" in printed
    assert "HTTP status 404: " in printed
    assert "no such model" in printed
    assert_nothing_written(output)


def test_animatediff_beyond_its_positions(generate, output):
    options = ["--prompt", PROMPT, "--no-maps", "--negative-prompt", "blur"]
    status, printed = generate(*options, model="animatediff", frames=34, steps=1)
    assert status == 2
    assert "extend_positions" in printed
    assert_nothing_written(output)
    status, printed = generate(
        *options, "--extend-positions", model="animatediff", frames=34, steps=1
    )
    assert status == 0, printed
    assert names(output) == ALL - {"maps.png"}
    assert len(decode(output / "video.mp4")[0]) == 34
    assert json.loads((output / "generation.json").read_text())["settings"]["negative_prompt"]


def test_a_motion_adapter(generate, output, tmp_path):
    parts = {n: p for n, p in tiny.text_to_video().components.items() if n != "unet"}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny._unet("CrossAttnDownBlock2D", "DownBlock2D"))
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(unet=unet, **parts, **extra).save_pretrained(tmp_path / "image")
    MotionAdapter(
        block_out_channels=tiny.WIDTHS, motion_layers_per_block=1, motion_num_attention_heads=2
    ).save_pretrained(tmp_path / "adapter")
    model = ["--model", tmp_path / "image", "--prompt", PROMPT, "--guidance-scale", 3]
    status, printed = generate(*model)
    assert status == 2
    assert "got StableDiffusionPipeline" in printed
    adapter = ["--adapter", tmp_path / "adapter"]
    status, printed = generate("--prompt", PROMPT, *adapter)  # of a video model
    assert status == 2
    assert "with --adapter it must be an image pipeline, its model is a UNet3D" in printed
    status, printed = generate(*model, *adapter)
    assert status == 0, printed
    record = json.loads((output / "generation.json").read_text())
    assert record["pipeline"] == "AnimateDiffPipeline"
    assert record["settings"]["guidance_scale"] == 3


def test_an_image_to_animate(generate, output, tmp_path):
    options = ["--prompt", PROMPT, "--size", "16x16"]
    status, printed = generate(*options, model="i2vgen_xl")
    assert status == 2
    assert "image must be given" in printed
    Image.linear_gradient("L").save(tmp_path / "image.png")
    image = ["--image", tmp_path / "image.png"]
    status, printed = generate(*options, *image, model="i2vgen_xl")
    assert status == 0, printed
    assert json.loads((output / "generation.json").read_text())["image"] == str(image[1])
    assert decode(output / "video.mp4")[0][0].size == (16, 16)


def test_latte(generate, output):
    options = ["--prompt", PROMPT, "--size", "16x16", "--map-steps", 1]
    status, printed = generate(*options, model="latte", frames=16)
    assert status == 0, printed
    assert len(decode(output / "video.mp4")[0]) == 16


def test_a_grid_of_frames(generate, output, models, tmp_path):
    options = ["--method", "grid", "--prompt", "a kite", "--size", "16x8", "--seed", 3]
    run = {"model": "stable_diffusion", "frames": 6}
    tar = ["--preset", "4D1", "--embedding", tmp_path / "embedding"]
    missing, printed = generate(*options, *tar, **run)
    assert missing == 2
    assert "--embedding: " in printed
    vk.GridEmbedding(fps=vk.FPSEmbedding(32, 4)).save(tmp_path / "embedding")
    status, printed = generate(*options, *tar, "--rows", 2, **run)
    assert status == 0, printed
    assert names(output) == ALL
    frames, _ = decode(output / "video.mp4")
    assert [frame.size for frame in frames] == [(8, 16)] * 6
    record = json.loads((output / "generation.json").read_text())
    assert record["method"] == "grid"
    assert record["grid"] == {
        "embedding": str(tmp_path / "embedding"),
        "rows": 2,
        "decode": "frames",
    }
    assert record["layers"] > 0


def test_other_folders_are_left_alone(generate, output):
    output.mkdir()
    assert generate("--prompt", PROMPT)[0] == 0  # an empty one may be there
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    status, printed = generate("--prompt", PROMPT)
    assert status == 2
    assert f"--output: {output} is not empty: choose another folder, or give --overwrite" in printed
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (output / "notes.txt").write_text("mine")
    assert generate("--prompt", PROMPT, "--overwrite", "--no-maps")[0] == 0
    assert names(output) == ALL - {"maps.png"} | {"notes.txt"}
    assert (output / "video.gif").read_bytes() != before["video.gif"]
    assert names(output.parent) == {output.name}


def full(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ("diffusers.utils.export_utils.export_to_gif", "video.gif"),
        ("vstar_kernels.cli.generate.results.write_mp4", "video.mp4"),
        ("vstar_kernels.cli.generate.results.plot_maps", "maps.png"),
    ],
)
def test_what_has_been_computed_is_kept(generate, output, monkeypatch, broken, lost):
    monkeypatch.setattr(broken, full)
    status, printed = generate("--prompt", PROMPT)
    assert status == 2
    error = printed.splitlines()[-1]
    assert f"--output: {lost}: no space left on device; the results are in " in error
    assert not output.exists()
    kept = Path(error.rpartition(" ")[2])
    assert names(kept) == ALL - {lost}
    assert names(kept.parent) == {kept.name}


def test_what_finds_no_place_is_written_elsewhere(generate, output, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full_there(path, *_):
        if "vstar-kernels-" not in str(path):
            path.write_bytes(b"half")
            full()
        path.write_bytes(b"video")

    monkeypatch.setattr("vstar_kernels.cli.generate.results.write_mp4", full_there)
    status, printed = generate("--prompt", PROMPT)
    assert status == 2
    (elsewhere,) = tmp_path.glob("vstar-kernels-*")
    assert f"no space left on device; video.mp4 is in {elsewhere}; the results" in printed
    assert (elsewhere / "video.mp4").read_bytes() == b"video"
    kept = Path(printed.splitlines()[-1].rpartition(" ")[2])
    assert names(kept) == ALL - {"video.mp4"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/x", "Not a directory|File exists"),
        ("/proc/x", "No such file|not permitted|denied"),
        ("x" * 300, "name too long"),
        ("link", "[Ll]oop|link"),
        ("earlier", "video.mp4 is a folder, not a file of an earlier run"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_loading(
    generate, output, monkeypatch, place, message
):
    folder = output.parent
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "link")
    (folder / "earlier" / "video.mp4").mkdir(parents=True)
    monkeypatch.setattr("vstar_kernels.cli.generate.command.load_pipeline", None)
    status, printed = generate("--prompt", PROMPT, "--output", folder / place, "--overwrite")
    assert status == 2
    assert re.search(f"generate: error: --output: .*({message})", printed)
    assert names(folder) == {"file", "link", "earlier"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize("option", ["--config", "--synopsis", "--image"])
def test_a_pipe_is_not_waited_for(generate, output, monkeypatch, option):
    os.mkfifo(output.parent / "pipe")
    monkeypatch.setattr("vstar_kernels.cli.generate.command.load_pipeline", None)
    status, printed = generate("--prompt", PROMPT, option, output.parent / "pipe")
    assert status == 2
    assert "pipe is not a regular file" in printed.splitlines()[-1]


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="there are no such signals")
def test_a_request_to_end_leaves_nothing(generate, output, monkeypatch):
    def ended(path, *_):
        path.write_bytes(b"half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("vstar_kernels.cli.generate.results.write_mp4", ended)
    with pytest.raises(SystemExit) as exit_:
        generate("--prompt", PROMPT)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert_nothing_written(output)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_nothing(generate, output, monkeypatch, overwrite):
    if overwrite:
        output.mkdir()
        (output / "video.mp4").write_bytes(b"earlier")

    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vstar_kernels.cli.generate.results.write_mp4", interrupted)
    status, printed = generate("--prompt", PROMPT, *["--overwrite"] * overwrite)
    assert status == 130
    assert printed.splitlines()[-1] == "vstar-kernels generate: interrupted"
    if not overwrite:
        assert_nothing_written(output)
    else:
        assert names(output.parent) == {output.name}
        assert names(output) == {"video.mp4"}
        assert (output / "video.mp4").read_bytes() == b"earlier"


def test_a_video_of_odd_size(tmp_path):
    frames = [Image.new("RGB", (17, 15), (40 * index, 200, 30)) for index in range(4)]
    write_mp4(tmp_path / "odd.mp4", frames, 8)
    decoded, _ = decode(tmp_path / "odd.mp4")
    assert [frame.size for frame in decoded] == [(17, 15)] * 4
    for index, frame in enumerate(decoded):
        pixel = torch.tensor(frame.getpixel((8, 8)))
        assert (pixel - torch.tensor([40 * index, 200, 30])).abs().max() < 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --synopsis must be given"),
        (["--method", "grid"], "error: --prompt must be given"),
        (
            ["--prompt", "p", "--method", "grid", "--mode", "hold"],
            "--mode is for --method vstar, not for grid: a grid of frames is one image with",
        ),
        (
            ["--prompt", "p", "--method", "grid", "--rounding", "nearest"],
            "--rounding is for --method vstar, not for grid: a grid",
        ),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--prompt", " "], "--prompt must not be empty"),
        (["--prompt", "\udc80"], "--prompt must hold no halves of characters"),
        (["--prompt", "p", "--negative-prompt", "\udc80"], "--negative-prompt must hold no halves"),
        (["--prompt", "p", "--model", "/no\x1b[31mwhere"], "there is no folder /nowhere"),
        (["--prompt", "p", "--stages", "3"], "--stages is for a writer"),
        (["--prompt", "p", "--refresh"], "--refresh is for a writer"),
        (["--prompt", "p", "--synopsis", "f", "--writer", "m"], "--synopsis and --writer"),
        (["--prompt", "p", "--map-steps", "2"], "--map-steps must be below --steps, 2, got 2"),
        (["--prompt", "p", "--preset", "64"], "--preset: a preset must be"),
        (["--prompt", "p", "--config", "/no/where"], "--config /no/where: "),
        (["--prompt", "p", "--image", "/no/where"], "--image: "),
        (
            ["--prompt", "p", "--synopsis", "/no/where"],
            "--synopsis: no synopsis of 'p' from the file /no/where: it cannot",
        ),
        (["--prompt", "p", "--device", "abacus"], "--device abacus: "),
        (["--prompt", "p", "--device", "hpu"], "--device hpu: "),
        (["--prompt", "p", "--device", "meta"], "--device meta: "),
        (["--prompt", "p", "--model", "/no/where"], "--model: there is no folder /no/where"),
        (["--prompt", "p", "--model", "m" * 300], "--model: [Errno 36]"),
        (["--prompt", "p", "--retries", "3"], "--retries is for --prompts"),
        (["--prompt", "p", "--adapter", "/no/where"], "--adapter: cannot load /no/where"),
        (["--prompt", "p", "--writer", "m", "--writer-url", "x"], "--writer: base_url must be"),
        (["--prompt", "p", "--writer-local", "/no/where"], "--writer-local: model /no/where"),
        (["--prompt", "p", "--preset", "999D1"], "999"),
        (["--prompt", "p", "--rows", "2"], "--rows is for --method grid, not for vstar"),
        (
            ["--prompt", "p", "--method", "grid", "--synopsis", "f"],
            "--synopsis is for --method vstar, not for grid: a grid of frames is one image with",
        ),
        (["--prompt", "p", "--method", "grid"], "pipe must be one of diffusers' StableDiffusion"),
        (["--prompt", "p", "--image", sys.executable], f"--image: {sys.executable} is no picture"),
    ],
)
def test_errors_name_the_option(generate, output, monkeypatch, arguments, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-987654321")
    status, printed = generate(*arguments)
    assert status == 2
    (line,) = (line for line in printed.splitlines() if "vstar-kernels generate: error: " in line)
    assert message in line
    assert_nothing_written(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "Error parsing --frames: must be an integer of at least 1, at most "),
        (["--frames", "1" * 5000], "Error parsing --frames: must be an integer of at least 1, at "),
        (["--frames", "10001"], "Error parsing --frames: must be an integer of at least 1, at "),
        (["--output", ""], "Error parsing --output: must be the name of a folder, got ''"),
        (
            ["--stages", "13"],
            "Error parsing --stages: must be an integer of at least 2, at most 12, got '13'",
        ),
        (["--seed", "-1"], "Error parsing --seed: must be an integer of at least 0, at most "),
        (["--seed", "9" * 5000], "Error parsing --seed: must be an integer of at least 0"),
        (["--size", "100x100"], "Error parsing --size: must be HEIGHTxWIDTH in multiples of 8"),
        (
            ["--map-steps", "1", "-1"],
            "Error parsing --map-steps: must be an integer of at least 0, got '-1'",
        ),
        (["--map-steps"], "Error parsing --map-steps: must have at least one value, got none"),
        (
            ["--mode", "cubic"],
            "invalid choice 'cubic' for argument '--mode'. Expected one of ('linear', ",
        ),
        (
            ["--preset", "64D1", "--config", "f"],
            "Arguments --preset and --config are not allowed together",
        ),
        (
            ["--map-steps", "1", "--no-maps"],
            "Arguments --map-steps and --no-maps are not allowed together",
        ),
    ],
)
def test_wrong_options(generate, read_error, output, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        generate("--prompt", "p", *arguments)
    assert exit_.value.code == 2
    assert read_error().startswith(message)
    assert_nothing_written(output)


def test_too_little_memory_is_a_line():
    with pytest.raises(CommandError, match="allocate"), errors_of_the_call():
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="singular"), errors_of_the_call():  # no other fault is
        torch.linalg.inv(torch.zeros(2, 2))


def test_an_interrupted_import_is_no_missing_package(monkeypatch):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "nothing":  # as extensions by pybind11, which matplotlib has
                raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(KeyboardInterrupt):
        check_packages(["nothing"], extra="generate")


def test_a_missing_package_names_the_extra(generate, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    status, printed = generate("--prompt", PROMPT)
    assert status == 2
    assert "pip install 'vstar_kernels[generate]'" in printed
    assert_nothing_written(output)


def test_a_full_3d_transformer(generate, output, tmp_path):
    """Wan with stages: its own default, and a configuration that FrameTAR saved."""
    status, printed = generate(*FULL3D, model="wan", frames=5)
    assert status == 0, printed
    assert names(output) == ALL
    assert "TAR on 2 layers" in printed
    assert vk.FrameTAR.load(output / "config.json") == vk.FrameTAR()
    assert len(decode(output / "video.mp4")[0]) == 5
    config = vk.FrameTAR(0.5, layers=[1])
    config.save(tmp_path / "config")
    status, printed = generate(
        *FULL3D, "--config", tmp_path / "config", "--overwrite", model="wan", frames=5
    )
    assert status == 0, printed
    assert "TAR on 1 layers" in printed
    assert vk.FrameTAR.load(output / "config.json") == config


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (None, ["--sigma", 2, "--strength", 3.5], vk.FrameTAR(2.0, 3.5)),
        (None, ["--tar-steps", 0], vk.FrameTAR(steps=0)),
        ({"sigma": 2}, [], vk.FrameTAR(2.0)),
        ({"sigma": 2, "heads": [0]}, ["--tar-steps", 1.0], vk.FrameTAR(2.0, steps=1.0, heads=[0])),
    ],
)
def test_changes_of_tar_on_a_full_3d_transformer(
    generate, output, tmp_path, config, options, expected
):
    """What says no kind is of the model's."""
    if config is not None:
        (tmp_path / "config").write_text(json.dumps(config))
        options = ["--config", tmp_path / "config", *options]
    status, printed = generate(*FULL3D, "--no-maps", *options, model="wan", frames=5)
    assert status == 0, printed
    assert vk.FrameTAR.load(output / "config.json") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sigma", 2], {"sigma": 2.0, "steps": 0.56}),
        (
            ["--sigma", '{"0": 2, "1": 4}', "--tar-steps", 1],
            {"sigma": {0: 2.0, 1: 4.0}, "steps": 1},
        ),
        (
            ["--preset", "8D1", "--strength", 2],
            {"by_width": {8: 1.0}, "strength": 2.0, "steps": 13},
        ),
        (["--preset", "8D1", "--sigma", 2], {"sigma": 2.0, "by_width": None, "steps": 13}),
    ],
)
def test_changes_of_tar_on_a_unet(generate, output, options, expected):
    status, printed = generate("--prompt", PROMPT, "--size", "16x16", "--no-maps", *options)
    assert status == 0, printed
    config = vk.TARConfig.load(output / "config.json")
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_rule_between_frames(generate, output, tmp_path):
    rule = vk.FrameRule.window(1) + vk.FrameRule.attenuate(0.9, window=1)
    rule.save(tmp_path / "rule")
    given = (*FULL3D, "--no-maps", "--config", tmp_path / "rule")
    status, printed = generate(*given, model="wan", frames=5)
    assert status == 0, printed
    assert "a rule on 2 layers" in printed
    assert (output / "config.json").read_text() == (tmp_path / "rule").read_text()
    status, printed = generate(*given, "--sigma", 1, "--overwrite", model="wan", frames=5)
    assert status == 2
    assert "--sigma: sigma can be changed of TAR alone" in printed
    status, printed = generate("--prompt", PROMPT, "--size", "16x16", "--overwrite", *given[-2:])
    assert status == 2
    assert "/rule is a FrameRule, and a TextToVideoSDPipeline takes a TARConfig" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--sigma", -1],
            "must be a finite number of at least 0, or a JSON object of one for each",
        ),
        (["--sigma", "wide"], "level, got wide"),
        (["--sigma", "{}"], "level, got {}"),
        (["--strength", 1e300], "--strength: "),
        (["--tar-steps", 1.5], "or a share of the steps above 0.0, to 1.0, got 1.5"),
        (["--tar-steps", "half"], "must be the index of a step from 0, or a share of the steps"),
        (
            ["--config", "{folder}/list", "--sigma", 1],
            "/list: it must be a JSON object, got list",
        ),
        (
            ["--config", "{folder}/bias", "--sigma", 1],
            "--sigma: sigma cannot be changed of a configuration that has a bias",
        ),
        (["--tar-steps", "null"], "above 0.0, to 1.0, got null"),
        (["--no-tar", "--strength", 2], "--strength cannot go with --no-tar"),
        (["--config", "{folder}/rule"], "/rule: terms[0]"),
        (["--config", "{folder}/layers"], "/layers: layers"),
        (["--config", "{folder}/sigma"], "/sigma: sigma"),
    ],
)
def test_wrong_changes_of_tar(generate, output, tmp_path, capsys, monkeypatch, options, message):
    """They are found before a model is loaded, and told of the kind that they look like."""
    monkeypatch.setattr("vstar_kernels.cli.generate.command.load_pipeline", None)
    (tmp_path / "list").write_text("[1]")
    vk.TARConfig(bias=vk.ToeplitzBias(torch.tensor([1.0, 0.5, 0.2]))).save(tmp_path / "bias")
    (tmp_path / "rule").write_text('{"terms": [{"term": "window", "reach": -1}]}')
    (tmp_path / "layers").write_text('{"layers": ["first"]}')
    (tmp_path / "sigma").write_text('{"sigma": "wide"}')
    given = [str(x).replace("{folder}", str(tmp_path)) for x in options]
    try:
        status, printed = generate("--prompt", PROMPT, *given, model="text_to_video")
    except SystemExit as ended:
        status, printed = ended.code, capsys.readouterr().err
    assert status == 2
    assert message in " ".join(printed.replace("│", " ").split())
    assert not output.exists()


def test_a_configuration_of_another_kind_is_told_by_its_kind():
    wan, unet = type("WanPipeline", (), {}), type("UNetPipeline", (), {})

    def said(text, pipe, **changes):
        options = RegularizationOptions(config=ConfigText.from_json(text), **changes)
        with (
            mock.patch.object(regularization, "is_full3d", lambda x: isinstance(x, wan)),
            pytest.raises(CommandError) as error,
        ):
            Regularization.read(options).of_model(pipe())
        return str(error.value)

    takes = "and a UNetPipeline takes a TARConfig"
    # A UNet's without its sigma, perhaps: it may have been meant to be one.
    assert said('{"strength": 2}', unet) == (
        f"--config is a FrameTAR, {takes}; as a TARConfig: the configuration regularizes nothing: "
        "give sigma, by_width, bias or override"
    )
    assert said('{"heads": [0]}', unet) == f"--config is a FrameTAR, {takes}"
    rule = vk.FrameRule.window(1).to_json()
    assert said(rule, unet) == f"--config is a FrameRule, {takes}"
    takes = "a WanPipeline takes a FrameTAR or a FrameRule"
    assert said('{"sigma": {"0": 1}}', wan).startswith(
        f"--config is a TARConfig, and {takes}; as a FrameTAR: sigma"
    )
    assert said('{"sigma": 2}', wan, sigma={"0": 1}).startswith(f"--sigma: {takes}, and sigma")


def test_methods_without_tar_have_it_where_an_option_says_so():
    def of_method(**options):
        return Regularization.read(RegularizationOptions(**options)).of_method("a grid")

    assert of_method() is None
    assert of_method(no_tar=True) is None
    assert of_method(sigma=2.0).sigma == 2.0
    assert of_method(preset="8D1") == vk.TARConfig.preset("8D1")
    assert of_method(config=ConfigText('{"sigma": 3}')).sigma == 3
    with pytest.raises(CommandError, match="a grid takes a TARConfig"):
        of_method(config=ConfigText(vk.FrameRule.window(1).to_json()))


def test_what_a_full_3d_transformer_does_not_take(generate, output):
    status, printed = generate(*FULL3D, model="wan", frames=6)
    assert status == 2
    assert "a number of frames that WanPipeline makes, such as 5 or 9, got 6" in printed
    status, printed = generate(*FULL3D, "--preset", "64D1", model="wan", frames=5)
    assert status == 2
    expected = "--preset 64D1 is a TARConfig, and a WanPipeline takes a FrameTAR or a FrameRule"
    assert expected in printed
    status, printed = generate(*FULL3D, "--sigma", '{"0": 1}', model="wan", frames=5)
    assert status == 2
    assert "--sigma: a WanPipeline takes a FrameTAR or a FrameRule, and sigma" in printed
    assert not output.exists()


def test_allegros_decoder_is_told_to_tile(monkeypatch):
    """It decodes in no other way, which would be found after the sampling."""
    vae = diffusers.AutoencoderKLAllegro.__new__(diffusers.AutoencoderKLAllegro)
    torch.nn.Module.__init__(vae)
    vae.use_tiling = False
    pipe = types.SimpleNamespace(vae=vae, to=lambda device: pipe)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda wanted, **options: pipe
    )
    options = types.SimpleNamespace(model="allegro", adapter=None)
    assert load_pipeline(options, "cpu") is pipe
    assert vae.use_tiling
