import json

import pytest

from benchmarks import columns_gpu

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_writes_its_figures(tmp_path, capsys):
    """On the CPU, whose clock takes the place of a GPU's."""
    path = tmp_path / "columns.json"
    small = ["--levels", "40", "2", "--frames", "2", "--rounds", "1", "--device", "cpu"]
    columns_gpu.main([*small, "--json", str(path)])
    (found,) = json.loads(path.read_text())["results"]
    assert found["bytes"] == 2 * (2 * 2 * 40 * 2 * 64 + 2 * 2 * 77 * 2 * 64) + 4 * 2 * 40 * 4
    assert found["seconds"]["vstar_kernels"] > 0
    assert "| 40 × 2 | bfloat16 |" in capsys.readouterr().out
