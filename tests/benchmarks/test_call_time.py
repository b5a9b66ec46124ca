"""benchmarks.call_time: calls by Triton's own launcher, above a driver that does nothing."""

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("tyro")

from benchmarks import call_time

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
    ),
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
    ),
]


def run(program, *arguments):
    """In a process of its own, which keeps the stub of the driver."""
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=500
    )


def test_the_command_times_every_call():
    found = run(["-m", "benchmarks.call_time"], "--rounds", "2", "--calls", "3", "--compare")
    assert found.returncode == 0, found.stderr
    row = r"^\| (\w+_attention, .*?) \| ([^|]+) \|.*\| ([^|]+) \|$"
    rows = re.findall(row, found.stdout, re.MULTILINE)
    assert len(rows) == 5
    assert all(float(kept) > 0 and float(searched) > 0 for _, kept, searched in rows)


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert call_time.main([]) == 1
    assert "needs a C compiler" in capsys.readouterr().err


def test_it_says_what_the_compiler_says(tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert call_time.main([]) == 1
    assert capsys.readouterr().err.strip().endswith("cannot compile the stub: no space left")


@pytest.mark.parametrize("option", ["--rounds", "--calls"])
def test_no_rounds_and_no_calls_are_refused(option, capsys):
    with pytest.raises(SystemExit) as refused:
        call_time.main([option, "0"])
    assert refused.value.code == 2
    assert "must be an integer of at least 1, got '0'" in " ".join(capsys.readouterr().err.split())


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(call_time.tar, "interpreted", lambda: True)
    assert call_time.main([]) == 1
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


CHANGES = {
    "a number": "launch, (rest[0], rest[1] + 1, *rest[2:])",
    "an address": "lambda x, *rest: launch((x[0], x[2], x[1], *x[3:]), *rest), rest",
    "a type": "lambda x, *rest: launch((*x[:3], x[3].half(), *x[4:]), *rest), rest",
    "none": "lambda x, *rest: launch((*x[:3], None, *x[4:]), *rest), rest",
}
BROKEN = f"""
import tempfile
from pathlib import Path
from benchmarks import call_time, stub_driver
from vstar_kernels.attention.triton.launches import Launch

keep = Launch._by_triton
with tempfile.TemporaryDirectory() as folder, stub_driver.installed(Path(folder)):
    for name, change in {CHANGES}.items():
        def wrong(self, key, tensors):
            keep(self, key, tensors)
            launch, rest = self._compiled[key]
            self._compiled[key] = eval(change, dict(launch=launch, rest=rest))
        Launch._by_triton = wrong
        try:
            list(call_time.measure(call_time.Options(1, 1)))
        except AssertionError as error:
            print(f"{{name}}: {{error}}")
"""


def test_a_later_call_that_launches_something_else_is_noticed():
    found = run(["-c", BROKEN])
    assert found.returncode == 0, found.stderr
    noticed = [f"{name}: a later call launches something else" for name in CHANGES]
    assert found.stdout.splitlines() == noticed
