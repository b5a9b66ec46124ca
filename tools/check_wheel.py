"""Checks that a wheel serves every Python and torch that it promises: ``check_wheel.py WHEEL``.

- It holds the package and nothing else, and its tag is no lower than the glibc it needs.
- Its library needs nothing but torch's C functions in ``torch_symbols.txt`` and the system's
  libraries, exports only what is called of it, and knows no path of the machine that built it.
- Installed in a new virtual environment, it computes.

One without the library, of tag ``py3-none-any``, computes by the reference and says why.

``--python`` installs it for another Python, with that one's torch. ``--torch-lib`` looks torch's
functions up in a ``libtorch_cpu.so``, for a torch that cannot be imported here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
SYMBOLS = Path(__file__).with_name("torch_symbols.txt")
LIBRARY = "vstar_kernels/lib/libvstar_kernels.so"
TORCH = "libtorch_cpu.so"
# What torch's own wheels need of a system, manylinux_2_28.
OLDEST_SYSTEM = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
ANY = "py3-none-any"  # the tag of a wheel without the library
SYSTEM = re.compile(r"(libc|libm|libpthread|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so\.\d+")
# What native.py does not call: a program without Python, and who wants to know what that one gets.
WITHOUT_PYTHON = {"vstar_kernels_define_operators", "vstar_kernels_schema"}
# Left over from every compiler's start-up files; nobody provides them and nobody minds.
WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}

# Where nothing but the wheel's package and torch can be imported.
IMPORT = """
import sys, torch
import vstar_kernels as vk
from vstar_kernels.attention import native

assert vk.__file__.startswith(sys.prefix), f"imported {vk.__file__}, not the wheel"
version = f"Python {'.'.join(map(str, sys.version_info[:3]))}, torch {torch.__version__}"
"""
USE = """
library = native.load()
assert not library.problems, library.problems
for isa in library.isas:
    library.select_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = torch.randn(3, 2, 21, 3, 40).to(dtype).unbind()
        bias = vk.GaussianBias(1.0)
        out = vk.tar_attention(q, k, v, bias, backend="cpu")
        exact = vk.tar_attention(q.double(), k.double(), v.double(), bias, backend="reference")
        error = (out - exact).abs().max().item()
        assert error < 1e-5 + 4 * torch.finfo(dtype).eps, f"{isa}, {dtype}: error {error}"
# An exception on its way from the library's C++ through torch's into Python.
try:
    torch.ops.vstar_kernels.cpu_forward(
        q, None, q, k.double(), v, None, None, 0, 0.0, 0, False, 1.0, 1, False
    )
except RuntimeError as error:
    assert "key must have query's type" in str(error), error
else:
    raise AssertionError("the operator took a key of another type")
print(f"{version}: computes with {', '.join(library.isas)}")
"""
USE_WITHOUT_LIBRARY = """
(problem,) = native.load().problems
assert "VSTAR_KERNELS_NATIVE=off" in problem, problem
q, k, v = torch.randn(3, 2, 21, 3, 40).unbind()
out = vk.tar_attention(q, k, v, vk.GaussianBias(1.0))
exact = vk.tar_attention(q.double(), k.double(), v.double(), vk.GaussianBias(1.0))
assert (out - exact).abs().max().item() < 1e-5
print(f"{version}: computes by the reference: {problem}")
"""


class WheelError(Exception):
    """Something is wrong with the wheel; the message says what."""


@dataclass(frozen=True)
class Imports:
    """What the library asks of others: torch's functions, and versions such as ``GLIBC_2.14``."""

    torch: frozenset[str]
    versions: frozenset[str]

    def newest(self, name: str) -> tuple[int, ...]:
        """Returns the newest version of ``GLIBC``, ``GLIBCXX`` or ``CXXABI`` that is needed."""
        found = [v.removeprefix(name + "_") for v in self.versions if v.startswith(name + "_")]
        return max((tuple(map(int, v.split("."))) for v in found), default=(0,))


def check_files(wheel: zipfile.ZipFile, version: str, *, library: bool) -> None:
    """Checks that the wheel holds the package, its metadata, the library or none, nothing else."""
    names = [name for name in wheel.namelist() if not name.endswith("/")]
    if twice := {name for name in names if names.count(name) > 1}:
        raise WheelError(f"it holds {some(twice)} twice")
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("vstar_kernels/**/*.py")}
    templates = {str(path.relative_to(ROOT)) for path in ROOT.glob("vstar_kernels/**/*.html")}
    wanted = sources | templates | {"vstar_kernels/py.typed"} | ({LIBRARY} if library else set())
    if not library and LIBRARY in names:
        raise WheelError("it holds the library, and its tag is that of every platform")
    if missing := wanted - set(names):
        raise WheelError(f"it lacks {some(missing)}")
    tables = {str(path.relative_to(ROOT)) for path in ROOT.glob("vstar_kernels/**/configs*.json")}
    allowed = wanted | tables | {"vstar_kernels/lib/build.json"}
    metadata = f"vstar_kernels-{version}.dist-info/"
    if extra := {name for name in names if not name.startswith(metadata)} - allowed:
        raise WheelError(f"it holds more than the package, or what is no longer: {some(extra)}")


