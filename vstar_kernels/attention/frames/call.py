"""One call of :func:`vstar_kernels.frame_attention`, checked once, as every backend sees it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.bias import check_finite, check_flag, check_strided
from vstar_kernels.attention.call import autocast, autocasts, check_stat
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.attention.frames.tables import Tables

NO_RULE = FrameRule()


class FrameOptions(NamedTuple):
    """All of a call but its tensors, hashable, in the order in which the operator takes them."""

    stat: str  # "none", "row_max", "frame_max" or "tensor"; "none" wherever delta is None
    clamp_negative: bool
    scale: float
    mean_map: str  # "none", "mean" over the heads, or "heads": one for each
    frames: int  # F_q, the number of frames of queries
    key_frames: int  # F_k


@dataclass(slots=True)
class FrameCall:
    """The tensors and options of one call.

    With φ = scale · qᵢ·kⱼ of a query in frame f and a key in frame g, the p-th tokens of their
    frames, the logits are::

        s′ = a · φ + r · delta[f, g] + offset[f, g]

    a is ``factor[0, f, g]`` where φ > 0 and ``factor[1, f, g]`` elsewhere, and 1 where pⱼ − pᵢ is
    outside ``factor_span``. Keys are visible below ``key_lengths`` where offset is not −inf and
    pⱼ − pᵢ is in ``band``. The statistic r is of a · φ over the visible keys of the video: its
    maximum; the largest of lse_g − log P_g over key frames, P_g their visible keys; 1; or
    ``stat``. Where there is none it is 0. Text, as a query or a key, has s′ = φ and is never
    masked by the tables. A row without a visible key gives 0.

    The tables are float32 or int32, contiguous and on the CPU, ``(F_q, F_k)`` or ``(heads, F_q,
    F_k)`` each, and None where they change nothing.
    """

    query: Tensor  # (batch, S, heads, head_dim)
    key: Tensor  # (batch, S_k, key_heads, head_dim): head h reads key head h // (heads / key_heads)
    value: Tensor  # as key
    key_lengths: Tensor | None  # (batch,) int32, contiguous; kernels clamp it to 0 … S_k
    stat: Tensor | None  # (batch, S, heads) float32, a statistic that the caller gave
    query_runs: Tensor  # (R, 4) int32, CPU: start, end, frame (−1: text), index of its first token
    key_runs: Tensor  # (R_k, 4); both in order, without holes, over all tokens
    delta: Tensor | None  # [heads,] F_q, F_k: strength · b₁, what the statistic is weighted by
    offset: Tensor | None  # [heads,] F_q, F_k: b₂ + log m, −inf where a frame of keys is masked
    factor: Tensor | None  # 2, [heads,] F_q, F_k: of positive logits, and of the others
    factor_span: Tensor | None  # 2, F_q, F_k int32: lo ≤ pⱼ − pᵢ ≤ hi; ±terms.UNBOUNDED: no bound
    band: Tensor | None  # 2, F_q, F_k int32: likewise, of the keys that are visible
    options: FrameOptions

    def __post_init__(self) -> None:
        # Here, where every way to a backend passes: a fold of vmap has strides of 0.
        if self.key_lengths is not None:
            self.key_lengths = self.key_lengths.contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """The type of query, key and value."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of query, key and value."""
        return self.query.device

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.query.shape[0]

    @property
    def tokens(self) -> int:
        """S, the number of queries."""
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        """S_k, the number of keys."""
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        """H, the number of heads of the queries."""
        return self.query.shape[2]

    @property
    def key_heads(self) -> int:
        """H_kv, the number of heads of keys and values, which divides H."""
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.query.shape[3]

    @property
    def frames(self) -> int:
        """F_q, the number of frames of the queries."""
        return self.options.frames

    @property
    def key_frames(self) -> int:
        """F_k, the number of frames of the keys."""
        return self.options.key_frames

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""
        return (
            self.query.requires_grad
            or self.key.requires_grad
            or self.value.requires_grad
            or (self.stat is not None and self.stat.requires_grad)
            or (self.delta is not None and self.delta.requires_grad)
            or (self.offset is not None and self.offset.requires_grad)
        )

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The shape of the returned map; of one with a map for each head where that is asked."""
        shape = (self.frames, self.key_frames + 1)
        per_head = self.options.mean_map == "heads"
        return (self.batch, self.heads, *shape) if per_head else (self.batch, *shape)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that there are, by their names in messages."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def describe(self) -> str:
        """Returns a line for each tensor and one for the options, for messages."""
        lines = [
            f"{name}: {tuple(t.shape)}, strides {t.stride()}, {t.dtype}, {t.device}"
            for name, t in self.tensors().items()
        ]
        options = self.options
        return "\n".join(
            [
                *lines,
                f"frames: {self.frames} of queries, {self.key_frames} of keys",
                f"stat: {options.stat}, clamp_negative: {options.clamp_negative}, "
                f"map: {options.mean_map}",
            ]
        )


# The tensors of a call, in the order in which the operator takes them.
TENSORS = (
    "query", "key", "value", "key_lengths", "stat", "query_runs", "key_runs",
    "delta", "offset", "factor", "factor_span", "band",
)  # fmt: skip


class FrameWanted(NamedTuple):
    """The gradients that are wanted besides those of query, key and value."""

    delta: bool
    offset: bool
    stat: bool


class FrameGradients(NamedTuple):
    """The gradients of a call's tensors, each of its tensor's shape and type; None: not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    delta: Tensor | None = None
    offset: Tensor | None = None
    stat: Tensor | None = None


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
) -> FrameCall:
    """Returns the call that checked arguments of :func:`vstar_kernels.frame_attention` describe.

    Raises:
        ValueError: An argument is bad.
        TypeError: An argument is of the wrong kind.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_strided(tensor, name)
    if autocasts(query):
        query, key, value = autocast(query), autocast(key), autocast(value)
    _check_shapes(query, key, value)
    if scale is not None:
        check_finite(scale, "scale")
    key_layout = _check_layouts(query, key, layout, key_layout)
    if key_lengths is not None:
        _check_lengths(key_lengths, query)
    if rule is None:
        rule = NO_RULE
    elif not isinstance(rule, FrameRule):
        raise TypeError(f"rule must be a FrameRule or None, got {type(rule).__name__}")
    if torch.compiler.is_compiling():
        query_runs, key_runs, *fixed = _traced_constants(id(rule), id(layout), id(key_layout))
    else:
        query_runs, key_runs, *fixed = _constants(rule, layout, key_layout)
    tables = rule.with_trained(Tables(*fixed), layout, key_layout)
    if query.is_meta and torch.is_grad_enabled():
        for table in (tables.delta, tables.offset):
            if table is not None and table.requires_grad:
                raise ValueError(
                    "query is on the meta device, where the table of FrameRule.bias, which "
                    "requires a gradient, has none"
                )
    for name, table, dims in (("bias", tables.delta, 2), ("bias", tables.offset, 2)):
        if table is not None and table.ndim > dims and table.shape[0] != query.shape[2]:
            raise ValueError(
                f"the table of FrameRule.{name} has {table.shape[0]} heads, query has "
                f"{query.shape[2]}"
            )
    stat, stat_name = None, rule.stat
    if tables.delta is None:
        stat_name = "none"
    elif isinstance(stat_name, Tensor):
        stat, stat_name = stat_name, "tensor"
        check_stat(stat, query)
    options = FrameOptions(
        stat_name if isinstance(stat_name, str) else "tensor",
        rule.clamp_negative and stat_name != "none",
        1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        _map_name(return_map, map_heads),
        layout.frames,
        key_layout.frames,
    )
    return FrameCall(
        query,
        key,
        value,
        key_lengths,
        stat,
        query_runs,
        key_runs,
        *tables,
        options,
    )


T = Tensor | None
# A tuple, because torch.compile tells tensors of several calls apart only within one.
_Constants = tuple[Tensor, Tensor, T, T, T, T, T]


def _constants(rule: FrameRule, layout: Layout, key_layout: Layout) -> _Constants:
    """Returns the runs of both layouts and the rule's fixed tables: constants of a graph."""
    if not (hasattr(rule, "terms") and hasattr(layout, "runs") and hasattr(key_layout, "runs")):
        raise ValueError(
            "under torch.compile the rule and the layouts have to be made outside of the compiled "
            "function, where they are constants"
        )
    tables = rule.fixed_tables(layout, key_layout)
    return (layout.run_table(), key_layout.run_table(), *tables)


