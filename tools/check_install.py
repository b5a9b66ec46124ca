"""Runs the README's install lines in a virtual environment as Python makes it.

torch is installed once. Then the lines run with the setuptools that Python and torch bring, with
the 65.5 of Python 3.11's virtual environments, with none and with the newest; each time the C++
kernels must be there and compute. Without pip's build isolation, old setuptools and none must fail
with the command that the README gives, and the README's lines must then work. A source archive,
which must be complete, and an editable install follow, and an install without a compiler.

    python tools/check_install.py [--python PYTHON]...
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = ("as it is", "65.5.0", "none", "newest")
ONLY_IN_CHECKOUT = "."  # as what continuous integration and editors read begins

# Runs away from the source tree: what is imported is what was installed.
USE = """
import torch, vstar_kernels as vk
q, k, v = torch.randn(3, 2, 21, 3, 40).unbind()
out = vk.tar_attention(q, k, v, vk.GaussianBias(1.0), backend="cpu")
exact = vk.tar_attention(q, k, v, vk.GaussianBias(1.0), backend="reference")
torch.testing.assert_close(out, exact)
"""


def readme_lines() -> tuple[list[str], list[str]]:
    """Returns the lines of the README's "Install": for any environment, and without isolation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Install\n")[1].split("\n## ")[0]
    usual, alone = re.findall(r"(?:^    .+\n)+", section, re.MULTILINE)
    return [line.strip() for line in usual.splitlines()], [x.strip() for x in alone.splitlines()]


def files() -> list[str]:
    """Returns the names of what git knows or would add: no build of an earlier time."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def copy_checkout(target: Path) -> None:
    """Copies :func:`files`."""
    for name in files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def missing(archive: Path) -> list[str]:
    """Returns what a source archive lacks of the checkout, but for what is of use only there."""
    with tarfile.open(archive) as opened:
        there = {name.partition("/")[2] for name in opened.getnames()}
    return [name for name in files() if name not in there and not name.startswith(ONLY_IN_CHECKOUT)]


class Environment:
    """A new virtual environment and a copy of the checkout, in a folder of their own."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        copy_checkout(self.checkout)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VSTAR")) and name not in ("CC", "CXX")
        }
        self.variables |= {
            "PATH": os.pathsep.join([str(folder / "venv/bin"), os.environ["PATH"]]),
            "VIRTUAL_ENV": str(folder / "venv"),
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        }

    def run(self, line: str, *, fails: bool = False, **variables: str) -> str:
        """Runs a line of the README or of this file, as a shell does; returns what it printed."""
        print(f"  $ {line}", flush=True)
        result = subprocess.run(
            line,
            shell=True,  # nosec B602
            cwd=self.checkout,
            env={**self.variables, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if (result.returncode != 0) != fails:
            sys.exit(f"{result.stdout}\n{line!r} ended with {result.returncode}")
        return result.stdout

    def use(self) -> None:
        """Computes with the installed kernels, and uninstalls them."""
        python = self.folder / "venv/bin/python"
        command = [python, "-W", "ignore", "-c", USE]
        if subprocess.run(command, cwd=self.folder, env=self.variables).returncode:
            subprocess.run([python, "-m", "vstar_kernels", "info"], cwd=self.folder)
            sys.exit("the installed package did not compute with its C++ kernels")
        self.uninstall()

    def uninstall(self) -> None:
        """Leaves an environment without the package."""
        self.run("pip uninstall --quiet --yes vstar-kernels")

    def put_setuptools(self, version: str) -> None:
        """Makes it the environment's setuptools: ``none``, ``newest`` or a version."""
        print(f"setuptools: {version}", flush=True)
        if version == "none":
            self.run("pip uninstall --quiet --yes setuptools")
        elif version == "newest":
            self.run("pip install --quiet --upgrade setuptools")
        elif version != "as it is":
            self.run(f"pip install --quiet setuptools=={version}")


def check(python: str, folder: Path) -> None:
    """Makes every install with one Python."""
    usual, alone = readme_lines()
    tools, install_alone = alone
    there = Environment(python, folder)
    for version in SETUPTOOLS:
        there.put_setuptools(version)
        if version in ("65.5.0", "none"):
            said = there.run(install_alone, fails=True)
            if tools.replace('"', "'") not in said:
                sys.exit(f"{said}\nsetuptools {version}: it does not say {tools}")
        for line in usual:
            there.run(line)
        there.use()
        if version in ("65.5.0", "none"):
            for line in alone:
                there.run(line)
            there.use()
            there.run("pip uninstall --quiet --yes cmake ninja")

    print("an archive, and an editable install")
    there.run("pip install --quiet build && python -m build --sdist --outdir archive")
    (archive,) = (there.checkout / "archive").glob("*.tar.gz")
    if lacking := missing(archive):
        sys.exit(f"the source archive lacks {', '.join(lacking)}")
    there.run("pip install archive/*.tar.gz")
    there.use()
    there.run("pip install --editable .")
    there.use()

    print("without a compiler")
    there.run("pip install .", CXX="/nonexistent/c++")
    # Away from the checkout, whose editable install left a library in it.
    if "cmake found no working C++ compiler" not in there.run("cd .. && vstar-kernels info"):
        sys.exit("info does not say that there was no compiler")
    there.uninstall()
    required = {"VSTAR_KERNELS_NATIVE": "require", "CXX": "/nonexistent/c++"}
    if "require, but cmake found" not in there.run("pip install .", fails=True, **required):
        sys.exit("a required library is missing, and pip does not say why")


def main() -> None:
    """Checks each Python in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="a Python to do it with (default: this)")
    for python in parser.parse_args().python or [sys.executable]:
        print(subprocess.check_output([python, "--version"], text=True).strip(), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            check(python, Path(folder))
    print("the README's lines install the package")


if __name__ == "__main__":
    main()
