"""What docs/starvid.md shows runs, on a tiny pipeline."""

import re

import pytest

import vstar_kernels as vk
from tests.helpers import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
from examples import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PAGE = (ROOT / "docs/starvid.md").read_text(encoding="utf-8")
SMALL = {  # the tiny text encoder takes 16 letters
    r"a cat runs and a mouse hides": "cat runs mouse",
    r"num_frames=16\)\.frames": "num_frames=2, num_inference_steps=3, height=16, width=16, "
    "output_type='latent').frames",
    r"\[0, 10\]": "[0, 2]",
}


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.text_to_video()
    pipe.set_progress_bar_config(disable=True)
    first, *blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "vk.StarVid(pipe, writer=writer)" in first  # which asks a server
    names = {"vk": vk, "pipe": pipe}
    for block in blocks:
        for pattern, substitute in SMALL.items():
            block = re.sub(pattern, substitute, block)
        exec(block, names)
    assert vk.Trajectory.load("plan.json") == names["plan"]
    assert names["boxes"].shape == (2, 16, 4)
    assert [update.step for update in names["guided"].updates] == [0] * 5 + [1] * 5
    assert names["maps"].shape[:3] == (1, 2, 2)
    assert len(names["figure"].axes) == 2 * 2


def test_its_study_is_read(tmp_path):
    pytest.importorskip("yaml")
    from vstar_kernels.cli.study.plan import read_study
    from vstar_kernels.cli.study.scores import expected_of

    cat = vk.Subject("cat", boxes=[(0.0, 0.0, 0.5, 1.0)])
    vk.Trajectory("a cat", [cat]).save(tmp_path / "plan.json")
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "study.yaml").write_text(block, encoding="utf-8")
    study = read_study(tmp_path / "study.yaml")
    assert [expected_of(prompt) for prompt in study.prompts] == [{"cat": 1}, {"cats": 2}]
    assert [variant.name for variant in study.variants] == ["StarVid", "baseline"]


def test_its_figures_are_there():
    for name in re.findall(r"\((images/[^)]*)\)", PAGE):
        assert (ROOT / "docs" / name).is_file()
