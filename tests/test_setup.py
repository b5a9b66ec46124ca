"""The build, and what it says where something is missing; `make test-install` installs for real."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")
AGAIN = "then this package again, with pip's --no-cache-dir --force-reinstall --no-deps"


def build(folder, before="", **environment):
    """Run setup.py's build of the library in a process of its own, after the line ``before``."""
    code = f"import runpy, shutil, subprocess, sys\n{before}\n"
    code += "runpy.run_path('setup.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, "-q", "build_ext", "-b", folder / "lib", "-t", folder],
        cwd=ROOT,
        env={**os.environ, "VSTAR_KERNELS_NATIVE": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def record(folder):
    path = folder / "lib/vstar_kernels/lib/build.json"
    return json.loads(path.read_text()) if path.exists() else None


NO_COMPILER = f"cmake found no working C++ compiler: install GCC or Clang, {AGAIN}"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("auto", f"installing without the CPU kernels: {NO_COMPILER}"),
        (
            "off",
            "installing without the CPU kernels: built without them, by VSTAR_KERNELS_NATIVE=off",
        ),
        ("require", f"VSTAR_KERNELS_NATIVE=require, but {NO_COMPILER}"),
        ("maybe", "VSTAR_KERNELS_NATIVE must be one of auto, require, off, got 'maybe'"),
    ],
)
def test_without_a_compiler(tmp_path, mode, message):
    run = build(tmp_path, VSTAR_KERNELS_NATIVE=mode, CXX="/nonexistent/c++")
    assert message in run.stderr
    assert (run.returncode == 0) == (record(tmp_path) is not None) == (mode in ("auto", "off"))


def fake_torch(folder, version):
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return str(folder)


HIDE_TORCH = "import importlib.util as u; u.find_spec = lambda name: None"


def test_a_torch_that_is_too_old_or_damaged_is_named(tmp_path):
    """Whose headers lack what the kernels need, or are not there."""
    old = fake_torch(tmp_path, "2.9.1+cpu")
    assert build(tmp_path, PYTHONPATH=old).returncode == 0
    reason = "the kernels need torch 2.11 or later to build against, and 2.9.1+cpu is there: "
    assert record(tmp_path)["reason"] == f"{reason}upgrade torch first, {AGAIN}"
    (tmp_path / "torch/version.py").write_text("__version__ = '2.13.0'\n")
    build(tmp_path, PYTHONPATH=old)
    assert "TORCH_DIR is not the folder of torch 2.11 or later" in record(tmp_path)["reason"]


def test_what_an_earlier_build_found_is_looked_for_again(tmp_path):
    """In the same folder: a compiler that is gone, or pip's ninja of that time."""
    damaged = fake_torch(tmp_path, "2.13.0")
    build(tmp_path, PYTHONPATH=damaged)
    (cache,) = tmp_path.rglob("CMakeCache.txt")
    text = re.sub(r"(CMAKE_MAKE_PROGRAM.*=).*", r"\1/gone/ninja", cache.read_text())
    cache.write_text(text)
    build(tmp_path, PYTHONPATH=damaged)
    assert "TORCH_DIR is not" in record(tmp_path)["reason"]
    build(tmp_path, PYTHONPATH=damaged, CXX="/nonexistent/c++")
    assert record(tmp_path)["reason"] == NO_COMPILER


def test_torch_is_found_from_pips_own_environment(tmp_path):
    """Whose PYTHONPATH hides it from the process, and not from the Python that is asked without."""
    run = build(tmp_path, HIDE_TORCH, CXX="/nonexistent/c++")
    assert record(tmp_path)["reason"] == NO_COMPILER, run.stderr


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (
            f"{HIDE_TORCH}; subprocess.check_output = lambda *a, **k: '\\n'",
            f"torch was not there to build against: install torch first, {AGAIN} (tools other than "
            "pip hide torch unless they are told --no-build-isolation)",
        ),
        (
            "shutil.which = lambda *a, **k: None",
            f"cmake was not found: pip install cmake ninja, {AGAIN}",
        ),
    ],
)
def test_what_is_missing_has_a_cure(tmp_path, before, reason):
    run = build(tmp_path, before)
    assert run.returncode == 0, run.stderr
    assert record(tmp_path) == {"built": False, "reason": reason}


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("__version__ = '65.5.0'", "65.5.0"),
        (None, "none"),
        ("import pkgutil; pkgutil.ImpImporter_", "one that this Python cannot import"),
        ("import distutils_", "one that this Python cannot import"),
    ],
)
def test_old_setuptools_are_one_line_with_the_command(tmp_path, source, there):
    """They come with Python 3.11's virtual environments; 3.12's have none, and 65 breaks there."""
    code = "import sys; sys.path.insert(0, 'tools')\n"
    if source is None:
        code += "sys.modules['setuptools'] = None\n"
    else:
        (tmp_path / "setuptools.py").write_text(source)
        code += f"sys.path.insert(0, {str(tmp_path)!r})\n"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}import build_backend"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == (
        f"vstar_kernels is built by setuptools 77 or later, and there is {there}: "
        "pip install 'setuptools>=77' cmake ninja\n"
    )


def test_the_backend_is_setuptools_own():
    code = (
        "import sys; sys.path.insert(0, 'tools')\nimport build_backend, setuptools.build_meta as m"
    )
    code += "\nassert all(getattr(build_backend, n) is getattr(m, n) for n in m.__all__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_command_names_what_the_project_asks_for():
    """One minimum, in pyproject.toml, the backend and the README."""
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    (wanted,) = re.findall(r"setuptools>=(\d+)", requires)
    backend = (ROOT / "tools/build_backend.py").read_text()
    assert f"NEEDED = {wanted} " in backend
    assert f'pip install "setuptools>={wanted}" cmake ninja' in (ROOT / "README.md").read_text()


def test_the_oldest_that_is_promised_is_tested():
    """But for what builds, and Ray, which `make test` leaves out."""
    project = (ROOT / "pyproject.toml").read_text().split("[project]")[1]
    promised = set(re.findall(r'"([a-z]+)(?:\[\w+\])?>=([\d.]+)"', project))
    pins = re.search(r"^OLDEST = (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    tested = dict(pin.split("==") for pin in pins.split())
    assert {name for name, _ in promised} == tested.keys() | {"ray"}
    for name, version in promised - {("ray", "2.50")}:
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", tested[name]), name
