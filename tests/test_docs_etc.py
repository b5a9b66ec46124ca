"""What docs/etc.md shows runs, on a tiny pipeline."""

import re

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from docs import make_grid_figures
from examples import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PAGE = (ROOT / "docs/etc.md").read_text(encoding="utf-8")
SMALL = {
    r"frames=16, ": "frames=4, height=8, width=8, num_inference_steps=2, ",
    r"(pipe|unet), 16": r"\1, 4",
    r"4 \* 256, width=4 \* 256": "16, width=16, num_inference_steps=2",
}


def test_the_page(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for pattern, small in SMALL.items():
        code = re.sub(pattern, small, code)
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    names = {
        "vk": vk,
        "pipe": pipe,
        "latents": torch.randn(2, 4, 4, 4, 4),
        "text": torch.randn(2, 3, tiny.TEXT_CHANNELS),
        "fps": torch.tensor([8.0, 30.0]),
    }
    exec(code, names)
    assert len(names["video"].frames) == 4
    assert names["maps"][0].shape[2:] == (4, 5)
    assert names["loss"].isfinite()
    assert vk.GridEmbedding.load("embedding.safetensors").fps is not None


def test_the_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(make_grid_figures, "SIDE", 2)
    make_grid_figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"grid-embedding.png", "grid-maps.png"}
    assert all(f"images/{path.name}" in PAGE for path in tmp_path.iterdir())
