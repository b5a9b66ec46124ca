"""What figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import vstar_kernels as vk
from vstar_kernels.attention import native

ROOT = Path(__file__).parents[1]
PACKAGES = ("triton", "diffusers", "xformers", "flash-attn")
NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# Two runs with other values of these are not one run, and differ in more than the kernels.
IDENTITY = ("device", "cpu", "isa", "torch", "python", *PACKAGES)


def environment(device: str, threads: int) -> dict[str, Any]:
    """The device as found, and the versions of what runs on it."""
    facts = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": native.load().isa,
        "torch": str(torch.__version__),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "vstar_kernels": vk.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    return facts | (_gpu() if device == "cuda" else _clocks())


def device_name(device: str) -> str:
    """Of the GPU or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's model."""
    return _cpuinfo("model name", platform.processor() or platform.machine())


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    try:
        found = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{found} with changes" if changed else found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two environments differ, of what decides about speed."""
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in IDENTITY
        if one.get(name) != other.get(name)
    ]


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2 cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "clocks and driver": _nvidia_smi(),
    }


def _nvidia_smi() -> dict[str, str] | str:
    try:
        line = _output("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return dict(zip(NVIDIA_SMI.split(","), line.splitlines()[0].split(", "), strict=True))


def _clocks() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "clock": f"{_cpuinfo('cpu MHz', 'unknown')} MHz as found",
        "governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else "unknown",
        "load at the start": load,
    }


def _cpuinfo(field: str, otherwise: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(field)), otherwise)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return run.stdout.strip()
