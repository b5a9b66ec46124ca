import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT, run_python
from vstar_kernels.attention import native


def test_the_environment_forces_an_instruction_set(isa):
    code = "from vstar_kernels.attention import native; print(native.load().isa)"
    run = run_python(code, VSTAR_KERNELS_CPU_ISA=isa)
    assert run.stdout.strip() == isa, run.stderr


def test_unknown_instruction_set_is_an_error(isa):
    run = run_python(
        "from vstar_kernels.attention import native; native.load()", VSTAR_KERNELS_CPU_ISA="sse9"
    )
    assert "VSTAR_KERNELS_CPU_ISA must be one of" in run.stderr
    assert "'sse9'" in run.stderr
    with pytest.raises(ValueError, match="instruction set must be one of"):
        native.load().select_isa("sse9")


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    broken = tmp_path / native.load().path.name
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    library = native.load.__wrapped__()
    assert "did not load" in library.problems[0]
    assert library.isa is None
    assert library.isas == []


def test_a_missing_library_tells_what_the_build_said(tmp_path, monkeypatch):
    (tmp_path / "build.json").write_text(json.dumps({"built": False, "reason": "no compiler"}))
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    assert native.load.__wrapped__().problems[0].endswith("no compiler")


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")
@pytest.mark.parametrize(
    ("mode", "status", "message"),
    [
        ("auto", 0, "installing without the CPU kernels: cmake found no working C.. compiler"),
        ("off", 0, "installing without the CPU kernels: VSTAR_KERNELS_NATIVE=off"),
        ("require", 1, "VSTAR_KERNELS_NATIVE=require, but cmake found no working C.. compiler"),
        ("maybe", 1, "must be one of auto, require, off, got 'maybe'"),
    ],
)
def test_build_without_a_compiler(tmp_path, mode, status, message):
    import re

    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path],
        cwd=ROOT,
        env={**os.environ, "VSTAR_KERNELS_NATIVE": mode, "CXX": "/nonexistent/c++"},
        capture_output=True,
        text=True,
    )
    assert (build.returncode != 0) == status, build.stderr
    assert re.search(message, build.stderr, re.DOTALL)
    record = tmp_path / "lib" / "vstar_kernels" / "lib" / "build.json"
    assert record.exists() == (status == 0)
