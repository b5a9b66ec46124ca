"""The checks in a real ComfyUI, where there is one: ``COMFYUI_DIR`` says where."""

import os
import subprocess
import sys

import pytest

from .real_comfyui.server import ROOT


def test_the_node_pack_in_a_real_comfyui():
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR names no ComfyUI: integrations/comfyui/check.py was not run")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, str(ROOT / "integrations" / "comfyui" / "check.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
