"""What benchmarks.frames_cost counts, and that the docs show it."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from benchmarks import frames_cost

PAGE = Path(__file__).parents[2] / "docs/frame-attention.md"


def cells(model, rule, **options):
    found = frames_cost.count(model, rule, frames_cost.Options(**options))
    return dict(zip(frames_cost.HEAD, found, strict=True))


def test_the_docs_show_what_the_command_prints(capsys):
    section = re.search(r"<!-- cost -->(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    commands = re.findall(r"`python -m benchmarks.frames_cost ([^`]*)`", PAGE.read_text())
    assert len(commands) == 2
    for command in commands:
        frames_cost.main(shlex.split(command))
        assert capsys.readouterr().out.strip() in section[1]


def test_operations_are_those_of_the_window():
    found = cells("ltx-2-512x768", "tar", rows=384)  # 16 frames, a tile each, 4 frames reached
    seen = sum(min(f + 4, 15) - max(f - 4, 0) + 1 for f in range(16)) / 16
    assert found["revisit"] == f"{seen / 16 / 2:+.0%}"
    assert found["TFLOP"] == f"{4 * 6144**2 * 128 * 32 / 1e12:.3g}"
    slots = sum(  # pairs of frames as far before and behind, the others, no text
        1 + max(min(f, 4), min(15 - f, 4)) + (f > 4 or f < 11) for f in range(16)
    )
    assert found["split, GB"] == f"{2 * slots * 384 * 128 * 32 * 2 / 1e9:.2g}"
    windowed = cells("ltx-2-512x768", "window")  # of 16 // 8 = 2 frames to each side
    kept = sum(min(f + 2, 15) - max(f - 2, 0) + 1 for f in range(16)) / 256
    assert windowed["kept"] == f"{kept:.0%}"


def test_the_way_is_the_plans(monkeypatch):
    assert cells("ltx-2-512x768", "tar")["way"] == "split"
    assert cells("ltx-2-512x768", "bias")["way"] == "known"
    monkeypatch.setattr(frames_cost.configs, "revisit_below", lambda *key: 10**6)
    assert cells("ltx-2-512x768", "tar")["way"] == "revisit"
