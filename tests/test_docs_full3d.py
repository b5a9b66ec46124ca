"""What docs/full-3d.md shows runs, on a tiny Wan, and its tables name what there is."""

import re

import pytest

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from examples import tiny_transformers
from tests.helpers import ROOT
from vstar_kernels.methods.pipelines import FULL3D
from vstar_kernels.models.full3d.families import FAMILIES
from vstar_kernels.models.full3d.prompts import TEXT_LAYERS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PAGE = (ROOT / "docs/full-3d.md").read_text(encoding="utf-8")


def test_every_block_runs(capsys):
    pipe = tiny_transformers.wan()
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent",
        "max_sequence_length": 226,
    }  # fmt: skip
    names = {"pipe": pipe, "prompt": "a year", "settings": settings}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert "blocks.1.attn1" in capsys.readouterr().out
    profile = vk.analysis.frame_profile(names["native"])
    reached = vk.analysis.frame_profile(names["frame_map"](33, names["rule"]))
    falls = profile / profile[0]
    assert (reached[:5] / reached[0] / falls - 1).abs().max() < 0.15
    assert reached[5:].max() < 0.1 * reached[:5].min()
    assert len(names["generation"].layers) == 2


def test_the_table_has_every_family_and_pipeline():
    table = PAGE[PAGE.index("## Models") : PAGE.index("## Where and when")]
    for family in FAMILIES:
        assert family.name.split()[0] in table, family.name
    for pipeline in FULL3D:
        assert f"`{pipeline}`" in PAGE
    apart = re.findall(r"^\| ([^|]*)\|.*\| yes \|$", table, re.MULTILINE)
    said = " ".join(apart).replace("-", "")
    for text_layers in TEXT_LAYERS:
        for name in text_layers.classes:
            family = re.sub(r"(VACE|Animate)?(Video)?Transformer3DModel", "", name)
            assert family in said, name
