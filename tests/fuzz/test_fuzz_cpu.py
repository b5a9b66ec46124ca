"""A few of ``make fuzz``'s calls, and that its guard pages guard."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_kernels.attention import native

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="guard pages are POSIX's"),
    pytest.mark.skipif(bool(native.load().problems), reason="no native library"),
]


def python(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_some_calls():
    run = python("-m", "tests.fuzz.fuzz_cpu", "--calls", "60", "--seed", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    for operation in ("tar", "frames", "columns"):
        assert f"60 calls of {operation}, no failure" in run.stdout


TOUCH = """
import ctypes, os, signal, torch
from tests.fuzz.guarded import Guarded
for flush_end, offset, alive in (True, 37, True), (True, 38, False), (False, 0, True), (
    False, -1, False
):
    child = os.fork()
    if child == 0:
        x = Guarded(5000).tensor((3, 5), (7, 1), torch.bfloat16, flush_end)
        assert x.isnan().all()
        ctypes.memset(x.data_ptr() + offset, 0, 1)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in ([0] if alive else [-signal.SIGSEGV, -signal.SIGBUS]), (offset, ended)
"""


def test_a_byte_outside_crashes():
    run = python("-c", TOUCH)
    assert run.returncode == 0, run.stderr


def test_a_byte_beside_is_seen():
    import ctypes

    import torch

    from tests.fuzz.guarded import Guarded

    guarded = Guarded(5000)
    for flush_end in (True, False):
        x = guarded.tensor((3, 5), (7, 1), torch.float32, flush_end)
        assert guarded.holds(x)
        assert guarded.untouched()
        ctypes.memset(x.data_ptr() + (-1 if flush_end else 19 * 4), 0, 1)
        assert not guarded.untouched()
