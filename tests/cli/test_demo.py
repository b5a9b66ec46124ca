import base64
import io
import json
import string
import sys
import time

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.cli.main import main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from diffusers.models.attention_processor import Attention
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples import tiny
from tests.browser import HOSTILE, scripts_run
from vstar_kernels.analysis import band_share
from vstar_kernels.cli import measure
from vstar_kernels.cli.demo import command, denoise, report
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.layers import TemporalLayer

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")
FRAMES = 6
SMALL = ["demo", "--size", "64x64", "--frames", str(FRAMES)]


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def small(one_thread, tmp_path_factory):
    """The folder of one run of the demo."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "output"
    assert main([*SMALL, "--sigma", "1", "2", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a saved text-to-video pipeline, random, with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + ".,"]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    scheduler = DPMSolverMultistepScheduler()
    made = TextToVideoSDPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler)
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def one_step(pipeline):
    """A command line that takes a fraction of a second: one step of the narrow pipeline."""
    return ["demo", "--model", str(pipeline), "--frames", str(FRAMES), "--steps", "1"]


def test_it_agrees_with_eager_tar_and_not_with_stock_attention(small):
    results = read_results(small)
    assert results["agrees"]
    variants = results["variants"]
    assert list(variants) == ["stock", "eager_tar", "vstar_kernels"]
    assert variants["eager_tar"]["difference_from_eager"] == 0
    assert 0 < variants["vstar_kernels"]["difference_from_eager"] < results["tolerance"]
    assert variants["stock"]["difference_from_eager"] > 10 * results["tolerance"]


def test_every_figure_is_there(small):
    results = read_results(small)
    assert results["settings"]["sigma"] == [1.0, 2.0]
    assert results["environment"]["vstar_kernels"] == vk.__version__
    model = results["model"]
    assert (model["frames"], model["latent_height"], model["latent_width"]) == (FRAMES, 8, 8)
    assert (model["attention_layers"], model["regularized_layers"]) == (32, 20)
    for variant in results["variants"].values():
        assert len(variant["steps"]) == model["regularized_steps"] == 2
        assert 0 < variant["core_seconds"] < variant["step_seconds"]
        assert variant["core_seconds"] == pytest.approx(
            sum(variant["core_seconds_by_level"].values())
        )
        assert variant["peak_bytes"] is None or variant["peak_bytes"] > 1e6


def test_the_maps_show_the_band_where_tar_is(small):
    maps = read_results(small)["maps"]
    assert [(level["height"], level["width"]) for level in maps] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert [level["sigma"] for level in maps] == [1.0, 2.0, None, None]
    for level in maps:
        shares = []
        for key in ("without_tar", "with_tar"):
            matrix = torch.tensor(level[key]["map"])
            assert matrix.shape == (FRAMES, FRAMES)
            torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(FRAMES), rtol=0, atol=1e-5)
            assert level[key]["band_share"] == pytest.approx(float(band_share(matrix)), abs=1e-5)
            shares.append(level[key]["band_share"])
        if level["sigma"] is None:
            assert shares[1] == pytest.approx(shares[0], abs=0.01)
        else:
            assert shares[1] > shares[0] + 0.02


def test_the_report_stands_alone(small):
    assert sorted(path.name for path in small.iterdir()) == ["report.html", "results.json"]
    assert list(small.parent.iterdir()) == [small]  # nothing is left beside it
    page = (small / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2 * 4
    assert page.count('<img src="data:image/svg+xml;base64,') == 2
    assert page.count('<source srcset="data:image/svg+xml;base64,') == 2  # for dark screens
    assert "prefers-color-scheme: dark" in page
    assert "http" not in page


def test_the_settings_are_those_that_counted(small, wan):
    settings = read_results(small)["settings"]
    assert (settings["width"], settings["prompt"]) == (32, None)
    settings = read_results(wan)["settings"]
    assert (settings["width"], settings["prompt"]) == (None, None)
    prompted = command.DemoOptions(model="a/name").for_model
    assert prompted == {"prompt": "A landscape turns from spring to winter, time lapse."}
    page = (small / "report.html").read_text()
    assert "--width" in page
    assert "--prompt" not in page


def test_a_map_is_drawn_from_its_minimum_to_its_maximum():
    uri = report._map_image([[0.5, 1.5], [float("nan"), 0.5]])
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        pixels = [image.getpixel((x, y))[:3] for y in range(2) for x in range(2)]
    darkest, lightest, grey = (68, 1, 84), (253, 231, 36), (128, 128, 128)
    assert pixels == [darkest, lightest, grey, darkest]


def test_the_table_is_printed(one_step, tmp_path, capsys):
    assert main([*one_step, "--sigma", "0", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    for text in ("stock attention", "eager TAR", "vstar_kernels", "peak memory", "report.html"):
        assert text in out
    assert "4/4" in err  # the progress bar: a warm-up and three steps


def test_steps_after_the_fourteenth_are_not_regularized(pipeline, tmp_path):
    arguments = ["demo", "--model", str(pipeline), "--frames", "3", "--steps", "16"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    results = read_results(tmp_path)
    assert (results["model"]["steps"], results["model"]["regularized_steps"]) == (16, 14)
    assert all(len(variant["steps"]) == 14 for variant in results["variants"].values())


def test_a_peak_that_cannot_be_measured_is_not_made_up(one_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "none")
    assert main([*one_step, "--output", str(tmp_path / "output")]) == 0
    assert "not measured" in capsys.readouterr().out
    variants = read_results(tmp_path / "output")["variants"].values()
    assert all(variant["peak_bytes"] is None for variant in variants)


@pytest.mark.parametrize("factor", [-1.0, float("nan")], ids=["sign", "nan"])
def test_a_wrong_result_is_an_error(factor, one_step, tmp_path, monkeypatch, capsys):
    def broken(bias):
        table = factor * torch.ones(FRAMES)
        return TARAttnProcessor(vk.ToeplitzBias(table, strength=bias.strength))

    wrong = denoise.Variant("vstar_kernels", "broken", broken)
    monkeypatch.setattr(denoise, "VARIANTS", (denoise.STOCK, denoise.EAGER, wrong))
    assert main([*one_step, "--output", str(tmp_path)]) == 1
    assert "differs from eager TAR" in capsys.readouterr().err
    assert "something is wrong" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "integer of at least 1, got '0'"),
        (["--frames", "many"], "integer of at least 1, got 'many'"),
        (["--steps", "1001"], "at most 1000"),
        (["--width", "huge"], "--width: must be an integer of at least 1, got 'huge'"),
        (["--width", "33"], "multiple of 32"),
        (["--size", "100x64"], "multiples of 8"),
        (["--size", "16x64"], "from 64"),
        (["--sigma", "-1"], "at least 0"),
        (["--sigma", "nan"], "finite"),
        (["--strength", "inf"], "finite"),
        (["--strength", "1e39"], "finite in float32"),
        (["--prompt", "a cat"], "--prompt, 'a cat', is for real weights: give --model"),
        (["--model", "wan", "--prompt", "cat"], "--prompt, 'cat', is for real weights: give --mod"),
        (["--model", "wan", "--width", "64"], "--width, 64, is for the random UNet, not for --mod"),
        (["--seed", "-1"], "at least 0"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--model", "./no/such/folder"], "no folder ./no/such/folder"),
        (["--sigma", "1", "1", "1", "1", "1"], "names level 4"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(arguments, message, tmp_path, read_error):
    folder = tmp_path / "output"
    try:
        status = main([*SMALL, *arguments, "--output", str(folder)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error, value = read_error(), arguments[-1]
    option = [argument for argument in arguments if argument.startswith("--")][-1]
    assert error.startswith((f"Error parsing {option}: ", f"vstar-kernels demo: error: {option}"))
    assert message in error
    assert value in error
    assert not folder.exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_a_pipeline_that_does_not_load_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["demo", "--model", str(tmp_path), "--output", str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot load {tmp_path}" in error
    assert not (tmp_path / "output").exists()


def test_a_pipeline_of_another_model_is_refused(tmp_path, capsys):
    tiny.animatediff().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "output")]
    assert main(["demo", *arguments]) == 2
    assert "has a UNetMotionModel, a TextToVideoSDPipeline a UNet3D" in capsys.readouterr().err


def test_a_file_as_output_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "must be a folder" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main([*SMALL, "--output", str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err
    assert "needs tqdm" in error
    assert "pip install 'vstar_kernels[demo]'" in error
    assert not (tmp_path / "output").exists()


def test_a_saved_pipeline_makes_videos(pipeline, tmp_path):
    output = tmp_path / "output"
    arguments = ["--model", str(pipeline), "--prompt", "a cat", "--frames", "5", "--steps", "3"]
    assert main(["demo", *arguments, "--output", str(output)]) == 0
    results = read_results(output)
    assert results["agrees"]
    assert (results["model"]["latent_height"], results["model"]["latent_width"]) == (8, 8)
    assert [level["level"] for level in results["maps"]] == [0, 1]
    page = (output / "report.html").read_text()
    assert page.count('<img src="data:image/gif;base64,') == 2
    for name in ("stock", "vstar_kernels"):
        with Image.open(output / f"{name}.gif") as video:
            assert (video.size, video.n_frames) == ((16, 16), 5)

    # A later run without a decoder must not leave these videos beside its own figures.
    assert main([*SMALL, "--steps", "1", "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "results.json"]


def test_the_loop_is_the_pipelines_own(pipeline, tmp_path):
    """Stock attention gives the video that diffusers' pipeline gives for the same noise."""
    from vstar_kernels.cli.demo.command import DemoOptions, load_model, prepare

    model = str(pipeline)
    options = DemoOptions(model, "a cat", frames=5, steps=3, output=tmp_path / "output")
    demo = prepare(options)
    demo.run(lambda done: None)
    latents = load_model(options).latents
    expected = TextToVideoSDPipeline.from_pretrained(model)(
        "a cat", num_frames=5, num_inference_steps=3, latents=latents, output_type="latent"
    ).frames
    torch.testing.assert_close(demo.denoisings[0].latents, expected, rtol=1e-4, atol=1e-4)


