"""Frames and DTensors over processes: checks.py, run by two of them.

SHARDED_PROCESSES=4 runs it by four (make test-sharded).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("diffusers")
dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if sys.platform == "win32":
    pytest.skip("processes are forked", allow_module_level=True)

from tests.models.sharded.checks import CHECKS

PROCESSES = os.environ.get("SHARDED_PROCESSES", "2")


def test_processes(tmp_path):
    # One test, as pytest's own processes would each run all of it.
    output = tmp_path / "results"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.sharded.processes", PROCESSES, str(output)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert output.exists(), done.stderr
    results = json.loads(output.read_text())
    failed = [f"{name}: {error}" for name, error in results.items() if error]
    assert not failed, "\n".join(failed)
    assert list(results) == list(CHECKS)