def _traced_constants(*identities: int) -> _Constants:
    """Returns :func:`_constants` of objects by their ``id``, which a graph then is guarded by.

    The caller holds them. Only later versions than torch 2.11 take the objects themselves.
    """
    return _constants(*(ctypes.cast(x, ctypes.py_object).value for x in identities))


# What torch.compiler.assume_constant_result does; that would import torch.compile, and Triton.
_traced_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    dtype, device = query.dtype, query.device
    if query.ndim != 4:
        raise ValueError(
            f"query must be (batch, tokens, heads, head_dim), got shape {tuple(query.shape)}"
        )
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(
            f"query must be float32, float64, bfloat16 or float16, got {dtype}"
            + (": scale fp8 tensors back first" if dtype.is_floating_point else "")
        )
    batch, _, heads, head_dim = query.shape
    if heads == 0 or head_dim == 0:
        raise ValueError(
            f"query must have at least one head and one element of it, got {tuple(query.shape)}"
        )
    if key.ndim != 4 or key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key must be (batch, keys, heads, head_dim) with query's batch {batch} and head_dim "
            f"{head_dim}, got shape {tuple(key.shape)}"
        )
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise ValueError(
            f"the heads of key and value must divide query's {heads}, got {key.shape[2]}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have query's type {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")


