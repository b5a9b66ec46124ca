"""The public operation: it checks the call, chooses a backend and runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from vstar_kernels.attention import autograd, dispatch
from vstar_kernels.attention.call import empty_like
from vstar_kernels.attention.frames.call import FrameCall, check_call, check_own_keys
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.rules import FrameRule


@overload
def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = ...,
    *,
    key_layout: Layout | None = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_map: Literal[False] = ...,
    map_heads: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = ...,
    *,
    key_layout: Layout | None = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_map: Literal[True],
    map_heads: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def frame_attention(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over tokens that belong to frames, weighed frame by frame, in one pass.

    With φ = scale · qᵢ·kⱼ of a query in frame f and a key in frame g, and what the rule says of
    the two frames::

        A′ = softmax(a · φ + r · κb₁[f, g] + b₂[f, g], over the keys that g's mask shows to f)
        out = A′V

    r is a statistic of the row, see :class:`FrameRule`. Tokens of text are neither changed nor
    masked. With one token a frame it is :func:`tar_attention`.

    Args:
        query: ``(batch, tokens, heads, head_dim)``; any strides, though the kernels need head_dim
            contiguous. Under autocast the three are cast as for scaled_dot_product_attention.
        key, value: ``(batch, keys, key_heads, head_dim)`` of query's type and device; key_heads
            divides heads, and head h reads key head h // (heads / key_heads).
        layout: Which frame each query belongs to; adds up to ``tokens``.
        rule: What is done between frames. None, or ``FrameRule()``, is plain attention.
        key_layout: The layout of the keys, where it is not the queries'.
        key_lengths: ``(batch,)`` int32 on query's device: how many keys of each sequence exist; the
            others' values must be finite.
        scale: Factor on QKᵀ; 1/√head_dim if None.
        return_map: Also return the map between frames, ``(batch, F_q, F_k + 1)`` in float32: the
            mean over a frame's queries and the heads of the weight on each frame of keys, and on
            text in the last column. Its rows sum to 1.
        map_heads: Return the map of each head, ``(batch, heads, F_q, F_k + 1)``.
        backend: A name of :func:`vstar_kernels.backends.available`, which then runs or raises.
            None takes the fastest that can run the call, and warns once when that is the reference.
            ``FrameRule.identity()`` needs none: its values are the same by any name.

    Returns:
        The output, allocated as ``torch.empty_like(query)`` allocates, or ``(output, map)``. A
        query without a visible key gives 0.

    Raises:
        ValueError: A bad argument, a rule that does not fit the layouts, an unknown backend, or a
            named backend that cannot run the call, with every reason.
        TypeError: An argument of the wrong kind.
    """
    given = None  # by which a call like this one is found again
    if not torch.compiler.is_compiling():
        lengths = () if key_lengths is None else (key_lengths,)
        options = scale, return_map, map_heads, backend, key_lengths is None
        given = (layout, rule, key_layout, *options), (query, key, value, *lengths)
        run = dispatch.FRAME_ATTENTION.calls.get(*given)
        if run is not None:
            return run(*given[1])
    identity = isinstance(rule, FrameRule) and rule.is_identity
    call = check_call(
        query,
        key,
        value,
        layout,
        None if identity else rule,
        key_layout=key_layout,
        key_lengths=key_lengths,
        scale=scale,
        return_map=return_map,
        map_heads=map_heads,
    )
    dispatch.FRAME_ATTENTION.check_name(backend)
    if identity:
        out, mean_map = _identity(call, layout, key_layout)
        return out if mean_map is None else (out, mean_map)
    if autograd.traced(call):  # a backend is chosen when it runs
        return autograd.frame_attention(call, backend)
    chosen = dispatch.FRAME_ATTENTION.choose(call, backend)
    if chosen != "reference" and autograd.needed(call):
        return autograd.frame_attention(call, chosen)
    if given is not None and _is_constant(rule):
        dispatch.FRAME_ATTENTION.remember(*given, chosen, call, _like(call))
    out, mean_map, _ = dispatch.FRAME_ATTENTION.run(chosen, call)
    return dispatch.FRAME_ATTENTION.results(call.options, out, mean_map)


def _is_constant(rule: FrameRule | None) -> bool:
    """Returns whether a rule is the same at every call: whether no number in it can change."""
    return rule is None or not (isinstance(rule.stat, Tensor) or rule.is_trained)


def _like(call: FrameCall) -> Callable[..., FrameCall]:
    """Returns what makes a call like this one, of the same tables, on other tensors.

    The tables are of this call's modes, as torch's inference mode is; other calls are not like it.
    """
    runs, options = (call.query_runs, call.key_runs), call.options
    tables = call.delta, call.offset, call.factor, call.factor_span, call.band

    def make(
        query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None
    ) -> FrameCall:
        return FrameCall(query, key, value, key_lengths, None, *runs, *tables, options)

    return make


def _identity(
    call: FrameCall, layout: Layout, key_layout: Layout | None
) -> tuple[Tensor, Tensor | None]:
    """Returns V in the place of attention: every token sees itself alone, if it exists."""
    check_own_keys(call, layout, key_layout)
    value = call.value.repeat_interleave(call.heads // call.key_heads, dim=2)
    exists = torch.ones(call.batch, call.tokens, dtype=torch.bool, device=call.device)
    if call.key_lengths is not None:
        exists = torch.arange(call.tokens, device=call.device) < call.key_lengths[:, None]
        value = value.masked_fill(~exists[..., None, None], 0.0)
    out = empty_like(call.query).copy_(value)
    if call.options.mean_map == "none":
        return out, None
    shares = [
        torch.cat([exists[:, start:end] for start, end, frame, _ in layout.runs if frame == f], 1)
        .float()
        .mean(1)
        for f in range(layout.frames)
    ]
    kept = torch.stack(shares, 1) if shares else exists.new_zeros(call.batch, 0).float()
    mean_map = torch.nn.functional.pad(torch.diag_embed(kept), (0, 1))
    if call.options.mean_map == "heads":
        mean_map = mean_map[:, None].repeat(1, call.heads, 1, 1)
    return out, mean_map
