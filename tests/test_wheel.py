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


@pytest.mark.parametrize(
    ("versions", "tag", "message"),
    [
        (["GLIBC_2.27", "GLIBCXX_3.4.24"], "manylinux_2_27_x86_64.manylinux_2_28_x86_64", None),
        (
            ["GLIBC_2.28"],
            "manylinux_2_27_x86_64.manylinux_2_28_x86_64",
            "needs glibc 2.28, and its",
        ),
        (["GLIBC_2.29"], "manylinux_2_31_aarch64", "needs GLIBC_2.29, and torch GLIBC_2.28"),
        (
            ["GLIBCXX_3.4.29"],
            "manylinux_2_34_x86_64",
            "needs GLIBCXX_3.4.29, and torch GLIBCXX_3.4.2",
        ),
        (
            ["GLIBC_2.17"],
            "manylinux_2_34_x86_64",
            "torch runs on glibc 2.28, its tag is py3-none-many",
        ),
        ([], "linux_x86_64", "did auditwheel repair it?"),
    ],
)
def test_systems_that_torch_runs_on(versions, tag, message):
    imports = check_wheel.Imports(frozenset(), frozenset(versions))
    try:
        check_wheel.check_systems(imports)
        check_wheel.check_tag(f"py3-none-{tag}", imports)
        found = None
    except check_wheel.WheelError as error:
        found = str(error)
    assert (found is None) == (message is None)
    assert message is None or message in found


def test_what_an_installed_wheel_runs():
    found = run_python('import sys; sys.prefix = "/"\n' + check_wheel.IMPORT + check_wheel.USE)
    assert found.returncode == 0, found.stderr
    assert ": computes with " in found.stdout
