"""What docs/many-prompts.md shows runs, on a tiny pipeline."""

import csv
import json
import re
import shlex

import pytest

from tests.helpers import ROOT
from vstar_kernels.cli.generate.command import Generate
from vstar_kernels.cli.main import main
from vstar_kernels.cli.study.command import Study

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("yaml")
from examples import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PAGE = (ROOT / "docs/many-prompts.md").read_text(encoding="utf-8")
SMALL = {
    r"cerspense/zeroscope_v2_576w": "model",
    r"64D1_32D8": "8D1_4D8",
    r"--frames \d+": "--frames 2 --steps 1 --size 16x16 --no-maps",
    r"(study (study.yaml|prompt_list.json))": r"\1 --steps 1 --size 16x16",
    r'"(frames|steps)": \d+': r'"\1": 2',
    r"frames: 24": "frames: 2",
    r"\[0, 1, 2\]": "[0]",
    r"sigma: \[.*?\]": "sigma: [0.5]",
    r"embedder: dreamsim": "embedder: pixels",
    r"\n +clip_vl: .*": "",
}


def blocks(language):
    for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL):
        for pattern, substitute in SMALL.items():
            block = re.sub(pattern, substitute, block)
        yield block


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The page's commands, in a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    tiny.text_to_video().save_pretrained("model")
    for name, language in {"prompts.jsonl": "json", "study.yaml": "yaml"}.items():
        (block,) = blocks(language)
        (tmp_path / name).write_text(block, encoding="utf-8")
    official = [{"prompt": "A rose.", "subprompts": ["A bud.", "A rose."]}]
    (tmp_path / "prompt_list.json").write_text(json.dumps(official))
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line)[1:] for line in lines]


def test_commands(commands, tmp_path, capsys, monkeypatch):
    prompts, on_ray, study, columns = commands
    assert main(prompts) == 0, capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "videos").glob("0*"))
    assert names[:2] == ["001-a-rose-blooms-in-a-garden", "002-rose-in-stages"]
    assert "4 made" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Generate, "run", lambda self: int(self.batch.ray != "auto"))
        assert main(on_ray) == 0
    assert main(study) == 0, capsys.readouterr()
    with (tmp_path / "study/variants.csv").open(encoding="utf-8") as file:
        variants = [row["variant"] for row in csv.DictReader(file)]
    assert variants[:5] == ["baseline", "VSP", "TAR", "both", "8D1_4D8"]
    assert len(variants) == 5 + 2 + 1
    shown = set(
        re.findall(r"`((?:study|scores|variants|over|similarities|histograms)[\w-]*\.\w+)`", PAGE)
    )
    shown -= {"scores.json"}
    assert shown <= {path.name for path in (tmp_path / "study").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Study, "run", lambda self: len(self.study.seeds))
        assert main(columns) == 2
