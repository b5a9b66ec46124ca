"""The formula in plain PyTorch: any device, any floating-point type, any strides, differentiable.

This is the oracle that every kernel is tested against, so it is written to be compared with the
formula in :class:`vstar_kernels.attention.frames.call.FrameCall`. It goes through the queries some
rows at a time, which bounds its memory: no map of S × S_k is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vstar_kernels.attention.call import Forward, carry_tangents, clamped, empty_like, laid_like
from vstar_kernels.attention.frames.call import FrameCall, FrameGradients, FrameWanted, check_call
from vstar_kernels.attention.frames.tables import raised

CHUNK = 2**19  # logits that are held at a time, of all heads and sequences


def frame_attention(*arguments: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vstar_kernels.frame_attention` by its formula, in float32 or, of float64, in float64.

    The arguments are those of :func:`vstar_kernels.frame_attention` but ``backend``.
    """
    out, mean_map, _ = forward(check_call(*arguments, **options))
    return out if mean_map is None else (out, mean_map)


def unavailable() -> list[str]:
    """Returns no reason: the reference runs wherever torch does."""
    return []


def why_not(call: FrameCall) -> list[str]:
    """Returns no reason: the reference runs every checked call."""
    return []


def forward(call: FrameCall, *, save: bool = False) -> Forward:
    """Computes the output and, where it is wanted, the map; saves nothing."""
    with torch.autocast(call.device.type, enabled=False):
        places = _Places(call)
        outs: list[Tensor] = []
        # Written at once where it can be: small results between freed chunks fragment the memory.
        result = empty_like(call.query) if _is_plain(call) else None
        mass = places.no_mass(call)
        for rows in places.chunks(call):
            out, weight = _run(call, _attend_rows, call, places, rows)
            if result is None:
                outs.append(out)
            else:
                result[:, rows] = out
            if mass is not None:
                mass = mass.index_add(2, places.frame_rows[rows], weight)
        if result is None:
            result = laid_like(call.query, torch.cat(outs, dim=1))
        if mass is None:
            return Forward(result)
        mean = mass[:, :, : call.frames] / places.frame_sizes[:, None]
        return Forward(result, (mean if call.options.mean_map == "heads" else mean.mean(1)).float())


def _is_plain(call: FrameCall) -> bool:
    """Returns whether nobody wants to see how the results are computed."""
    if torch._C._are_functorch_transforms_active() or carry_tangents(call.tensors().values()):
        return False
    return not (torch.is_grad_enabled() and call.requires_grad)


