"""Calls through the public functions: a shipped configuration's line, and what a variant asks for.

On a GPU or an emulated one they run the kernels that ``cases``, ``frame_cases`` and
``column_cases`` compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.codegen import cases, column_cases, frame_cases
from benchmarks.codegen.cases import Entry, Key
from benchmarks.codegen.column_cases import ColumnEntry
from benchmarks.codegen.frame_cases import FrameEntry
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.triton import columns, configs, descriptors, frames, plan

Attention = Callable[..., Any]
POINTERS = "gaussian, by pointers"


@dataclass(frozen=True)
class PublicCall:
    """A call, and with ``weights`` the gradients of its results' weighted sum.

    ``attend`` makes it, of an attention and tensors by their names; ``wanted`` are those that
    require gradients.
    """

    attention: Attention
    attend: Callable[..., Any]
    tensors: dict[str, Tensor]
    weights: list[Tensor] = field(default_factory=list)
    wanted: tuple[str, ...] = ()

    def forward(self, attention: Attention, tensors: dict[str, Tensor]) -> Any:
        """Returns the results of an attention for tensors, in place of its own."""
        found = self.attend(attention, **tensors)
        return found if isinstance(found, tuple) else (found,)

    def gradients(self, tensors: dict[str, Tensor], results: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns what is wanted of the results' weighted sum, by the tensors' names."""
        pairs = zip(results, self.weights, strict=True)
        loss = sum((x.double() * w.to(x.device)).sum() for x, w in pairs)
        found = torch.autograd.grad(loss, [tensors[name] for name in self.wanted])
        return dict(zip(self.wanted, found, strict=True))


