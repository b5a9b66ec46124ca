"""Blocks of keys and values that the tensor memory accelerator (TMA) fetches, from sm_90 on.

One thread asks for a whole block, by a descriptor that the host has made: no thread computes an
address or keeps a pointer, and what lies before the first frame or past the last, or past the end
of a head in its last part, arrives as zeros. Triton has descriptors as arguments of their own only,
not in tuples. Frames here are whatever attends to each other, of ``frame_attention`` tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vstar_kernels.attention.triton.devices import Device
from vstar_kernels.attention.triton.launches import VECTOR_BYTES, Launch
from vstar_kernels.attention.triton.plan import Strides
from vstar_kernels.attention.triton.primitives import frame_offsets, load_heads

ARCHITECTURES = ("sm_90", "sm_100")
LARGEST_STRIDE = 2**40 - 1  # bytes


class Frames(NamedTuple):
    """The frames of one sequence, for :func:`load_block`. A kernel makes the tuple."""

    p: Any  # of the first frame
    strides: Any
    main: Any  # descriptor of the heads' main part, or None: by pointers
    rest: Any


@triton.jit
def load_block(x, place, n, frames, HEAD: tl.constexpr, SIZE: tl.constexpr):
    """Loads the heads of frames n · SIZE …, ``(SIZE, D)`` in two parts, zero past the last frame.

    ``x`` are the :class:`Frames` of the sequence at ``place``.
    """
    if x.main is None:
        j = n * SIZE + tl.arange(0, SIZE)
        main, rest = load_heads(x.p, frame_offsets(x.strides, j, HEAD), j < frames, HEAD)
    else:
        main, rest = load_described(x.main, x.rest, place, n * SIZE, HEAD, SIZE)
    return main, rest


@triton.jit
def load_described(main, rest, place, start, HEAD: tl.constexpr, SIZE: tl.constexpr):
    """Loads the heads of frames ``start`` …, ``(SIZE, D)`` in two parts, zero where there are none.

    ``main`` and ``rest`` are descriptors, as :func:`described` makes them.
    """
    block = main.load([place.batch, place.space, place.head, start, 0])
    b_main = block.reshape(SIZE, HEAD.MAIN)
    b_rest = b_main
    if HEAD.REST:
        block = rest.load([place.batch, place.space, place.head, start, HEAD.MAIN])
        b_rest = block.reshape(SIZE, HEAD.REST)
    return b_main, b_rest


@dataclass(frozen=True, kw_only=True)
class DescribedLaunch(Launch):
    """A launch whose kernel takes descriptors in place of the first of its other arguments.

    It is for tensors that are :func:`aligned`.
    """

    # For tensors by name, all that the descriptors of their two parts are but the tensor.
    parts: dict[str, tuple[dict[str, Any] | None, ...]]

    def _of_tensors(self, tensors: Any) -> tuple[Any, ...]:
        made = [
            part and _descriptor(tensors[place], part)
            for place, parts in self._described
            for part in parts
        ]
        return (tensors, *made)

    @functools.cached_property
    def _described(self) -> list[tuple[int, tuple[dict[str, Any] | None, ...]]]:
        """The parts with their tensor's place."""
        places = {name: place for place, name in enumerate(self.needed._fields)}
        return [(places[name], parts) for name, parts in self.parts.items()]


def has_descriptors(architecture: str, kind: str) -> bool:
    """Tells whether blocks may come by descriptors on an architecture, for a kind of products.

    TF32's matrix instructions take values transposed only, by way of the registers.
    """
    return architecture in ARCHITECTURES and kind == "16-bit"


def possible(device: Device, kind: str, sizes: Iterable[int], *tensors: Strides) -> bool:
    """Tells whether descriptors can say where tensors of 16 bits lie, if they are aligned.

    ``sizes`` and strides are of all dimensions but head_dim. Descriptors take strides of multiples
    of 16 bytes, and none of 0, as expanded tensors have.
    """
    if not has_descriptors(device.architecture, kind):
        return False
    strides = [
        2 * stride
        for of_tensor in tensors
        for stride, size in zip(of_tensor, sizes, strict=True)
        if size > 1
    ]
    return all(0 < x <= LARGEST_STRIDE and x % VECTOR_BYTES == 0 for x in strides)


def aligned(*tensors: Tensor) -> bool:
    """Tells whether tensors begin where descriptors may say that they do."""
    return not any(x.data_ptr() % VECTOR_BYTES for x in tensors)


def described(
    launch: Launch, dtype: torch.dtype, sizes: tuple[int, ...], **tensors: Strides
) -> DescribedLaunch:
    """Returns a launch with descriptors of tensors, of which it has the strides.

    They come in place of its first arguments, two for each tensor, which by pointers are None.
    ``sizes`` are (batch, space, heads, frames, head_dim), and strides those of the first four.
    """
    head, frames = launch.constants["HEAD"], launch.constants["KEYS"]
    parts = {
        name: tuple(
            _part(dtype, sizes, strides, frames, width) if width else None
            for width in (head.MAIN, head.REST)
        )
        for name, strides in tensors.items()
    }
    same = {x.name: getattr(launch, x.name) for x in fields(launch) if x.init}
    return DescribedLaunch(**same, parts=parts)


def _part(
    dtype: torch.dtype, sizes: tuple[int, ...], strides: Strides, frames: int, width: int
) -> dict[str, Any]:
    """Returns what is the same of every call's descriptor of blocks of ``frames`` frames."""
    # Of a single element, any stride that is a multiple of 16 bytes does.
    any_stride = VECTOR_BYTES // dtype.itemsize
    made = TensorDescriptor(
        torch.empty(0, dtype=dtype, device="cpu"),
        list(sizes),
        [x if n > 1 else any_stride for x, n in zip(strides, sizes[:-1], strict=True)] + [1],
        [1, 1, 1, frames, width],
    )
    return vars(made)


def _descriptor(tensor: Tensor, part: dict[str, Any]) -> TensorDescriptor:
    """Returns the descriptor of a part of a tensor, whose checks the plan has made."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**part, "base": tensor}
    return made
