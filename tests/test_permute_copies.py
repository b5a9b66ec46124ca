import json

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

from benchmarks import permute_copies
from benchmarks.permute_copies import Shape, to_frames, to_norm, to_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_copies_are_those_of_the_transformer():
    shape = Shape(batch=2, frames=3, channels=32, height=4, width=5)
    x = torch.randn(6, 32, 4, 5)
    module = TransformerTemporalModel(2, 16, in_channels=32)
    seen = {}
    for name in ("norm", "proj_in", "proj_out"):
        child = getattr(module, name)
        child.register_forward_hook(lambda _, args, out, n=name: seen.update({n: (args[0], out)}))
    with torch.no_grad():
        out = module(x, num_frames=3, return_dict=False)[0]
    assert torch.equal(to_norm(x, shape), seen["norm"][0])
    assert torch.equal(to_rows(seen["norm"][1]), seen["proj_in"][0])
    assert torch.equal(to_frames(seen["proj_out"][1], shape) + x, out)


def test_the_command_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "copies.json"
    small = ["--width", "32", "--frames", "3", "--size", "64x64", "--batch", "1", "--rounds", "1"]
    permute_copies.main([*small, "--json", str(path)])
    results = json.loads(path.read_text())
    assert results["settings"]["frames"] == 3
    table = capsys.readouterr().out
    for name, count in (("unet3d", 17), ("motion", 21)):
        result = results["models"][name]
        rows = result["copies"]
        assert sum(row["transformers"] for row in rows) == count
        assert {(row["shape"]["channels"], row["shape"]["height"]) for row in rows} >= {
            (32, 8),
            (64, 4),
            (128, 2),
            (128, 1),
        }
        total = sum(row["transformers"] * row["seconds"] for row in rows)
        assert total == pytest.approx(result["copy_seconds"])
        assert 0 < result["copy_seconds"] < result["forward_seconds"]
        assert f"| **{name}** | of a forward of" in table
