"""The memory that a call takes beyond what it is given and what it returns."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.cli.demo.measure import STATUS, read_bytes, read_peak_memory, reset_peak_memory


def peak_bytes(device: str, call: Callable[[], object]) -> int | None:
    """Bytes at the peak of a warm call, without its results; None where it cannot be measured."""
    gc.collect()
    where = torch.device(device)
    if not reset_peak_memory(where):
        return None
    before = _in_use(device)
    results = call()
    return max(0, read_peak_memory(where) - before - sum(x.nbytes for x in _tensors(results)))


def _in_use(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return read_bytes(STATUS, "VmRSS")


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, (tuple, list)):
        return [x for part in results for x in _tensors(part)]
    return []
