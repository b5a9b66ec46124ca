"""Time and peak memory, measured from outside of what computes attention."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def now(device: torch.device) -> float:
    """Returns seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedLayer(Protocol):
    """A layer whose attention is measured."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def module(self) -> Any:
        """Its module, with ``to_q``, ``to_k``, ``to_v`` and ``to_out``."""


class CoreTimer:
    """Measures the seconds in each attention module outside its projections, in a ``with`` block.

    It watches the modules by hooks, so it measures any processor in the same way.
    """

    def __init__(self, layers: Iterable[TimedLayer], device: torch.device) -> None:
        self._layers = list(layers)
        self._device = device
        self._handles: list[Any] = []
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> CoreTimer:
        for layer in self._layers:
            attn = layer.module
            self._watch(attn, layer.name, +1)
            for projection in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
                self._watch(projection, layer.name, -1)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call, by the name of the layer."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _watch(self, module: torch.nn.Module, name: str, sign: int) -> None:
        """Adds the module's time to that of ``name``, or with ``sign`` -1 takes it off."""

        def count(direction: int) -> None:
            elapsed = direction * sign * now(self._device)
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

        self._handles += [
            module.register_forward_pre_hook(lambda *_: count(-1)),
            module.register_forward_hook(lambda *_: count(+1)),
        ]


def reset_peak_memory(device: torch.device) -> bool:
    """Starts a new peak at what is in use now; returns whether that can be done here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    # psutil reads a process's memory, but resets its peak on no system.
    if not CLEAR_REFS.exists():
        return False
    # glibc keeps what others have freed, which would count to whoever comes next.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def read_peak_memory(device: torch.device) -> int:
    """Returns the bytes at the peak since a reset, of the GPU's allocator or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024  # from kB
