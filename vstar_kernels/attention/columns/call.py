"""One call of :func:`vstar_kernels.column_attention`, checked once, as every backend sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.bias import check_finite, check_strided
from vstar_kernels.attention.call import DTYPES, autocast, autocasts


class ColumnOptions(NamedTuple):
    """All of a call but its tensors, hashable, in the order in which the operator takes them."""

    scale: float
    wants_out: bool  # False where there is no value: only the maps are computed


@dataclass(slots=True)
class ColumnCall:
    """The tensors and options of one call.

    With the columns' weights G, and the weights P of each head h::

        P_h = softmax(scale · Q_h K_hᵀ)        out_h = P_h V_h        maps = 1/H · Σ_h P_h G
    """

    query: Tensor  # (batch, N, heads, head_dim)
    key: Tensor  # (batch, T, heads, head_dim)
    value: Tensor | None  # as key
    columns: Tensor  # G, (batch, T, K) float32; of stride 0 over the batch where all of it shares G
    options: ColumnOptions

    @property
    def dtype(self) -> torch.dtype:
        """The type of query, key and value."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.query.device

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.query.shape[0]

    @property
    def queries(self) -> int:
        """N, the number of queries."""
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        """T, the number of keys."""
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.query.shape[3]

    @property
    def columns_count(self) -> int:
        """K, the number of columns."""
        return self.columns.shape[2]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""
        return (
            self.query.requires_grad
            or self.key.requires_grad
            or (self.value is not None and self.value.requires_grad)
            or self.columns.requires_grad
        )

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """The shape of the returned maps, ``(batch, N, K)``."""
        return self.batch, self.queries, self.columns_count

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that there are, by their names in messages."""
        named = {x: getattr(self, x) for x in ("query", "key", "value", "columns")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def describe(self) -> str:
        """Returns a line for each tensor, for messages."""
        return "\n".join(
            f"{name}: {tuple(t.shape)}, strides {t.stride()}, {t.dtype}, {t.device}"
            for name, t in self.tensors().items()
        )


class ColumnWanted(NamedTuple):
    """The gradients that are wanted; those of others are not computed."""

    query: bool
    key: bool
    value: bool
    columns: bool


class ColumnGradients(NamedTuple):
    """The gradients of a call's tensors, each of its tensor's shape and type; None: not wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    columns: Tensor | None = None


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> ColumnCall:
    """Returns the call that checked arguments of :func:`vstar_kernels.column_attention` describe.

    Raises:
        ValueError: An argument is bad.
        TypeError: An argument is of the wrong kind.
    """
    for name, tensor in (("query", query), ("key", key), ("columns", columns)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_strided(tensor, name)
    if value is not None:
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a torch.Tensor or None, got {type(value).__name__}")
        check_strided(value, "value")
    if autocasts(query):
        query, key = autocast(query), autocast(key)
        value = None if value is None else autocast(value)
    _check_shapes(query, key, value)
    _check_columns(columns, query, key)
    if scale is not None:
        check_finite(scale, "scale")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    columns = columns.expand(query.shape[0], -1, -1)
    return ColumnCall(query, key, value, columns, ColumnOptions(scale, value is not None))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    dtype, device = query.dtype, query.device
    if query.ndim != 4:
        raise ValueError(
            f"query must be (batch, queries, heads, head_dim), got shape {tuple(query.shape)}"
        )
    if dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(f"query must be of a floating-point type, {allowed}, got {dtype}")
    batch, _, heads, head_dim = query.shape
    if heads == 0 or head_dim == 0:
        raise ValueError(
            f"query must have at least one head and one element of it, got {tuple(query.shape)}"
        )
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"key must be (batch, keys, heads, head_dim) with query's batch {batch}, heads {heads} "
            f"and head_dim {head_dim}, got shape {tuple(key.shape)}"
        )
    if key.shape[1] == 0:
        raise ValueError(f"key must have at least one key, got shape {tuple(key.shape)}")
    if value is not None and value.shape != key.shape:
        raise ValueError(
            f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have query's type {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")


def _check_columns(columns: Tensor, query: Tensor, key: Tensor) -> None:
    (batch, keys), shape = key.shape[:2], tuple(columns.shape)
    if shape[:-1] not in ((keys,), (batch, keys)):
        raise ValueError(
            f"columns must be (keys, columns) or (batch, keys, columns) with key's {keys} keys and "
            f"batch {batch}, got shape {shape}"
        )
    if shape[-1] == 0:
        raise ValueError(f"columns must have at least one column, got shape {shape}")
    if columns.dtype != torch.float32:
        raise ValueError(f"columns must be torch.float32, got {columns.dtype}")
    if columns.device != query.device:
        raise ValueError(f"columns must be on query's device {query.device}, got {columns.device}")
