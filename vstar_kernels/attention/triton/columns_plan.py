"""What the kernels of :mod:`columns_forward` and :mod:`columns_backward` are planned from."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.triton import configs, devices, launches, plan
from vstar_kernels.attention.triton.configs import ColumnsConfig
from vstar_kernels.attention.triton.devices import Device
from vstar_kernels.attention.triton.plan import Head, Strides

if TYPE_CHECKING:
    from vstar_kernels.attention.columns.call import ColumnCall

SMALLEST_SCALE = 1e-30  # negligible, and −∞ times it is −∞
# Of tables of tiles: up to so many keys, a program has all weights of its rows at a time.
TILE_KEYS = (80, 128)
PROGRAMS_PER_PROCESSOR = 2  # with fewer than so many, programs share out the heads, or the rows


class ColumnsKey(NamedTuple):
    """All that the plan of a call depends on, by which it is found again."""

    device: Device
    dtype: torch.dtype
    ieee: bool  # float32 products in float32, not in TF32
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    columns: int  # K
    scale: float
    query: Strides  # of (batch, queries or keys, heads), in elements, like all that follow
    key: Strides
    weights: Strides  # of the columns: (batch, keys, columns)
    value: Strides = ()  # where there is one and what follows from it is wanted
    out: Strides = ()
    has_map: bool = True  # the maps are wanted, or backward, have a gradient
    save: bool = False  # the rows' log-sum-exps, for the backward pass
    # Backward only:
    grad_out: Strides = ()
    grad_query: Strides = ()
    wants_keys: bool = False  # dK or dV

    @property
    def kind(self) -> str:
        """How products are computed, one of ``configs.KINDS``."""
        return plan.product_kind(self.dtype, ieee=self.ieee)

    @property
    def key_parts(self) -> tuple[int, int]:
        """The two parts of a tile's keys, powers of two, as a head has two; the second may be 0."""
        return configs.split(self.keys)

    @property
    def map_weight(self) -> float:
        """1 / H, the weight of one head's map."""
        return 1.0 / self.heads

    @property
    def exp2_scale(self) -> float:
        """|scale| · log₂e, which turns the product qᵀk into a logarithm to base 2."""
        return max(abs(self.scale), SMALLEST_SCALE) * plan.LOG2E

    def config(self, kernel: str) -> ColumnsConfig:
        """Returns the configuration of "forward", "grad_query" or "grad_key".

        Its ``keys`` are 0 where it is of a tile: if one holds all keys, and there is one.
        """
        tables = [f"{kernel}_{size}" for size in TILE_KEYS if size >= self.keys][:1]
        tables.append(f"{kernel}_stream")
        if kernel == "grad_key":
            tables = [kernel]
        architecture, kind = self.device.architecture, self.kind
        found = (configs.columns(architecture, kind, self.head_dim, table) for table in tables)
        return next(filter(None, found))

    def head(self) -> Head:
        """Returns the constants of the heads, and of how tensors of them are read."""
        import triton.language as tl

        main, rest = configs.split(self.head_dim)
        offset = tl.int64 if self._largest_offset() > plan.INT32_MAX else tl.int32
        return Head(
            HEAD_DIM=self.head_dim,
            MAIN=main,
            REST=rest,
            UNIT=self._unit(),
            OFFSET=offset,
            EVEN=self.keys == sum(self.key_parts),
            NEGATIVE=self.scale < 0,
            PRECISION="tf32" if self.kind == "tf32" else "ieee",
            FRAME_OFFSET=offset,
        )

    def in_units(self, *tensors: Strides) -> tuple[int, ...]:
        """Returns the strides of tensors one after the other in units, as kernels take them."""
        unit = self._unit()
        return tuple(stride // unit for strides in tensors for stride in strides or (0, 0, 0))

    def shares(self, programs: int, most: int) -> tuple[int, int]:
        """Returns how many programs share out ``most`` things, and how many each has.

        Only where there are too few ``programs`` for the device does more than one.
        """
        wanted = -(-self.device.processors * PROGRAMS_PER_PROCESSOR // programs)
        each = -(-most // min(max(wanted, 1), most))
        return -(-most // each), each

    def _of_queries(self) -> tuple[Strides, ...]:
        return (self.query, self.out, self.grad_out, self.grad_query)

    def _of_keys(self) -> tuple[Strides, ...]:
        return (self.key, self.value)

    def _unit(self) -> int:
        """Returns the largest number of a vector's elements that divides every stride."""
        longest = launches.VECTOR_BYTES // self.dtype.itemsize
        every = itertools.chain(*self._of_queries(), *self._of_keys())
        return math.gcd(longest, *every)

    def _largest_offset(self) -> int:
        """Returns the offset of the last head of the tensor that reaches furthest, and beyond."""
        reaches = [
            sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
            for sizes, tensors in (
                ((self.batch, self.queries, self.heads), self._of_queries()),
                ((self.batch, self.keys, self.heads), self._of_keys()),
                ((self.batch, self.keys, self.columns), (self.weights,)),
            )
            for strides in tensors
        ]
        return max(reaches) + self.head_dim


def forward_key(
    call: ColumnCall, out: Tensor | None, *, maps: bool = True, save: bool = False
) -> ColumnsKey:
    """Returns the key of a forward pass; ``out`` is None where only maps or sums are wanted."""
    return ColumnsKey(
        device=devices.device_of(call.device),
        dtype=call.dtype,
        ieee=plan.ieee_products(call.dtype),
        batch=call.batch,
        queries=call.queries,
        keys=call.keys,
        heads=call.heads,
        head_dim=call.head_dim,
        columns=call.columns_count,
        scale=call.options.scale,
        query=strides(call.query),
        key=strides(call.key),
        weights=strides(call.columns),
        value=() if out is None else strides(call.value),
        out=strides(out),
        has_map=maps,
        save=save,
    )


def backward_key(
    call: ColumnCall,
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    grad_query: Tensor,
    *,
    wants_keys: bool,
) -> ColumnsKey:
    """Returns the key of a backward pass; ``wants_keys``: dK or dV is wanted, too."""
    return forward_key(call, None, maps=grad_map is not None)._replace(
        value=() if grad_out is None else strides(call.value),
        grad_out=strides(grad_out),
        grad_query=strides(grad_query),
        wants_keys=wants_keys,
    )


def strides(tensor: Tensor | None) -> Strides:
    """Returns strides of the first three dimensions; 0 for sizes of 1, where any would do."""
    return () if tensor is None else plan.strides_3d(tensor)