def check_tag(tag: str, imports: Imports) -> None:
    """Checks the tag, ``py3-none-manylinux_2_N_ARCH``, and that no newer glibc is needed."""
    found = re.findall(r"\bmanylinux_(\d+)_(\d+)_", tag)
    if not (tag.startswith("py3-none-") and found):
        raise WheelError(f"its tag is {tag}, not py3-none-manylinux_…: did auditwheel repair it?")
    promised = min(tuple(map(int, version)) for version in found)
    if promised > OLDEST_SYSTEM["GLIBC"]:
        raise WheelError(f"torch runs on glibc {dotted(OLDEST_SYSTEM['GLIBC'])}, its tag is {tag}")
    if imports.newest("GLIBC") > promised:
        raise WheelError(f"it needs glibc {dotted(imports.newest('GLIBC'))}, and its tag is {tag}")


def some(names: Iterable[str]) -> str:
    """Returns the first few of ``names``."""
    first, *rest = sorted(names)
    return ", ".join([first, *rest[:4]]) + (f" and {len(rest) - 4} more" if len(rest) > 4 else "")


def dotted(version: tuple[int, ...]) -> str:
    """Returns the version as one writes it: 2.28."""
    return ".".join(map(str, version))


def check_library(path: Path) -> Imports:
    """Checks what the library needs and what it offers; returns the former."""
    source = (ROOT / "vstar_kernels/attention/native.py").read_text()
    called = set(re.findall(r"\bhandle(?:\.|, \")(vstar_kernels_\w+)", source)) | WITHOUT_PYTHON
    if paths := re.findall(rb"\0(/[\w.+~/ -]+\.(?:h|hpp|cpp|cc))\0", path.read_bytes()):
        first = paths[0].decode()
        raise WheelError(f"the library names files of the build machine, such as {first}")
    with path.open("rb") as file:
        elf = ELFFile(file)
        dynamic = list(elf.get_section_by_name(".dynamic").iter_tags())
        if any(tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH") for tag in dynamic):
            raise WheelError("the library has an RPATH, and torch lies elsewhere on each machine")
        needed = {tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"}
        if strangers := {name for name in needed - {TORCH} if not SYSTEM.fullmatch(name)}:
            raise WheelError(f"the library needs {some(strangers)}")

        # The version of each symbol, such as GLIBC_2.14; those without one are torch's.
        required = elf.get_section_by_name(".gnu.version_r")
        versions = {
            need["vna_other"]: need.name for _, needs in required.iter_versions() for need in needs
        }
        versioned = elf.get_section_by_name(".gnu.version")
        torch, system, exports = set(), set(), set()
        for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            version = versions.get(versioned.get_symbol(index)["ndx"])
            if not symbol.name or symbol.name in WEAK:
                continue
            if symbol["st_shndx"] != "SHN_UNDEF":
                exports.add(symbol.name)
            elif version is None:
                torch.add(symbol.name)
            else:
                system.add(version)
    if exports != called:
        odd = some(exports ^ called)
        raise WheelError(f"the library must export what is called of it and no more, not {odd}")
    return Imports(frozenset(torch), frozenset(system))


def check_systems(imports: Imports) -> None:
    """Checks that the library runs on every system that torch's own wheels run on."""
    for name, there in OLDEST_SYSTEM.items():
        if (newest := imports.newest(name)) > there:
            raise WheelError(f"it needs {name}_{dotted(newest)}, and torch {name}_{dotted(there)}")


def check_known(torch: frozenset[str]) -> list[str]:
    """Checks that torch's functions were verified; returns the versions they are in."""
    lines = SYMBOLS.read_text().splitlines()
    known = {line for line in lines if line and not line.startswith("#")}
    if new := torch - known:
        raise WheelError(
            f"{SYMBOLS.name} does not list {some(new)}: look them up in torch 2.11 and "
            "later with --torch-lib, and --record them"
        )
    return [line.removeprefix("# torch ") for line in lines if line.startswith("# torch ")]


def check_torch(torch: frozenset[str], library: Path) -> str:
    """Looks torch's functions up in a ``libtorch_cpu.so``; returns the torch's version."""
    with library.open("rb") as file:
        defined = ELFFile(file).get_section_by_name(".gnu.hash")
        if missing := [name for name in torch if defined.get_symbol(name) is None]:
            raise WheelError(f"{library} lacks {some(missing)}")
    version = library.parents[1] / "version.py"
    if not version.exists():
        return f"at {library}"
    return re.search(r"^__version__ = '(.+)'", version.read_text(), re.M)[1]


def record(torch: frozenset[str], versions: list[str]) -> None:
    """Writes the list anew; only what all of ``versions`` were seen to provide belongs in it."""
    head = [
        "# The functions of libtorch_cpu.so that the CPU kernels' library calls, found in each of",
        *(f"# torch {version}" for version in versions),
        "# by tools/check_wheel.py --record.",
    ]
    SYMBOLS.write_text("\n".join([*head, *sorted(torch)]) + "\n")


def check_use(wheel: Path, python: str, program: str, *, tests: bool) -> None:
    """Installs the wheel beside ``python``'s torch, away from the source, and runs a program."""
    if (found := shutil.which(python)) is None:
        raise WheelError(f"there is no Python at {python} to use it with")
    python = os.path.abspath(found)
    find = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    torch = subprocess.run([python, "-c", find], capture_output=True, text=True)
    if torch.returncode:
        raise WheelError(f"{python} has no torch to use it with")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VSTAR"))}

        def run(*command: object) -> None:
            words = [str(word) for word in command]
            if subprocess.run(words, cwd=root, env=environment).returncode:
                raise WheelError(f"it does not work with {python}: see above")

        run(python, "-m", "venv", root / "venv")
        new = root / "venv" / "bin" / "python"
        run(new, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        # The torch that is there, after the wheel's package: no second copy, and a source tree
        # installed beside it stays hidden, since only a site folder's own .pth files are read.
        site = next(root.glob("venv/lib/python*/site-packages"))
        (site / "torch.pth").write_text(f"{Path(torch.stdout.strip()).parent}\n")
        run(new, "-W", "ignore", "-c", IMPORT + program)
        if tests:
            shutil.copytree(ROOT / "tests", root / "tests")
            run(new, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/attention/test_cpu.py")


def main() -> int:
    """Checks one wheel; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", help="a Python with torch (default: this)")
    parser.add_argument(
        "--torch-lib",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a libtorch_cpu.so",
    )
    parser.add_argument("--tests", action="store_true", help="run the CPU kernels' tests as well")
    parser.add_argument(
        "--record", action="store_true", help=f"write {SYMBOLS.name} from --torch-lib"
    )
    args = parser.parse_args()
    if args.record and not args.torch_lib:
        parser.error("--record needs a --torch-lib to look the functions up in")
    try:
        check(args)
    except (WheelError, OSError, zipfile.BadZipFile, ELFError) as error:
        print(f"{args.wheel.name}: {error}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    """Makes all checks, in the order of what they cost."""
    match = re.fullmatch(r"vstar_kernels-([^-]+)-([^-]+-[^-]+-[^-]+)\.whl", args.wheel.name)
    if match is None:
        raise WheelError("its name is not vstar_kernels-VERSION-TAG.whl")
    version, tag = match.groups()
    pythons = args.python or [sys.executable]
    if tag == ANY:
        with zipfile.ZipFile(args.wheel) as wheel:
            check_files(wheel, version, library=False)
        for python in pythons:
            check_use(args.wheel.resolve(), python, USE_WITHOUT_LIBRARY, tests=False)
        return
    with zipfile.ZipFile(args.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        check_files(wheel, version, library=True)
        imports = check_library(Path(wheel.extract(LIBRARY, folder)))
    check_systems(imports)
    check_tag(tag, imports)
    newest = {name: dotted(imports.newest(name)) for name in ("GLIBC", "GLIBCXX", "CXXABI")}
    print(f"{args.wheel.name}: needs", ", ".join(f"{k}_{v}" for k, v in newest.items()))

    seen = [check_torch(imports.torch, library) for library in args.torch_lib]
    if args.record:
        record(imports.torch, seen)
    known = check_known(imports.torch)
    versions = ", ".join(dict.fromkeys([*known, *seen]))
    print(f"its {len(imports.torch)} imports from torch are in torch {versions}")
    for python in pythons:
        check_use(args.wheel.resolve(), python, USE, tests=args.tests)


if __name__ == "__main__":
    sys.exit(main())