@contextlib.contextmanager
def circumstances(entry: Key, variant: Any) -> Iterator[None]:
    """A context in which a call has a variant's offsets and a line's products and way of a bias.

    Plans are remembered, and so forgotten at both ends.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(forget_plans)
        forget_plans()

        def replace(module: Any, name: str, by: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, by))

        replace(plan, "ieee_products", lambda dtype: entry.kind == "ieee")
        if variant.wide and isinstance(entry, Entry):
            replace(plan, "_largest_offset", lambda key: 2**31)
        elif variant.wide:
            replace(plan, "INT32_MAX", -1)
        if isinstance(entry, FrameEntry):
            below = float("inf") if entry.table.startswith("revisit") else 0.0
            replace(configs, "revisit_below", lambda *key: below)
            if not entry.is_described:
                replace(descriptors, "ARCHITECTURES", ())
        if entry.has_sweeps and variant.map:
            forget_saved(replace)  # which would spare kernels of the line
        yield


def forget_saved(replace: Callable[[Any, str, Any], None]) -> None:
    """Computes gradients without what the forward pass saved, as in a compiled graph.

    ``replace`` does it for as long as it says: of a module, a name, and by what.
    """
    backward = backend.backward
    replace(backend, "backward", lambda *x: backward(*x[:2], (), *x[3:]))


def forget_plans() -> None:
    """Forgets all plans."""
    for module in (backend, columns, frames):
        module._forward_plan.cache_clear()
        module._backward_plan.cache_clear()


@contextlib.contextmanager
def configured(entry: Any) -> Iterator[None]:
    """A context in which calls find this line in place of the one that the table has."""
    if isinstance(entry, FrameEntry | ColumnEntry):
        name, table = entry.family, entry.table
    else:
        name, table = entry.family + "_backward" * entry.backward, None
    look_up = getattr(configs, name)

    def found(*key: Any) -> Any:
        return entry.config if table in (None, key[-1]) else look_up(*key)

    with mock.patch.object(configs, name, found):
        yield


def random(entry: Key, variant: Any, *shape: int) -> Tensor:
    """Returns random numbers in the type of a call's queries.

    Products in TF32 have them as they are: what they cut off would make other keys the largest.
    """
    found = torch.randn(shape)
    if entry.kind == "tf32":
        found = found.half()
    return found.to(variant.dtype(entry.kind))


# ---- tar_attention ----


def tar_variants(entry: Entry) -> list[cases.Variant]:
    """Returns what a line computes for itself."""
    always = cases.ALWAYS[entry.family, entry.backward]
    rare = cases.rare(entry).values() if entry.family == "tile" else ()
    found = [x for x in (*always, *rare) if cases.launches(entry, x, entry.width)]
    described = descriptors.has_descriptors(entry.architecture, entry.kind)
    if entry.family == "stream" and not entry.backward and described:
        found.append(dataclasses.replace(cases.GAUSSIAN, name=POINTERS))
    return found


def tar(
    entry: Entry, variant: cases.Variant, head_dim: int, *, batch: int, frames: int, heads: int
) -> PublicCall:
    """Returns a call of ``tar_attention``."""
    shape = (batch, frames, heads, head_dim)
    tensors = {name: random(entry, variant, *shape) for name in ("query", "key", "value")}
    bias = _tar_bias(variant, frames, heads)
    if variant.stat == "tensor":
        tensors["stat"] = torch.randn(batch, frames, heads)
    if variant.grad_delta:
        tensors["delta"] = bias.entries
    options = {"return_map": variant.map}
    if variant.negative:
        options["scale"] = -(head_dim**-0.5)
    weights = []
    if entry.backward:
        weights.append(random(entry, variant, *shape))
        if variant.map:
            weights.append(heads * torch.randn(batch, frames, frames))

    def attend(
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stat: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> Any:
        if variant.name == POINTERS:
            query, key, value = map(_unaligned, (query, key, value))
        changed = {} if delta is None else {"delta": delta}
        changed |= {} if stat is None else {"stat": stat.float()}
        return attention(query, key, value, dataclasses.replace(bias, **changed), **options)

    wanted = tuple(tensors) if entry.backward else ()
    return PublicCall(vk.tar_attention, attend, tensors, weights, wanted)


def _tar_bias(variant: cases.Variant, frames: int, heads: int) -> Any:
    """Returns the bias that a variant names, but for a statistic that is given."""
    options: dict[str, Any] = {"clamp_negative": variant.clamp}
    if variant.stat != "tensor":
        options["stat"] = variant.stat
    if variant.form == "gaussian":
        return vk.GaussianBias(1.0, **options)
    assert variant.form == "dense"
    by_head = (heads,) * variant.per_head
    return vk.DenseBias(torch.rand(*by_head, frames, frames), **options)


def _unaligned(x: Tensor) -> Tensor:
    """Returns the same numbers, behind one more."""
    behind = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return behind.view(x.shape).copy_(x)


# ---- column_attention ----


def column_variants(entry: ColumnEntry) -> list[column_cases.Variant]:
    """Returns what a line computes; of heads of 64 also with tensors far apart in memory."""
    far = not entry.backward and (entry.kind, entry.width) == ("16-bit", 64)
    return [*entry.variants, column_cases.WIDE] if far else entry.variants


def of_columns(
    entry: ColumnEntry,
    variant: column_cases.Variant,
    head_dim: int,
    *,
    batch: int,
    queries: int,
    heads: int,
) -> PublicCall:
    """Returns a call of ``column_attention``, with four columns."""
    keys = column_cases.KEYS.get(entry.table.rsplit("_", 1)[-1], 77)
    sizes = {"query": queries, "key": keys} | ({"value": keys} if variant.value else {})
    tensors = {
        name: random(entry, variant, batch, tokens, heads, head_dim)
        for name, tokens in sizes.items()
    }
    weights_of_keys = torch.rand(keys, 4)
    scale = -(head_dim**-0.5) if variant.negative else None
    weights, wanted = [], tuple[str, ...]()
    if entry.backward:
        wanted = tuple(tensors) if variant.wants_keys else ("query",)
        if variant.value:
            weights.append(random(entry, variant, batch, queries, heads, head_dim))
        weights.append(heads * torch.randn(batch, queries, weights_of_keys.shape[1]))
    elif variant.save:
        wanted = ("query",)

    def attend(
        attention: Attention, query: Tensor, key: Tensor, value: Tensor | None = None
    ) -> Any:
        return attention(query, key, value, weights_of_keys.to(query.device), scale=scale)

    return PublicCall(vk.column_attention, attend, tensors, weights, wanted)


# ---- frame_attention ----


def _frames_rule(variant: frame_cases.Variant, frames: int, heads: int) -> vk.FrameRule:
    """Returns the rule whose tables a variant names, but for a statistic that is given."""
    rule = vk.FrameRule()
    options: dict[str, Any] = {"clamp_negative": variant.clamp, "stat": variant.stat}
    if variant.stat == "tensor":
        options["stat"] = "row_max"
    if "delta" in variant.tables and variant.per_head:
        rule += vk.FrameRule.bias(torch.rand(heads, frames, frames), **options)
    elif "delta" in variant.tables:
        rule += vk.FrameRule.tar(1.0, **options)
    if "offset" in variant.tables:
        rule += vk.FrameRule.window(3)
    if "factor" in variant.tables:
        rule += vk.FrameRule.attenuate(0.6, 2, metric="token")
    if "band" in variant.tables:
        rule += vk.FrameRule.band(40)
    return rule


def of_frames(
    entry: FrameEntry,
    variant: frame_cases.Variant,
    head_dim: int,
    *,
    frames: int,
    tokens: int,
    text: int,
    heads: int = 2,
    lengths: Sequence[int] = (),
) -> PublicCall:
    """Returns a call of ``frame_attention``, whose heads share one of the keys.

    ``tokens`` are of a frame; ``lengths`` of keys there are where the variant has any, of each
    batch element but the first.
    """
    runs = 5 if variant.interleaved else 1
    layout = vk.Layout(vk.Text(text), *[vk.Frames(frames, tokens // runs)] * runs)
    every = [layout.tokens, *lengths] if variant.lengths else [layout.tokens]
    batch = len(every)
    tensors = {
        name: random(entry, variant, batch, layout.tokens, count, head_dim)
        for name, count in (("query", heads), ("key", 1), ("value", 1))
    }
    if variant.clamp:  # some rows have nothing but negative logits
        tensors["key"] = tensors["key"].abs()
        tensors["query"][:, ::3] = -tensors["query"][:, ::3].abs()
    rule = _frames_rule(variant, frames, heads)
    if variant.stat == "tensor":
        tensors["stat"] = torch.randn(batch, layout.tokens, heads)
    key_lengths = torch.tensor(every, dtype=torch.int32) if variant.lengths else None
    options: dict[str, Any] = {"scale": -(head_dim**-0.5) if variant.negative else None}
    options |= {"return_map": variant.map != "none", "map_heads": variant.map == "heads"}
    weights = []
    if entry.backward:
        weights.append(random(entry, variant, *tensors["query"].shape))
        if variant.map != "none":
            by_head = (heads,) * (variant.map == "heads")
            weights.append(frames * torch.randn(batch, *by_head, frames, frames + 1))

    def attend(
        attention: Attention, query: Tensor, key: Tensor, value: Tensor, stat: Tensor | None = None
    ) -> Any:
        changed = rule if stat is None else dataclasses.replace(rule, stat=stat.float())
        here = None if key_lengths is None else key_lengths.to(query.device)
        return attention(query, key, value, layout, changed, key_lengths=here, **options)

    wanted = tuple(tensors) if entry.backward or variant.save else ()
    return PublicCall(vk.frame_attention, attend, tensors, weights, wanted)