def _check_layouts(query: Tensor, key: Tensor, layout: Any, key_layout: Any) -> Layout:
    """Returns the layout of the keys."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {type(layout).__name__}")
    if key_layout is not None and not isinstance(key_layout, Layout):
        raise TypeError(f"key_layout must be a Layout or None, got {type(key_layout).__name__}")
    if layout.tokens != query.shape[1]:
        raise ValueError(
            f"layout must add up to query's {query.shape[1]} tokens, "
            f"{layout} adds up to {layout.tokens}"
        )
    if key_layout is None and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} tokens and query {query.shape[1]}: give key_layout, "
            "the layout of the keys"
        )
    found: Layout = layout if key_layout is None else key_layout
    if found.tokens != key.shape[1]:
        raise ValueError(
            f"key_layout must add up to key's {key.shape[1]} tokens, "
            f"{found} adds up to {found.tokens}"
        )
    return found


def _check_lengths(key_lengths: Any, query: Tensor) -> None:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(
            f"key_lengths must be a torch.Tensor or None, got {type(key_lengths).__name__}"
        )
    check_strided(key_lengths, "key_lengths")
    if key_lengths.shape != query.shape[:1]:
        raise ValueError(
            f"key_lengths must have shape (batch,), {tuple(query.shape[:1])}, "
            f"got {tuple(key_lengths.shape)}"
        )
    if key_lengths.dtype != torch.int32:
        raise ValueError(f"key_lengths must be int32, got {key_lengths.dtype}")
    if key_lengths.device != query.device:
        raise ValueError(
            f"key_lengths must be on query's device {query.device}, got {key_lengths.device}"
        )


def _map_name(return_map: bool, map_heads: bool) -> str:
    check_flag(return_map, "return_map")
    check_flag(map_heads, "map_heads")
    if map_heads and not return_map:
        raise ValueError("map_heads=True needs return_map=True")
    return "none" if not return_map else "heads" if map_heads else "mean"


def check_own_keys(call: FrameCall, layout: Layout, key_layout: Layout | None) -> None:
    """Raises unless the keys are the queries' own tokens, as :meth:`FrameRule.identity` needs."""
    if key_layout is not None and key_layout != layout:
        raise ValueError(
            "FrameRule.identity() needs keys that are the queries' own tokens, "
            f"got {layout} for {call.tokens} queries and {key_layout} for {call.keys} keys"
        )
