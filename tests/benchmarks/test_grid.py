import json

import pytest
import torch

import vstar_kernels as vk
from benchmarks import grid
from benchmarks.machine import peak_bytes
from vstar_kernels.attention import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(native.load().problems), reason="no native library"),
]


def test_the_command_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "SETTINGS", {"small": (4, 8, 4)})
    monkeypatch.setattr(grid, "SWEEP_TOKENS", 64)
    path = tmp_path / "grid.json"
    grid.main(["--settings", "small", "--rounds", "1", "--sweep", "--json", str(path)])
    record = json.loads(path.read_text())
    small, large = record["results"]
    assert (small["head_dim"], large["head_dim"]) == (4, 64)
    assert large["tokens"] == 4 * 4 * 2
    assert large["operations"] == 4 * 32**2 * 64
    assert large["factorised_operations"] == 4 * 64 * (4 * 8**2 + 8 * 4**2)
    assert set(large["seconds"]) == set(grid.NAMES)
    assert [x["batch"] * x["receptive_field"] for x in record["sweep"]] == [16] * 3
    printed = capsys.readouterr().out
    assert "4 × 8" in printed
    assert "receptive field" in printed


def test_16_frames_of_32_by_32_need_little_memory():
    """L = 16,384: a map over all tokens would be 1 GiB, and Δ as much."""
    q, k, v = torch.randn(3, 1, 16384, 1, 16).unbind()
    layout = grid.grid_layout(4, 4, 32, 32)
    rule = vk.FrameRule.tar(1.0, stat="row_max")
    peak = peak_bytes("cpu", lambda: vk.frame_attention(q, k, v, layout, rule, return_map=True))
    if peak is None:
        pytest.skip("nothing tells the peak of memory here")
    assert peak < 64 << 20
