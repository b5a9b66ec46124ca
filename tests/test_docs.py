"""What docs/vstar.md shows runs: on a tiny pipeline, and against a server on this machine."""

import re
import shlex

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import ROOT
from vstar_kernels.cli.main import main
from vstar_kernels.cli.study.command import Study

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("openai")
pytest.importorskip("transformers")
from examples import tiny
from tests.methods.chat_server import ChatServer, tells

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PAGE = (ROOT / "docs/vstar.md").read_text(encoding="utf-8")
STAGES = ["A bud.", "A half-open bud.", "A rose.", "Fallen petals."]
# What the page uses, and what there is here.
SUBSTITUTES = {
    r"64D1_32D8": "8D1_4D8",
    r"num_frames=\d+": "num_frames=3, num_inference_steps=2",
    r"--frames \d+": "--frames 3 --steps 2",
    r"cerspense/zeroscope_v2_576w": "{model}",
    r"http://localhost:11434/v1": "{url}",
}


ANALYSIS = (ROOT / "docs/analysis.md").read_text(encoding="utf-8")
SMALL = {
    r"num_frames=len\(reference_frames\)": "num_frames=16, num_inference_steps=25",
    r"64D1": "8D1",
    r"\(1, 4, 16, 40, 64\)": "(1, 4, 4, 8, 8)",
    r"num_frames=16": "num_frames=4, height=16, width=16, output_type='latent'",
    r"matrix\(16\)": "matrix(4)",
    r"num_inference_steps=25": "num_inference_steps=4",
    r"set_timesteps\(25\)": "set_timesteps(4)",
    r"\[0, 13\]": "[0, 2]",
    r"\[0, 13, 24\]": "[0, 2, 3]",
    r"vk\.analysis\.DreamSimEmbedder\(\)": "'pixels'",  # which downloads its weights
    r"inputs, at_step=2": "inputs, at_step=2, iterations=2, progress=False",
}


def section(title):
    """The Python of a section of docs/analysis.md, with what there is here."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", ANALYSIS, re.DOTALL | re.MULTILINE)[1]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for pattern, substitute in SMALL.items():
        code = re.sub(pattern, substitute, code)
    return code


@pytest.fixture
def names():
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    video = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"vk": vk, "torch": torch, "pipe": pipe, "prompt": "a kite", "frames": video}


def test_every_example_of_the_page_is_run():
    ran = {
        "Maps by level, place and step",
        "Maps of real videos",
        "Similarity of frames",
        "Correlated and optimised noise",
        "Training on maps",
        "Training on drawn positions",
    }
    titles = re.findall(r"^## (.*)$", ANALYSIS, re.MULTILINE)
    assert {title for title in titles if section(title)} == ran


def test_maps_by_level(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(section("Maps by level, place and step"), names)
    assert {item.step for item in names["maps"]} == {0, 2, 3}
    assert (tmp_path / "maps.png").stat().st_size
    assert "level 0, up, step 2 tensor" in capsys.readouterr().out


def test_similarity_of_frames(names):
    generator = torch.Generator().manual_seed(1)
    for name in ("baseline_frames", "vstar_frames", "reference_frames"):
        names[name] = torch.rand(4, 3, 16, 16, generator=generator)
    exec(section("Similarity of frames"), names)
    assert set(names["histograms"]) == {"baseline", "VSTAR"}
    assert names["bias"].delta.diagonal().eq(1).all()
    assert names["video"].shape[2] == 4


def test_drawn_positions(names):
    names["motion_unet"] = unet = tiny.animatediff().unet
    noise = names["noise"] = torch.randn(1, 4, 4, 8, 8)
    noisy = names["noisy"] = noise.clone().requires_grad_()
    names["text"] = torch.randn(4, 3, unet.config.cross_attention_dim)
    stock = unet(noisy, 500, encoder_hidden_states=names["text"]).sample
    exec(section("Training on drawn positions"), names)
    assert noisy.grad.abs().max() > 0
    assert not torch.equal(names["predicted"], stock)


def test_real_maps_and_optimised_noise(names):
    exec(section("Maps of real videos"), names)
    for name in ("real", "own"):
        assert {item.step for item in names[name].maps} == {0, 2}
    assert not torch.equal(names["real"].noised[0], names["own"].noised[0])
    names["generator"] = torch.Generator().manual_seed(0)
    exec(section("Correlated and optimised noise"), names)
    assert {item.step for item in names["found"].maps} == {2}
    assert names["video"].shape[2] == 4


def test_a_penalty_on_maps(names):
    names["noisy"] = torch.randn(1, 4, 4, 8, 8).requires_grad_()
    names["inputs"] = {"encoder_hidden_states": torch.randn(1, 3, 32)}
    exec(section("Training on maps"), names)
    assert names["noisy"].grad.abs().max() > 0
    assert names["pipe"].unet.conv_in.weight.grad.abs().max() > 0


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_MODEL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VSTAR_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with ChatServer(tells(*STAGES)) as server:
        yield server


def blocks(language, **names):
    """The page's blocks of a language, with what there is here."""
    for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL):
        for pattern, substitute in SUBSTITUTES.items():
            block = re.sub(pattern, substitute, block)
        yield block.replace("{model}", names.get("model", "")).replace("{url}", names["url"])


def test_python(server, capsys):
    first, second, progress, baselines, third = blocks("python", url=server.url)
    names = {"pipe": tiny.text_to_video()}
    exec(first, names)
    assert len(names["video"].frames) == 3
    assert names["video"].synopsis.stages == tuple(STAGES)
    exec(second, names)
    assert names["video"].synopsis == names["rose"]
    assert len(server.requests) == 1
    exec(progress, names)
    assert "step 2 of 2" in capsys.readouterr().out
    exec(baselines, names)
    columns = names["columns"]
    assert [columns[name].config is None for name in columns] == [True, True, False, False]
    assert [len(columns[name].synopsis.stages) for name in columns] == [1, 3, 1, 3]
    *statements, values = third.strip().splitlines()
    exec("\n".join(statements), names)
    assert eval(values.partition("  #")[0], names) == (7, 8)


def test_commands(server, tmp_path, capsys, monkeypatch):
    tiny.text_to_video().save_pretrained(tmp_path / "model")
    block, study = blocks("sh", url=server.url, model=str(tmp_path / "model"))
    with monkeypatch.context() as patch:  # test_docs_many.py runs one
        patch.setattr(Study, "run", lambda self: 0)
        assert main(shlex.split(study.replace("\\\n", ""))[1:]) == 0
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    assert len(commands) == 4
    for program, *arguments in commands[:3]:
        assert program == "vstar-kernels"
        assert main(arguments) == 0, capsys.readouterr().err
    first, again = (
        vk.Synopsis.load(name) for name in ("rose/synopsis.json", "rose-again/synopsis.json")
    )
    assert first == again == vk.Synopsis("A rose blooms in a garden.", STAGES)
    # The last one downloads. Its options are read, and then its folder is not there.
    (tmp_path / "candle").write_text("a file")
    assert main(commands[3][1:]) == 2
    assert "--output must be a folder" in capsys.readouterr().err
