"""The machine that figures are measured on, who else used it meanwhile, the memory of a call."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import vstar_kernels as vk
from vstar_kernels.attention import native
from vstar_kernels.cli.measure import read_peak_memory, reset_peak_memory

ROOT = Path(__file__).parents[1]
PACKAGES = ("triton", "diffusers", "xformers", "flash-attn")
FACTS = ("torch", "torch cpu capability", "vstar_kernels", "python", "platform")
NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# Two runs with other values of these are not one run, and differ in more than the kernels.
IDENTITY = ("device", "cpu", "isa", "torch", "python", *PACKAGES)
PR_SET_PDEATHSIG = 1  # of prctl: the signal that comes when the parent has ended
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user's too


def environment(device: str, threads: int) -> dict[str, Any]:
    """Returns the device as found, and the versions of what runs on it."""
    info = vk.info()
    facts = {
        "device": info["gpu" if device == "cuda" else "processor"],
        "cpu": info["processor"],
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": native.load().isa,
        "commit": commit(),
    }
    facts |= {name: info[name] for name in FACTS} | {name: _version(name) for name in PACKAGES}
    return facts | (_gpu() if device == "cuda" else _clocks())


def commit() -> str:
    """Returns the checkout's commit, and whether files differ from it.

    Where git cannot tell, as in a copy of the files, it is what ``COMMIT`` of the environment says.
    """
    try:
        found = _output("git", "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("COMMIT", "unknown")
    return f"{found} with changes" if changed else found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns in what two environments differ, of what decides about speed."""
    values = ((name, one.get(name), other.get(name)) for name in IDENTITY)
    return [f"{name}: {x} and {y}" for name, x, y in values if x != y]


class Watch:
    """Tells how much of the processor other processes took since the watch was made.

    Two threads that wait for each other at every call take many times as long when a third process
    wants a core, and no median undoes that.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float | None:
        """Returns the share of all cores' time that others took; None if no time has passed."""
        busy, ours, now = (x - y for x, y in zip(self._read(), self._start, strict=True))
        return max(0.0, (busy - ours) / (now * psutil.cpu_count())) if now else None

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Returns seconds: of all processes on all cores, of this process, on the clock."""
        times = psutil.cpu_times()._asdict()
        busy = sum(seconds for kind, seconds in times.items() if kind not in NOT_BUSY)
        return busy, time.process_time(), time.monotonic()


def end_with_parent() -> None:
    """Has the system end this process when the one that began it has ended; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_bytes(device: str) -> int:
    """Returns the memory that a call may still take."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def peak_bytes(device: str, call: Callable[[], object]) -> int | None:
    """Returns the peak of a warm call beyond its inputs and results; None if nothing tells it."""
    where = torch.device(device)
    if where.type == "cpu":  # whose process's memory counts, garbage too
        gc.collect()
    if not reset_peak_memory(where):
        return None
    on_gpu = where.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    results = sum(x.nbytes for x in tree_leaves(call()) if isinstance(x, Tensor))
    return max(0, read_peak_memory(where) - before - results)


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
    clock = psutil.cpu_freq()
    return {
        "clock": f"{clock.current if clock else 'unknown'} MHz as found",
        "governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else "unknown",
        "load at the start": psutil.getloadavg()[0],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    return subprocess.check_output(
        command, cwd=ROOT, text=True, timeout=30, stderr=subprocess.PIPE
    ).strip()