def _run(call: FrameCall, compute: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what ``compute`` returns; autograd keeps none of its intermediate tensors."""
    # torch.func knows no checkpoints.
    if _is_plain(call) or torch._C._are_functorch_transforms_active():
        return compute(*arguments)
    return checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Places:
    """The frame and the place of each token, and which keys are each frame's, on the call's device.

    Text has the last row and column of every table, so −1 finds it.
    """

    def __init__(self, call: FrameCall) -> None:
        self.query_frames, self.query_index = _of_tokens(call.query_runs, call.device)
        self.key_frames, self.key_index = _of_tokens(call.key_runs, call.device)
        self.frame_rows = self.query_frames % (call.frames + 1)  # text last
        self.frame_sizes = torch.bincount(self.frame_rows, minlength=call.frames + 1)[:-1]
        # The keys of each frame, in a row for each, and of text in the last one: the frames may
        # have different numbers of tokens, so what is_column does not name is padding.
        order = torch.sort(self.key_frames % (call.key_frames + 1), stable=True)
        counts = torch.bincount(order.values, minlength=call.key_frames + 1)
        within = torch.arange(int(counts.max()), device=call.device)
        self.is_column = within < counts[:, None]
        starts = counts.cumsum(0) - counts
        self.columns = order.indices[(starts[:, None] + within).clamp(max=call.keys - 1)]

    def chunks(self, call: FrameCall) -> Iterator[slice]:
        """Yields the rows that are computed at a time."""
        width = max(call.keys, self.columns.numel()) * call.batch * call.heads
        rows = max(1, CHUNK // max(width, 1))
        for start in range(0, call.tokens, rows):
            yield slice(start, min(start + rows, call.tokens))

    def no_mass(self, call: FrameCall) -> Tensor | None:
        """Returns zeros to sum a map in, ``(batch, heads, F_q + 1, F_k + 1)``, if one is wanted."""
        if call.options.mean_map == "none":
            return None
        dtype = torch.promote_types(call.dtype, torch.float32)
        shape = (call.batch, call.heads, call.frames + 1, call.key_frames + 1)
        return torch.zeros(shape, dtype=dtype, device=call.device)

    def by_frame(self, x: Tensor, fill: float) -> Tensor:
        """(…, S_k) → (…, F_k + 1, P), ``fill`` where a frame has fewer tokens."""
        return x[..., self.columns].masked_fill(~self.is_column, fill)


def _of_tokens(runs: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the frame, −1 of text, and the place within it of each token, ``(tokens,)``."""
    start, end, frame, index = runs.to(device).long().unbind(1)
    lengths = end - start
    offset = torch.repeat_interleave(index - start, lengths)
    return torch.repeat_interleave(frame, lengths), torch.arange(
        len(offset), device=device
    ) + offset


@dataclass
class _Rows:
    """What the formula makes of some rows, ``(batch, heads, rows, S_k)`` but where noted."""

    scaled: Tensor  # a · φ
    factor: Tensor | None  # a
    visible: Tensor  # broadcastable
    counted: Tensor  # visible and of the video, broadcastable
    delta: Tensor | None  # [heads,] rows, S_k
    stat: Tensor  # r before it is clamped, (batch, heads, rows, 1)
    weights: Tensor  # A′


def _attend_rows(call: FrameCall, places: _Places, rows: slice) -> tuple[Tensor, Tensor]:
    """Returns the rows' output ``(batch, rows, heads, head_dim)`` and their mass on each frame.

    The mass is ``(batch, heads, rows, F_k + 1)``, text last.
    """
    weights = _weigh(call, places, rows).weights
    out = (weights @ heads_first(call.value, call.heads)).transpose(1, 2)
    return out, places.by_frame(weights, 0.0).sum(-1)


def _weigh(call: FrameCall, places: _Places, rows: slice) -> _Rows:
    """Returns A′ of some rows, and what it was made of."""
    options = call.options
    f, g = places.query_frames[rows], places.key_frames
    distance = places.key_index - places.query_index[rows, None]  # p_j − p_i, (rows, S_k)
    video = (f >= 0)[:, None] & (g >= 0)

    q = heads_first(call.query[:, rows], call.heads)
    phi = options.scale * (q @ heads_first(call.key, call.heads).mT)

    factor = None
    scaled = phi
    if call.factor is not None:
        above, below = (of_tokens(x, f, g, 1.0).to(phi) for x in call.factor)
        factor = torch.where(phi > 0, above, below)
        if call.factor_span is not None:
            factor = torch.where(_within(call.factor_span, f, g, distance), factor, 1.0)
        scaled = factor * phi

    visible = torch.ones_like(video)
    offset = None
    if call.offset is not None:
        offset = of_tokens(call.offset, f, g, 0.0).to(phi)
        visible = offset != -math.inf  # NaN is no mask
    if call.band is not None:
        visible = visible & (_within(call.band, f, g, distance) | ~video)
    if call.key_lengths is not None:
        exists = torch.arange(call.keys, device=call.device) < call.key_lengths[:, None]
        visible = visible & exists[:, None, None]

    counted = visible & (g >= 0)
    hidden = ~visible
    # The tables were raised by their own largest bias, which a band or a length may have hidden.
    logits = scaled if offset is None else scaled + raised(offset.masked_fill(hidden, -math.inf))
    delta, stat = None, phi.new_ones(phi.shape[:-1]).unsqueeze(-1)
    if call.delta is not None:
        delta = of_tokens(call.delta, f, g, 0.0).to(phi)
        stat = _statistic(call, places, rows, scaled, counted)
        weight = clamped(stat) if options.clamp_negative else stat
        logits = logits + weight * delta

    logits = logits.masked_fill(hidden, -math.inf)
    some = visible.any(-1, keepdim=True)
    weights = logits.masked_fill(~some, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return _Rows(scaled, factor, visible, counted, delta, stat, weights)


def _statistic(
    call: FrameCall, places: _Places, rows: slice, scaled: Tensor, counted: Tensor
) -> Tensor:
    """Returns r of each row, ``(batch, heads, rows, 1)``; 0 without a visible key of the video."""
    if call.stat is not None:
        return call.stat[:, rows].mT.unsqueeze(-1).to(scaled)
    if call.options.stat == "none":
        return scaled.new_ones(scaled.shape[:-1]).unsqueeze(-1)
    some = counted.any(-1, keepdim=True)
    if call.options.stat == "row_max":
        candidates = scaled.masked_fill(~counted, -math.inf)
    else:
        candidates, _ = _frame_means(places, scaled, counted)
    # max(dim), not amax: one index takes a tie's gradient, the first.
    largest = candidates.max(-1, keepdim=True).values
    return torch.where(some, largest, 0.0)


def _frame_means(places: _Places, scaled: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each frame's log-mean-exp over its visible keys, and their weights in it.

    They are ``(batch, heads, rows, F_k)``, −inf for frames without a visible key, and
    ``(batch, heads, rows, F_k, P)``.
    """
    is_key = places.by_frame(counted.float(), 0.0)[..., :-1, :] > 0
    by_frame = places.by_frame(scaled, 0.0)[..., :-1, :].masked_fill(~is_key, -math.inf)
    count = is_key.sum(-1)
    empty = (count == 0).expand(by_frame.shape[:-1])
    safe = by_frame.masked_fill(empty.unsqueeze(-1), 0.0)
    means = safe.logsumexp(-1) - count.clamp(min=1).to(scaled).log()
    return means.masked_fill(empty, -math.inf), safe.softmax(-1)


def of_tokens(table: Tensor, f: Tensor, g: Tensor, text: float) -> Tensor:
    """Returns a table's entries ``([heads,] rows, S_k)``; ``text`` where either token is text."""
    padded = torch.nn.functional.pad(table.to(f.device), (0, 1, 0, 1), value=text)
    return padded[..., g][..., f, :]


def _within(bounds: Tensor, f: Tensor, g: Tensor, distance: Tensor) -> Tensor:
    """Returns whether lo ≤ p_j − p_i ≤ hi, ``(rows, S_k)``."""
    low, high = (of_tokens(x, f, g, 0) for x in bounds)
    return (low <= distance) & (distance <= high)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, key_heads, head_dim) → (batch, heads, tokens, head_dim), at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def backward(
    call: FrameCall,
    out: Tensor,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: FrameWanted,
) -> FrameGradients:
    """Computes the gradients by their formulas, where autograd cannot be asked for them.

    With P = A′ and G the gradient of the map, f and g the frames of row i and key j::

        dPᵢⱼ = dOᵢ·vⱼ + G[f, g] / (tokens of f · heads)     dS = P ∘ (dP − rowsum(P ∘ dP))
        d offset[f, g] = Σ dS over the pairs of f and g       d delta[f, g] = Σ r · dS
        dr = rowsum(dS ∘ delta), 0 where r is clamped
        d(a · φ) = dS + dr · ∂r/∂(a · φ): 1 at the first maximum; for frame_max the weights of the
        frame's keys in its mean, in the first frame that has the largest one
        dφ = a · d(a · φ),   dQ = scale · dφ K,   dK = scale · dφᵀ Q,   dV = Pᵀ dO
    """
    places = _Places(call)
    group = (call.key_heads, call.heads // call.key_heads)
    d_query: list[Tensor] = []
    k, v = (heads_first(x, call.heads) for x in (call.key, call.value))
    d_key, d_value = torch.zeros_like(k), torch.zeros_like(v)
    d_delta = None if call.delta is None else k.new_zeros(call.delta.shape)
    d_offset = None if call.offset is None else k.new_zeros(call.offset.shape)
    d_stat: list[Tensor] = []
    for rows in places.chunks(call):
        found = _weigh(call, places, rows)
        q = heads_first(call.query[:, rows], call.heads)
        d_out = (
            torch.zeros_like(q) if grad_out is None else heads_first(grad_out[:, rows], call.heads)
        )
        d_weights = d_out @ v.mT
        if grad_map is not None:
            d_weights = d_weights + _gradient_of_the_mean(call, places, rows, grad_map).to(q)
        d_logits = found.weights * (d_weights - (found.weights * d_weights).sum(-1, keepdim=True))
        if d_offset is not None and wanted.offset:
            d_offset += _sum_by_frames(d_logits, d_offset, places, rows)
        d_scaled = d_logits
        if found.delta is not None and d_delta is not None:
            weight = clamped(found.stat) if call.options.clamp_negative else found.stat
            if wanted.delta:
                d_delta += _sum_by_frames(weight * d_logits, d_delta, places, rows)
            through = (d_logits * found.delta).sum(-1, keepdim=True)
            if call.options.clamp_negative:  # as clamped passes it
                through = torch.where(found.stat >= 0, through, 0.0)
            if call.stat is not None:
                d_stat.append(through.squeeze(-1).mT)
            elif call.options.stat != "none":
                d_scaled = d_logits + through * _statistic_gradient(call, places, found)
        d_phi = d_scaled if found.factor is None else found.factor * d_scaled
        d_query.append((call.options.scale * (d_phi @ k)).transpose(1, 2))
        d_key += call.options.scale * (d_phi.mT @ q)
        d_value += found.weights.mT @ d_out

    def of_key(gradient: Tensor, tensor: Tensor) -> Tensor:
        return laid_like(tensor, gradient.unflatten(1, group).sum(2).transpose(1, 2))

    stat = None
    if wanted.stat and call.stat is not None:
        stat = torch.cat(d_stat, dim=1).to(call.stat)
    return FrameGradients(
        laid_like(call.query, torch.cat(d_query, dim=1)),
        of_key(d_key, call.key),
        of_key(d_value, call.value),
        d_delta.to(call.delta) if d_delta is not None and wanted.delta else None,
        d_offset.to(call.offset) if d_offset is not None and wanted.offset else None,
        stat,
    )


def _gradient_of_the_mean(
    call: FrameCall, places: _Places, rows: slice, grad_map: Tensor
) -> Tensor:
    """Returns G / (tokens of the frame · heads) of each row and key, 0 of a query of text."""
    per_head = call.options.mean_map == "heads"
    each = grad_map if per_head else (grad_map / call.heads).unsqueeze(1)
    each = torch.nn.functional.pad(each / places.frame_sizes[:, None], (0, 0, 0, 1))
    f, g = places.query_frames[rows], places.key_frames
    return each[..., f[:, None], g]


def _sum_by_frames(x: Tensor, like: Tensor, places: _Places, rows: slice) -> Tensor:
    """Returns the sums of x over the pairs of frames of the video, of ``like``'s shape."""
    by_key = places.by_frame(x, 0.0).sum(-1)  # (batch, heads, rows, F_k + 1)
    frames = places.frame_rows[rows]
    sums = x.new_zeros((*x.shape[:2], like.shape[-2] + 1, by_key.shape[-1]))
    sums = sums.index_add(2, frames, by_key)[..., :-1, :-1]
    return sums.sum((0, 1)) if like.ndim == 2 else sums.sum(0)


def _statistic_gradient(call: FrameCall, places: _Places, found: _Rows) -> Tensor:
    """Returns ∂r/∂(a · φ), ``(batch, heads, rows, S_k)``; 0 in a row without a statistic."""
    scaled, counted = found.scaled, found.counted.expand_as(found.scaled)
    result = torch.zeros_like(scaled)
    if call.options.stat == "row_max":
        first = scaled.masked_fill(~counted, -math.inf).argmax(-1, keepdim=True)
        result.scatter_(-1, first, 1.0)
        return result.masked_fill(~counted, 0.0)
    means, weights = _frame_means(places, scaled, found.counted)
    best = means.argmax(-1, keepdim=True)
    chosen = torch.zeros_like(means).scatter_(-1, best, 1.0)
    weights = (weights * chosen.unsqueeze(-1)).expand(*means.shape, weights.shape[-1])
    columns = places.columns[:-1].expand(weights.shape)
    result.scatter_add_(
        -1, columns.flatten(-2), weights.masked_fill(~places.is_column[:-1], 0.0).flatten(-2)
    )
    return result.masked_fill(~counted, 0.0)
