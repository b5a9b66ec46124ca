"""Frames and DTensors over processes: checks.py, run by two of them.

SHARDED_PROCESSES=4 runs it by four (make test-sharded).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not (dist.is_available() and dist.is_gloo_available()),
    reason="processes that are forked and talk by gloo",
)
PROCESSES = os.environ.get("SHARDED_PROCESSES", "2")


@pytest.mark.long
def test_processes(tmp_path):
    from tests.models.sharded.checks import CHECKS

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