def test_the_core_is_timed_without_the_projections():
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x

    def processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        for projection in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
            projection(hidden_states)
        time.sleep(0.02)
        return hidden_states

    attn = Attention(8, heads=1, dim_head=8)
    attn.to_q, attn.to_k, attn.to_v, attn.to_out[0] = (Slow() for _ in range(4))
    attn.processor = type("Processor", (), {"__call__": staticmethod(processor)})()
    layer = TemporalLayer("layer", 0, "down", attn)
    with measure.CoreTimer([layer], torch.device("cpu")) as timer:
        attn(torch.zeros(1, 2, 8))
        seconds = timer.take()["layer"]
        assert timer.take() == {}
    assert 0.02 <= seconds < 0.05
    attn(torch.zeros(1, 2, 8))
    assert timer.take() == {}  # it no longer watches


def test_the_peak_of_memory_is_that_since_the_reset():
    cpu, size = torch.device("cpu"), 1 << 28
    if not measure.reset_peak_memory(cpu):
        pytest.skip("a process's peak cannot be reset here")
    before = measure.read_peak_memory(cpu)
    torch.ones(size, dtype=torch.uint8)
    assert measure.read_peak_memory(cpu) - before > 0.9 * size
    measure.reset_peak_memory(cpu)
    assert measure.read_peak_memory(cpu) - before < 0.5 * size


