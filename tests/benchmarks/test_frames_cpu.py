import json

import pytest

from benchmarks import frames_cpu
from vstar_kernels.attention import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(native.load().problems), reason="no native library"),
]


def test_the_command_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frames_cpu, "MATRIX", 16)
    monkeypatch.setattr(frames_cpu, "COPY", 64)
    path = tmp_path / "frames.json"
    sizes = ["--tokens", "64", "--head-dims", "16", "--frames", "4", "--rounds", "1"]
    frames_cpu.main([*sizes, "--json", str(path)])
    (float32, bfloat16) = json.loads(path.read_text())["results"]
    assert (float32["dtype"], bfloat16["dtype"]) == ("float32", "bfloat16")
    assert float32["kept_share"] == 14 / 16
    assert set(float32["over_none"]) == set(frames_cpu.RULES)
    assert "64 × 128" in capsys.readouterr().out
