"""Blocks of keys and values that the tensor memory accelerator (TMA) fetches, from sm_90 on.

One thread asks for a whole block, by a descriptor that the host has made: no thread computes an
address or keeps a pointer, and what lies past the last frame, or past the end of a head in its last
part, arrives as zeros. Triton has descriptors as arguments of their own only, not in tuples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vstar_kernels.attention.triton.launches import VECTOR_BYTES, Launch
from vstar_kernels.attention.triton.plan import PlanKey, Strides
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
        block = x.main.load([place.batch, place.space, place.head, n * SIZE, 0])
        main = block.reshape(SIZE, HEAD.MAIN)
        rest = main
        if HEAD.REST:
            block = x.rest.load([place.batch, place.space, place.head, n * SIZE, HEAD.MAIN])
            rest = block.reshape(SIZE, HEAD.REST)
    return main, rest


@dataclass(frozen=True, kw_only=True)
class DescribedLaunch(Launch):
    """A launch whose kernel takes descriptors in place of the first of its other arguments."""

    # For tensors by name, all that the descriptors of their two parts are but the tensor.
    parts: dict[str, tuple[dict[str, Any] | None, ...]]
    pointers: Launch  # the same by pointers, for tensors that are not aligned to 16 bytes

    def _launch(self, tensors: tuple[Any, ...]) -> None:
        for place, _ in self._described:
            if tensors[place].data_ptr() % VECTOR_BYTES:
                self.pointers._launch(tensors)
                return
        super()._launch(tensors)

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


def possible(key: PlanKey) -> bool:
    """Tells whether descriptors can say where a call's keys and values lie, if they are aligned.

    They take strides of multiples of 16 bytes, and none of 0, as expanded tensors have. TF32's
    matrix instructions take values transposed only, by way of the registers.
    """
    if key.device.architecture not in ARCHITECTURES or key.kind != "16-bit":
        return False
    strides = [
        stride * key.dtype.itemsize
        for of_tensor in (key.key, key.value)
        for stride, size in zip(of_tensor[:-1], key.shape[:-1], strict=True)
        if size > 1
    ]
    return all(0 < x <= LARGEST_STRIDE and x % VECTOR_BYTES == 0 for x in strides)


def described(pointers: Launch, launch: Launch, key: PlanKey, **tensors: Strides) -> Launch:
    """Returns a launch with descriptors of tensors of query's shape, of which it has the strides.

    They come in place of its first arguments, two for each tensor: None, as ``pointers`` has them.
    """
    main, rest = launch.constants["HEAD"].MAIN, launch.constants["HEAD"].REST
    parts = {
        name: tuple(
            _part(key, strides, launch.constants["KEYS"], width) if width else None
            for width in (main, rest)
        )
        for name, strides in tensors.items()
    }
    same = {x.name: getattr(launch, x.name) for x in fields(launch) if x.init}
    return DescribedLaunch(**same, parts=parts, pointers=pointers)


def _part(key: PlanKey, strides: Strides, frames: int, width: int) -> dict[str, Any]:
    """Returns what is the same of every call's descriptor of blocks of ``frames`` frames.

    Dimensions are (batch, space, heads, frames, head_dim), so that a block is one of the last two.
    """
    batch, space, frames_in_all, heads, head_dim = key.shape_5d
    if len(key.shape) == 4:
        strides = (strides[0], 0, *strides[1:])
    # Of a single element, any stride that is a multiple of 16 bytes does.
    any_stride = VECTOR_BYTES // key.dtype.itemsize
    found = [x if size > 1 else any_stride for x, size in zip(strides, key.shape_5d, strict=True)]
    made = TensorDescriptor(
        torch.empty(0, dtype=key.dtype, device="cpu"),
        [batch, space, heads, frames_in_all, head_dim],
        [found[0], found[1], found[3], found[2], 1],
        [1, 1, 1, frames, width],
    )
    return vars(made)


def _descriptor(tensor: Tensor, part: dict[str, Any]) -> TensorDescriptor:
    """Returns the descriptor of a part of a tensor, whose checks the plan has made."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**part, "base": tensor}
    return made
