"""The command that measures what new pages for an output cost."""

import json

import pytest

from benchmarks import pages
from vstar_kernels.attention import native

pytestmark = pytest.mark.skipif(bool(native.load().problems), reason="no native library")


def test_the_command_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pages, "SETTINGS", {x: pages.SETTINGS[x] for x in ("default", "out=")})
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    path = tmp_path / "pages.json"
    # 40 MiB: above what glibc ever keeps, so that its pages are new at every call.
    shape = ["--shape", "2048", "16", "5", "64"]
    pages.main([*shape, "--rounds", "1", "--threads", "1", "--json", str(path)])
    default, reused = json.loads(path.read_text())["results"]
    assert default["setting"] == "default"
    assert reused["faults"] + 5 < default["faults"]  # of 2 MiB where Linux gives such pages
    assert min(default["seconds"], reused["seconds"]) > 0
    assert "| `out=` |" in capsys.readouterr().out
