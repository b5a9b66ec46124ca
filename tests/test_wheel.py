"""What `make wheel` checks, of the library that the tests run with: it needs no wheel to fail."""

import sys

import pytest

import vstar_kernels as vk
from tests.helpers import run_python
from vstar_kernels.attention import native

check_wheel = pytest.importorskip("tools.check_wheel", reason="not a source checkout")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="wheels with the library are Linux's"),
    pytest.mark.skipif(bool(native.load().problems), reason="no native library"),
]


def test_the_library_is_one_that_a_wheel_may_hold():
    imports = check_wheel.check_library(vk.backends.native_library())
    assert check_wheel.check_known(imports.torch)


def test_what_an_installed_wheel_runs():
    found = run_python('import sys; sys.prefix = "/"\n' + check_wheel.IMPORT + check_wheel.USE)
    assert found.returncode == 0, found.stderr
    assert ": computes with " in found.stdout
