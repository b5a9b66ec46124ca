"""What is installed and what can run: ``vk.info()`` and ``python -m vstar_kernels info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from vstar_kernels._version import __version__
from vstar_kernels.attention import native
from vstar_kernels.attention.dispatch import available

OPTIONAL_PACKAGES = ("triton", "diffusers", "transformers", "xformers")


def info() -> dict[str, str]:
    """Versions, the processor, the native library and each backend's state, by name."""
    library = native.load()
    facts = {
        "vstar_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
    }
    facts |= {name: _version(name) for name in OPTIONAL_PACKAGES}
    facts |= {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "native library": "; ".join(library.problems) or str(library.path),
        "cpu instruction set": f"{library.isa} (executable here: {', '.join(library.isas) or '-'})",
    }
    for name, reasons in available().items():
        facts[f"backend {name}"] = "available" if not reasons else "; ".join(reasons)
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
