"""Tensors between two pages that no one may touch, so that a load or store outside them crashes."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_MARGIN = 512  # bytes on a tensor's open side that are watched


class Guarded:
    """One block of memory between two inaccessible pages (POSIX), for one tensor at a time."""

    def __init__(self, capacity: int) -> None:
        page = mmap.PAGESIZE
        self._begin = page
        self._end = page + -(-capacity // page) * page
        self._map = mmap.mmap(-1, self._end + page)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._margin = self._bytes[:0]
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for guard in (0, self._end):
            if mprotect(self._bytes.data_ptr() + guard, page, 0) != 0:  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def tensor(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, flush_end: bool
    ) -> Tensor:
        """A tensor of NaN that ends at the second guard page, or begins after the first.

        Integers are the largest instead. The bytes on its open side are NaN of any type as well.
        """
        count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        size = count * dtype.itemsize
        if size > self._end - self._begin:
            raise ValueError(f"{size} bytes asked for, room for {self._end - self._begin}")
        start = self._end - size if flush_end else self._begin
        low, high = max(self._begin, start - _MARGIN), min(self._end, start + size + _MARGIN)
        self._bytes[low:high] = 0xFF
        self._margin = self._bytes[low:start] if flush_end else self._bytes[start + size : high]
        storage = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        storage.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
        return storage.as_strided(shape, strides)

    def copy(self, x: Tensor, flush_end: bool) -> Tensor:
        """``x``, contiguous in this memory."""
        strides = torch.empty(x.shape, device="meta").stride()
        return self.tensor(tuple(x.shape), strides, x.dtype, flush_end).copy_(x)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` lies in this memory."""
        offset = x.data_ptr() - self._bytes.data_ptr()
        return self._begin <= offset < self._end

    def untouched(self) -> bool:
        """Whether the bytes beside the tensor are as they were."""
        return bool((self._margin == 0xFF).all())
