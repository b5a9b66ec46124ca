"""Attention whose sequence is spread over several processes, as diffusers' Ulysses has it.

Each process holds a part of the tokens, with all heads. Ulysses exchanges them for all tokens with
a part of the heads, which is what :func:`attend` takes, and back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vstar_kernels.models.full3d.seats import Seat, attend


def is_spread(parallel_config: Any) -> bool:
    """Returns whether a processor's parallel configuration spreads the tokens."""
    return getattr(parallel_config, "context_parallel_config", None) is not None


def attend_spread(
    seat: Seat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    masked: bool,
    parallel_config: Any,
) -> Tensor:
    """Returns the attention of a layer's call for this process's tokens, without gradients.

    Args:
        seat: The layer's, whose call is changed or watched.
        query, key, value: This process's, ``(batch, tokens, heads, head_dim)``.
        scale, masked: As for :func:`attend`.
        parallel_config: diffusers' own.

    Raises:
        ValueError: The tokens go round in a ring, the layer is watched, or its rule is not the same
            for all heads: a process sees some keys at a time then, or some heads.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    name = seat.layer.name
    if parallel_config.context_parallel_config.ring_degree > 1:
        raise ValueError(
            f"{name} runs under ring attention (ring_degree > 1), where no process sees all keys "
            "of a row: frame_attention takes Ulysses (ulysses_degree) alone"
        )
    if seat.watchers:
        raise ValueError(
            f"capture_maps sees a part of the heads of {name} in each process: use one"
        )

    if _differs_by_head(seat):
        raise ValueError(
            f"{name} runs under context parallelism (ulysses_degree), where each process has a "
            "part of its heads: the rule must be the same for all heads, without heads= or tables "
            "of shape (heads, F_q, F_k)"
        )

    def forward(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Tensor:
        return attend(seat, query, key, value, scale=scale, masked=masked, stock=_no_stock)

    out: Tensor = _templated_context_parallel_attention(
        query,
        key,
        value,
        scale=scale,
        forward_op=forward,
        backward_op=_no_backward,
        _parallel_config=parallel_config,
    )
    return out


def _differs_by_head(seat: Seat) -> bool:
    change = seat.change()
    if change is None or change.rule.is_identity:
        return False
    reading = change.reading.of(seat.layer)
    delta, offset, *_ = change.rule.tables(reading.layout, reading.key_layout)
    return any(table is not None and table.ndim > 2 for table in (delta, offset))


def _no_stock() -> Tensor:
    raise AssertionError("the layer's call is changed")


def _no_backward(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a rule between frames has no gradients under context parallelism")
