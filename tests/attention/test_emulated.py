"""Some tests of the Triton kernels, as compiled for GPUs of NVIDIA's, on an emulated one.

``make emulate`` runs all of them there. Triton keeps its driver for the life of a process, so they
run in processes of their own.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
    ),
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
    ),
]
# Of each family a few that take little time, and of each kind of matrix instructions. The shipped
# configurations have tiles and streams, both directions, maps; on sm_90 and sm_100 keys and values
# come by descriptors.
EVERYWHERE = """
tests/attention/test_triton.py::test_strength_zero_is_plain_attention
tests/attention/test_shipped.py::test_tar[tile-forward-16-bit-64x48-gaussian-40]
tests/attention/test_shipped.py::test_tar[stream-gradients-16-bit-48-gradients-40]
tests/attention/test_shipped.py::test_columns[columns-forward_80-16-bit-48-output_and_maps-40]
tests/attention/test_shipped.py::test_frames[frames-forward-16-bit-48-row_max-40]
"""
# What takes longer runs on one of them each.
IN_TURN = {
    "sm_80": "tests/attention/columns/test_triton.py::test_gradients_of_one_result",
    "sm_90": """
tests/attention/test_triton.py::test_maps_and_gradients_are_the_same_every_time
tests/attention/test_triton.py::test_streams[64-16-4-2-0-dense by head-map_max]
tests/attention/test_shipped.py::test_frames[frames-forward_described-16-bit-48-row_max,_mask-40]
""",
    "sm_100": """
tests/attention/frames/test_triton.py::test_interleaved_frames_are_taken_in_order
tests/attention/frames/test_triton.py::test_gradients[grid-same-9-tar_row_max]
""",
}


@pytest.mark.parametrize(("architecture", "count"), [("sm_80", 8), ("sm_90", 10), ("sm_100", 8)])
def test_kernels_on_an_emulated_gpu(architecture, count):
    tests = [*EVERYWHERE.strip().splitlines(), *IN_TURN[architecture].strip().splitlines()]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", *tests],
        cwd=ROOT,
        env={**os.environ, "EMULATED_GPU": architecture},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout
    assert f"{count} passed" in ran.stdout, ran.stdout
