"""Builds the C++ kernels through CMake; everything else is in pyproject.toml.

``VSTAR_KERNELS_NATIVE`` decides what happens where they cannot be built (no torch to build
against, no compiler): ``auto``, the default, installs without them; ``require`` fails; ``off`` does
not try. What happened is written to ``vstar_kernels/lib/build.json``, which ``python -m
vstar_kernels info`` shows. ``VSTAR_KERNELS_BUILD`` names a folder that keeps what was compiled, for
the next build and for the kernels' own tests.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libvstar_kernels" + (".dylib" if sys.platform == "darwin" else ".so")
MODE = os.environ.get("VSTAR_KERNELS_NATIVE", "auto")
MODES = ("auto", "require", "off")
BUILD_FOLDER = os.environ.get("VSTAR_KERNELS_BUILD")


class CannotBuildError(Exception):
    """There will be no native library, for the reason that this says."""


# pip keeps the wheel that it built of an archive, and what is installed already.
AGAIN = "then this package again, with pip's --no-cache-dir --force-reinstall --no-deps"
# Of this repository's wheel for every platform, too, whose users may have what it takes.
WITHOUT = (
    "built without them, by VSTAR_KERNELS_NATIVE=off: pip install --force-reinstall --no-deps "
    "--no-binary vstar-kernels vstar-kernels compiles them"
)
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
OLDEST_TORCH = (2, 11)


def find_torch() -> Path:
    """Returns the folder of the torch to build against, found without importing it.

    pip builds in an environment of its own, which hides torch, but with the Python of the
    environment that it installs into. That one finds its torch once it does without pip's
    ``PYTHONPATH``.
    """
    spec = importlib.util.find_spec("torch")
    outside = [sys.executable, "-E", "-c", FIND_TORCH]
    origin = spec.origin if spec else subprocess.check_output(outside, cwd=sys.prefix, text=True)
    if not (origin or "").strip():
        raise CannotBuildError(
            f"torch was not there to build against: install torch first, {AGAIN} (tools other than "
            "pip hide torch unless they are told --no-build-isolation)"
        )
    torch = Path(origin.strip()).parent
    version = re.search(r"__version__ = '((\d+)\.(\d+).*)'", (torch / "version.py").read_text())
    if version and tuple(map(int, version.groups()[1:])) < OLDEST_TORCH:
        raise CannotBuildError(
            f"the kernels need torch {'.'.join(map(str, OLDEST_TORCH))} or later to build against, "
            f"and {version[1]} is there: upgrade torch first, {AGAIN}"
        )
    return torch


# pip installs cmake and ninja beside its own Python, which need not be on the PATH.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def run(*command: object) -> None:
    """Runs a build command; its output is shown, and tells the reason if it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PATH": PATH},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(result.stdout, flush=True)
    if result.returncode:
        raise CannotBuildError(reason_of(result.stdout))


def reason_of(output: str) -> str:
    """Returns one line for what a failed CMake run printed."""
    if "CMAKE_MAKE_PROGRAM is not set" in output:
        return f"cmake found neither ninja nor make: pip install ninja, {AGAIN}"
    if "CMAKE_CXX_COMPILER" in output:
        return f"cmake found no working C++ compiler: install GCC or Clang, {AGAIN}"
    # CMake says where in a line of its own, and then what.
    lines = re.sub(r"(CMake Error at .*:)\s+", r"\1 ", output).splitlines()
    lines = [line.strip() for line in lines if re.search(r"\berror\b", line, re.I)]
    return f"the C++ build failed: {lines[0] if lines else 'see its output'}"


def build_library(build: Path) -> Path:
    """Compiles the library under ``build`` and returns its path."""
    torch = find_torch()
    cmake = shutil.which("cmake", path=PATH)
    if cmake is None:
        raise CannotBuildError(f"cmake was not found: pip install cmake ninja, {AGAIN}")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    build.mkdir(parents=True, exist_ok=True)
    # What an earlier build found: a ninja that went with pip's environment, another compiler.
    for found in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")):
        found.unlink(missing_ok=True)
    run(cmake, "-S", ROOT, "-B", build, *generator, f"-DTORCH_DIR={torch}", "-DVSTAR_TESTS=OFF")
    run(cmake, "--build", build, "--parallel")
    return build / LIBRARY


class BuildNative(build_ext):
    """Builds, with CMake, one library that no Python version is tied to."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib)
        target = package / "vstar_kernels" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        (target / LIBRARY).unlink(missing_ok=True)
        try:
            if MODE == "off":
                raise CannotBuildError(WITHOUT)
            folder = BUILD_FOLDER or Path(self.build_temp) / "vstar_kernels"
            library = build_library(Path(folder).resolve())
            shutil.copy2(library, target / LIBRARY)
            record = {"built": True, "reason": "built from source"}
        except CannotBuildError as error:
            if MODE == "require":
                raise SystemExit(f"VSTAR_KERNELS_NATIVE=require, but {error}") from None
            print(f"vstar_kernels: installing without the CPU kernels: {error}", file=sys.stderr)
            record = {"built": False, "reason": str(error)}
        (target / "build.json").write_text(json.dumps(record, indent=2) + "\n")
        self.built = record["built"]
        self.files = [str(path) for path in target.iterdir()]

    def get_outputs(self) -> list[str]:
        """Returns the installed files."""
        return getattr(self, "files", [])

    def get_output_mapping(self) -> dict[str, str]:
        """Returns nothing: an editable install has no build beside the source tree to map back."""
        return {}


class Wheel(bdist_wheel):
    """A wheel for any Python 3: tied to the platform if it holds the library, else to nothing."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns (python, abi, platform)."""
        built = getattr(self.get_finalized_command("build_ext"), "built", False)
        return "py3", "none", super().get_tag()[2] if built else "any"


if MODE not in MODES:
    raise SystemExit(f"VSTAR_KERNELS_NATIVE must be one of {', '.join(MODES)}, got {MODE!r}")

setup(
    # Named so that setuptools knows of a native part; CMake has the sources.
    ext_modules=[Extension("vstar_kernels.lib.vstar_kernels", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