def test_no_script_of_a_text_runs_in_the_report(small, tmp_path):
    def hostile(value):
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, list):
            return [hostile(item) for item in value]
        return {k: hostile(x) for k, x in value.items()} if isinstance(value, dict) else value

    results = hostile(read_results(small))
    gif = tmp_path / "x.gif"
    gif.write_bytes(b"GIF")
    text = report.page(results, {HOSTILE: gif})
    assert "dataset.ran" in text
    assert not scripts_run(text, tmp_path)


@pytest.fixture(scope="module")
def wan(one_thread, tmp_path_factory):
    """The folder of a run on a tiny Wan, and what it printed, of 17 frames."""
    folder = tmp_path_factory.mktemp("wan")
    arguments = ["demo", "--model", "wan", "--size", "64x64", "--frames", "17"]
    assert main([*arguments, "--sigma", "0.7", "--output", str(folder)]) == 0
    return folder


def test_wan_shows_maps_without_and_with_tar(wan):
    """TAR over frames of tokens agrees with its formula over all pairs; the maps turn diagonal."""
    results = read_results(wan)
    assert results["agrees"]
    assert results["variants"]["stock"]["difference_from_eager"] > 3 * results["tolerance"]
    model = results["model"]
    assert (model["frames"], model["latent_height"], model["latent_width"]) == (5, 8, 8)
    assert (model["attention_layers"], model["regularized_layers"]) == (3, 3)
    assert [block["name"] for block in results["maps"]] == ["block 0", "block 1", "block 2"]
    for block in results["maps"]:
        without, regularized = (torch.tensor(block[x]["map"]) for x in ("without_tar", "with_tar"))
        for matrix in (without, regularized):
            assert matrix.shape == (5, 5)
            torch.testing.assert_close(matrix.sum(-1), torch.ones(5), rtol=0, atol=1e-5)
        assert (regularized.diagonal() > without.diagonal()).all()
    assert not (wan / "stock.gif").exists()


def test_the_page_of_wan_is_the_demos(wan):
    page = (wan / "report.html").read_text(encoding="utf-8")
    assert "self-attention over space and time" in page
    assert "block 2, with TAR, σ = 0.7" in page
    assert "<script" not in page


def test_no_video_of_wan_has_as_many_tokens_as_its_text(tmp_path):
    """Eager TAR tells self-attention by the number of its keys."""
    one_step = ["demo", "--model", "wan", "--size", "64x64", "--frames", "5", "--steps", "1"]
    assert main([*one_step, "--output", str(tmp_path / "out")]) == 0  # 32 tokens


def test_wan_takes_one_sigma(tmp_path, read_error):
    assert main(["demo", "--model", "wan", "--sigma", "1", "2", "--output", str(tmp_path)]) == 2
    assert "--sigma takes one value for wan" in read_error()
