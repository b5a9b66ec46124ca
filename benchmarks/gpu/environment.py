"""What a GPU's figures were measured on."""

from __future__ import annotations

import platform
import subprocess

import torch
import triton

import vstar_kernels as vk

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def environment() -> dict[str, object]:
    """The GPU as found, and the versions of what runs on it."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "nvidia_smi": _nvidia_smi(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "vstar_kernels": vk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _nvidia_smi() -> dict[str, str] | str:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    values = run.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=True))
