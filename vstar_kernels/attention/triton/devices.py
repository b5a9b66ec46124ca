"""What matters of a GPU, and the tables that stay on it between calls."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Of the CPU's tensors that stay on a device: the most there are, and how large each may be.
KEPT_TENSORS = 64
KEPT_BYTES = 2**20


class Device(NamedTuple):
    """What matters of a GPU: ``shared`` bytes of memory for one program, ``processors``."""

    architecture: str
    shared: int
    processors: int

    @property
    def is_nvidia(self) -> bool:
        """Whether it is one of NVIDIA's GPUs; the others are AMD's."""
        return self.architecture.startswith("sm_")


class Contents(NamedTuple):
    """A tensor by its contents, so that it is the key of what is made of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor | None) -> Contents | None:
        """Returns the contents of a contiguous CPU tensor."""
        if tensor is None:
            return None
        data = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return cls(tuple(tensor.shape), tensor.dtype, data)

    def tensor(self) -> Tensor:
        """Returns the tensor again."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Returns what matters of a device."""
    if device.type != "cuda":  # interpreted, or only planned: any architecture's configuration does
        return Device("sm_80", shared=sys.maxsize, processors=1)
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index)
    return Device(
        _architecture(device), properties["max_shared_mem"], properties["multiprocessor_count"]
    )


def _architecture(device: torch.device) -> str:
    """Returns the one of ``configs.ARCHITECTURES`` whose configurations suit a GPU."""
    if torch.version.hip:
        return "gfx942"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation in (9, 10):
        return f"sm_{generation}0"
    return "sm_80"  # 12.x, consumer Blackwell, has the memory and the matrix instructions of 8.x


@dataclass(frozen=True, eq=False)
class DeviceTables:
    """Tables that a plan keeps on a device, for as long as anything there may read them.

    Plans are forgotten while other streams than the tables' own have yet to run kernels that read
    them, whose memory would be given away at once; and graphs read them whenever they are replayed.
    """

    tensors: dict[str, Tensor]
    streams: set[int] = field(default_factory=set)  # that are known to the tables' memory

    def to(self, device: torch.device) -> DeviceTables:
        """Returns the tables on a device."""
        return DeviceTables({name: x.to(device) for name, x in self.tensors.items()})

    def in_use(self) -> dict[str, Tensor]:
        """Returns the tables by name, for a kernel that is launched on the current stream."""
        if self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                CAPTURED.add(self)
            stream = torch.cuda.current_stream(self._device)
            if stream.cuda_stream not in self.streams:
                for tensor in self.tensors.values():
                    tensor.record_stream(stream)
                self.streams.add(stream.cuda_stream)
        return self.tensors

    @functools.cached_property
    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


CAPTURED = set[DeviceTables]()  # by graphs, which do not say when they are gone


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; one of the CPU's that is small stays there for later calls.

    It is found again by its contents: copying it would make the CPU wait, and fail while a graph is
    captured.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > KEPT_BYTES:
        return tensor.to(device)
    contents = Contents.of(tensor.contiguous())
    assert contents is not None  # as there is a tensor
    return _kept_on(device, contents).in_use()["kept"]


@functools.lru_cache(maxsize=KEPT_TENSORS)
def _kept_on(device: torch.device, contents: Contents) -> DeviceTables:
    return DeviceTables({"kept": contents.tensor()}).to(device)
