import ast
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import ROOT
from tests.models.lvdm_model import UNetModel

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from examples import common, tiny, tiny_transformers

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")
VIDEOS = {  # what each writes, with how many frames
    "animatediff": {"tar": 48},
    "frame_prompts": {"frame_prompts": 16},
    "i2vgen_xl": {"stock": 16, "tar": 16},
    "latte": {"tar": 32},
    "sharded": {"sharded": 16},
    "starvid": {"starvid": 16},
    "stable_video_diffusion": {"stock": 16, "tar": 16},
    "text_to_video": {"stock": 16, "tar": 16},
}
SHARED = {"common", "tiny", "tiny_transformers"}


@pytest.mark.parametrize("option", ["--frames", "--steps"])
@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_number_of_nothing_names_the_option(option, number, capsys):
    with pytest.raises(SystemExit):
        common.parser(None, model=None).parse_args([option, number])
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.fixture
def run(monkeypatch):
    """Runs an example in this process; what it prints goes where the test's own output goes."""

    def call(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")

    # As Python does for a script: its folder comes first, and modules are its own.
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield call
    for name in SHARED & (set(sys.modules) - before):
        del sys.modules[name]


def run_alone(name, *arguments):
    """Run an example as its reader does, in a process of its own from anywhere."""
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", VIDEOS)
def test_example(name, tmp_path, run):
    run(name, "--output", tmp_path, "--steps", 1)
    found = {}
    for path in tmp_path.glob("*.gif"):
        with Image.open(path) as video:
            found[path.stem] = video.n_frames
        with Image.open(path.with_suffix(".png")) as strip:
            assert strip.width == 8 * strip.height
    assert found == VIDEOS[name]
    if "stock" in found:
        stock, tar = (tmp_path / f"{kind}.gif" for kind in ("stock", "tar"))
        assert stock.read_bytes() != tar.read_bytes()


def test_a_saved_pipeline_is_loaded(tmp_path, run):
    tiny.text_to_video().save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--frames", 3, "--steps", 2, "--output", tmp_path]
    run("text_to_video", *options)
    with Image.open(tmp_path / "tar.gif") as video:
        assert (video.n_frames, video.size) == (3, (16, 16))  # the model's own size


REPOSITORY = {  # as much of the official code as the example touches
    "omegaconf.py": """
        from types import SimpleNamespace
        class OmegaConf:
            def load(path):
                assert path.name == "inference_t2v_512_v2.0.yaml"
                return SimpleNamespace(model="the model's part")
        """,
    "utils/utils.py": """
        from lvdm.model import Model
        def instantiate_from_config(config):
            assert config == "the model's part"
            return Model()
        """,
    "lvdm/model.py": """
        import torch
        from tests.models.lvdm_model import UNetModel
        class Model(torch.nn.Module):
            channels, device = 4, torch.device("cpu")
            def __init__(self):
                super().__init__()
                self.model = torch.nn.Module()
                self.model.diffusion_model = UNetModel()
            def get_learned_conditioning(self, texts):
                return torch.ones(len(texts), 3, 24) * len(texts[0])
            def decode_first_stage_2DAE(self, latents):
                assert all(p.eq(0.01).all() for p in self.parameters()), "not the checkpoint's"
                return latents[:, :3].clamp(-1, 1)
        """,
    "lvdm/models/samplers/ddim.py": """
        import numpy, torch
        class DDIMSampler:
            def __init__(self, model):
                self.unet = model.model.diffusion_model
            def make_schedule(self, steps, ddim_eta, verbose):
                self.ddim_timesteps = numpy.arange(steps) * (1000 // steps) + 1
            def sample(self, S, batch_size, shape, conditioning, unconditional_conditioning, **_):
                x = torch.randn(batch_size, *shape)
                for t in numpy.flip(self.ddim_timesteps):
                    t = torch.full((batch_size,), t)
                    for texts in (conditioning, unconditional_conditioning):
                        x = x - 0.1 * self.unet(x, t, context=texts["c_crossattn"][0])
                return x, None
        """,
}


def test_videocrafter(tmp_path):
    for name, code in REPOSITORY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
    unet = UNetModel()
    weights = {f"model.diffusion_model.{k}": v.fill_(0.01) for k, v in unet.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    options = ["--checkpoint", tmp_path / "model.ckpt", "--frames", 3, "--output", tmp_path]
    done = run_alone("videocrafter", "--repository", tmp_path, *options, "--steps", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"TAR on \d+ of .* at steps 0 to 13", done.stdout)
    assert "level 0 (width 64), σ = 1" in done.stdout
    with Image.open(tmp_path / "tar.gif") as video:
        assert (video.n_frames, video.size) == (3, (64, 40))


def test_every_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - SHARED
    assert names == {*VIDEOS, "frame_map", "train_grid", "train_maps", "videocrafter"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in readme for name in names)


def test_frame_maps_at_two_lengths(tmp_path, run, capsys):
    """The matched clip has the short one's profile; the proposed layers are layers."""
    run("frame_map", "--output", tmp_path, "--steps", 2)
    printed = capsys.readouterr().out
    assert {x.name for x in tmp_path.glob("*.png")} == {
        "profiles.png", "maps_native.png", "maps_long.png", "maps_matched.png"
    }  # fmt: skip
    near = [float(x) for x in re.findall(r"([\d.]+)% within", printed)]
    assert near[1] < 0.8 * near[0]
    assert near[1] < near[2]
    layers = re.search(r"FrameTAR\(layers=(\[.*?\])\)", printed)[1]
    assert set(ast.literal_eval(layers)) < {0, 1}
    rule = vk.FrameRule.from_json((tmp_path / "rule.json").read_text(encoding="utf-8"))
    assert rule.terms[0].table.shape == (9, 9)
    pipe = tiny_transformers.wan()
    vk.apply_frames(pipe, rule, layers=ast.literal_eval(layers)).remove()


def test_training_on_maps(run, capsys):
    run("train_maps", "--steps", 12, "--rate", 5e-3)
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_training_on_a_grid(run, tmp_path, capsys):
    """Stopped and run again it does what it does in one go, and the page shows all of it."""
    for steps in (1, 2):
        run("train_grid", "--steps", steps, "--device", "cpu", "--output", tmp_path / "twice")
    printed = capsys.readouterr().out
    assert printed.count("goes on after step 1") == 2
    run("train_grid", "--steps", 2, "--device", "cpu", "--output", tmp_path / "once")
    for kind in ("with embeddings", "without embeddings"):
        losses = [
            json.loads((tmp_path / how / kind / "losses.json").read_text())
            for how in ("once", "twice")
        ]
        assert len(losses[0]) == 2
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    page = (tmp_path / "once" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 8
    assert page.count("data:image/svg+xml") == 2
    embedding = vk.GridEmbedding.load(
        tmp_path / "once" / "with embeddings" / "embedding.safetensors"
    )
    assert embedding.fps is not None
