"""Route C: PyTorch's attention is exchanged while a module runs, whatever the module is.

A torch function mode sees every call of ``scaled_dot_product_attention`` that is made under it. The
module stays as it is; what it passes to its attention, with norms and positions, is what we get. It
is how diffusers skips attention (its ``hooks/layer_skip.py``). Modes and torch.compile do not go
together, so the module runs eagerly, between graphs, where a model is compiled around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vstar_kernels.models.classes import ClassChange
from vstar_kernels.models.full3d.masks import key_lengths
from vstar_kernels.models.full3d.seats import Seat, attend


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of a call of ``scaled_dot_product_attention``, by its own names.

    ``query``, ``key`` and ``value`` are ``(batch, heads, tokens, head_dim)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def stock(self) -> Tensor:
        """Returns what PyTorch answers."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


class ExchangedAttention(TorchFunctionMode):
    """A context in which PyTorch's attention is answered by a function, in this thread, eagerly.

    >>> with ExchangedAttention(lambda call: call.stock()):
    ...     model(**inputs)

    Args:
        answer: Returns the answer to a call, ``(batch, heads, tokens, head_dim)``. What it calls
            itself is not exchanged.
    """

    def __init__(self, answer: Callable[[AttentionCall], Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers a call of torch, or lets torch answer."""
        if func is F.scaled_dot_product_attention:
            return self._answer(AttentionCall(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class FunctionModeRoute:
    """Route C of one layer; see the file.

    Args:
        seat: The layer's, whose module may be of any class.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._module: nn.Module | None = None

    def is_in(self) -> bool:
        """Returns whether the layer's module leads its attention to the seat."""
        return _SEATS.get(id(self._seat.layer.module)) is self._seat

    def put_in(self) -> None:
        """Has the layer's module run under a mode."""
        self._module = self._seat.layer.module
        _SEATS[id(self._module)] = self._seat
        _EXCHANGING.put_on(self._module)

    def take_out(self) -> None:
        """Makes the module what it was; nothing happens the second time."""
        if self._module is not None:
            _SEATS.pop(id(self._module), None)
            _EXCHANGING.take_off(self._module)
            self._module = None


# By the id of the layer's module, which the seat keeps alive.
_SEATS: WeakValueDictionary[int, Seat] = WeakValueDictionary()


class _Answer:
    """Answers the attention calls of one call of a layer.

    Args:
        seat: The layer's.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self.seen: list[str] = []  # what the layer's calls were of, in words
        self.attended = False

    def __call__(self, call: AttentionCall) -> Tensor:
        """Returns the answer to a call: a module may also attend to a prompt or an image."""
        seat = self._seat
        self.seen.append(f"{call.query.shape[-2]} queries and {call.key.shape[-2]} keys")
        change = seat.change()
        tokens = call.query.shape[-2], call.key.shape[-2]
        if change is None:
            expected = tokens[:1] * 2  # whoever watches knows the layout
        else:
            layout = change.reading.layout
            expected = layout.tokens, (change.reading.key_layout or layout).tokens
        if call.query.ndim != 4 or tokens != expected:
            return call.stock()
        self.attended = True
        if call.is_causal or call.dropout_p:
            raise ValueError(
                f"{seat.layer.name} calls its attention with is_causal={call.is_causal}, "
                f"dropout_p={call.dropout_p}: frame_attention has neither"
            )
        lengths = None
        if call.attn_mask is not None and seat.is_taken():
            mask = call.attn_mask.expand(call.query.shape[0], -1, -1, -1)
            lengths = key_lengths(mask, seat.layer.name)
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        return attend(
            seat,
            query,
            key,
            value,
            key_lengths=lengths,
            scale=call.scale,
            stock=lambda: call.stock().transpose(1, 2),
        ).transpose(1, 2)


def _exchanging(base: Any) -> dict[str, Callable[..., Any]]:
    """Returns the method through which a layer is called."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seat = _SEATS.get(id(module))
        if seat is None:  # another thread has just taken the route out
            return base.__call__(module, *args, **kwargs)
        answer = _Answer(seat)
        with ExchangedAttention(answer):
            out = base.__call__(module, *args, **kwargs)
        if not answer.attended and seat.change() is not None:
            seen = "; ".join(answer.seen) or "none at all"
            raise RuntimeError(
                f"{seat.layer.name} did not attend over the tokens of the layout by PyTorch's "
                f"scaled_dot_product_attention, which is where an unknown model is reached: it "
                f"called it with {seen}. Choose layers= that do, and the model's own attention "
                "backend"
            )
        return out

    reason = "apply_frames reaches the attention of an unknown model by a mode, in eager mode only"
    return {"__call__": torch.compiler.disable(call, reason=reason)}


_EXCHANGING = ClassChange(_exchanging)
