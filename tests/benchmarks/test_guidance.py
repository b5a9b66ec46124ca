import json

import pytest

pytest.importorskip("diffusers")

from benchmarks import guidance
from tests.models import models

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_measures_each_way(monkeypatch, tmp_path, capsys):
    small = models.diffusers_model("UNet3DConditionModel", **models.UNET3D)
    monkeypatch.setattr(guidance, "unet3d", lambda width: small())
    monkeypatch.setattr(guidance, "peak_bytes", lambda device, call: 2**20)
    path = tmp_path / "guidance.json"
    sizes = ["--width", "16", "--frames", "2", "--size", "64x64", "--rounds", "1"]
    guidance.main([*sizes, "--json", str(path)])
    record = json.loads(path.read_text())
    ways = [result["way"] for result in record["results"]]
    assert ways[0] == guidance.PLAIN
    assert len(ways) == 5
    assert all(result["seconds"] > 0 for result in record["results"])
    printed = capsys.readouterr().out
    assert "50 steps, 75 updates" in printed
    assert all(way in printed for way in ways)


def test_the_whole_of_sampling():
    """25 of 50 steps have 3 updates of 2 steps' time each: 50 + 150 of 50."""
    results = [
        {"way": guidance.PLAIN, "seconds": 1.0, "peak_bytes": 2**20},
        {"way": "guided", "seconds": 3.0, "peak_bytes": None},
    ]
    table = guidance.table(results, guidance.Options())
    assert table.rows[0] == [guidance.PLAIN, "1.00 s", "", "1 MiB", "1.00"]
    assert table.rows[1] == ["guided", "3.00 s", "2.00", "unknown", "4.00"]
