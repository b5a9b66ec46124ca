import json

import pytest

pytest.importorskip("diffusers")

from benchmarks import text_once

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "text.json"
    small = ["--width", "32", "--frames", "3", "--size", "64x64", "--batch", "2", "--rounds", "1"]
    text_once.main([*small, "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["same_bits"]
    assert found["operations"]["every copy"] == 3 * found["operations"]["once"]
    assert {*found["times_as_long"]} == {"forward", "projections"}
    assert "| forward |" in capsys.readouterr().out
