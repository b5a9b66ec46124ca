"""What is installed and what can run: ``vk.info()`` and ``python -m vstar_kernels info``.

It needs nothing but torch, so that it can say what else is missing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vstar_kernels._version import __version__
from vstar_kernels.attention import native
from vstar_kernels.attention.dispatch import available
from vstar_kernels.cli.output import whole_output

OPTIONAL_PACKAGES = ("triton", "diffusers", "transformers", "xformers")


@dataclass(frozen=True)
class Info:
    """Versions, the native library, and what can run here."""

    def run(self) -> int:
        """Prints :func:`info`; returns the exit status 0."""
        facts = info()
        width = max(map(len, facts))
        with whole_output():
            for name, fact in facts.items():
                print(f"{name:<{width}}  {fact}")
        return 0


def info() -> dict[str, str]:
    """Returns versions, the processor, the native library and each backend's state, by name.

    It never raises: of what cannot be found out, it says why.
    """
    library = native.load()
    facts = {
        "vstar_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
    }
    facts |= {name: _told(_version, name) for name in OPTIONAL_PACKAGES}
    facts |= {
        "gpu": _told(_gpu),
        "processor": _told(_processor),
        "memory": _told(_memory),
        "threads": str(torch.get_num_threads()),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "native library": "; ".join(library.problems) or str(library.path),
        "cpu instruction set": f"{library.isa} (executable here: {', '.join(library.isas) or '-'})",
    }
    for name, reasons in available().items():
        facts[f"backend {name}"] = "available" if not reasons else "; ".join(reasons)
    return facts


def _told(find: Callable[..., str], *arguments: str) -> str:
    """Returns what is found, or why it is not: what says what is wrong must not fail of it."""
    try:
        return find(*arguments)
    except Exception as error:  # whatever a damaged installation raises
        return f"unknown: {type(error).__name__}: {error}"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _processor() -> str:
    try:
        import cpuinfo
    except ImportError:
        return "unknown: py-cpuinfo is not installed"
    found = cpuinfo.get_cpu_info()  # raises for architectures that it does not know
    return found.get("brand_raw") or platform.machine()


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown: psutil is not installed"
    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
