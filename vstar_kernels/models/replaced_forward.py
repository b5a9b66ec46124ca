"""Attention without processors, where an instance's ``forward`` is replaced: lvdm's and LaVie's."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from vstar_kernels.models.layers import (
    ColumnController,
    RegularizedAttention,
    WatchedCrossAttention,
)


class TARForward(RegularizedAttention):
    """The ``forward`` of a temporal attention module, regularized; a front end has a subclass."""

    def __init__(self, module: nn.Module, *, backend: str | None = None) -> None:
        super().__init__(backend=backend)
        self.module = module

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies the class's own forward, as nothing controls the copy of a model under TAR."""
        return own_forward, (self.module,)


class ColumnForward(WatchedCrossAttention):
    """The ``forward`` of cross-attention with the maps of some words; a front end has a subclass.

    It takes and returns ``(rows, positions, channels)``, a row for each frame.
    """

    def __init__(
        self,
        module: nn.Module,
        controller: ColumnController,
        layer: str,
        previous: Any,
        backend: str | None,
    ) -> None:
        super().__init__(controller, layer, previous, backend)
        self.module = module

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies the class's own forward, as nothing captures the maps of the copy of a model."""
        return own_forward, (self.module,)


def own_forward(module: Any) -> Any:
    """Returns the forward of a module's class, bound to it: what is there without a replacement."""
    return types.MethodType(type(module).forward, module)


class ForwardFrontEnd:
    """What the front ends share whose attention is the ``forward`` of its module."""

    def get_attention(self, module: nn.Module) -> Any:
        """Returns the module's forward, replaced or its own."""
        return module.forward

    def set_attention(self, module: nn.Module, attention: Any) -> None:
        """Gives the module a forward; its class's own needs no replacement."""
        if getattr(attention, "__func__", None) is type(module).forward:
            module.__dict__.pop("forward", None)
        else:
            module.forward = attention

    def logit_factors(
        self, module: nn.Module, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Returns queries and keys whose scaled products are a layer's logits, and the scale."""
        return query, key, module.scale

    def why_not_watch(self, attention: Any) -> str | None:
        """Returns why the forward of cross-attention cannot make way, or None."""
        if isinstance(attention, ColumnForward | types.MethodType):
            return None
        return f"its forward is {attention!r}, which capture_columns would replace"

    def why_not_replace(self, attention: Any) -> str | None:
        """Returns why a forward that is found in a model cannot make way for TAR, or None."""
        if isinstance(attention, TARForward | types.MethodType):
            return None
        return f"its forward is {attention!r}, which TAR would replace"

    def register(self) -> None:
        """Registers nothing: these code bases have no registries."""


def why_not_self_attention(
    hidden_states: Tensor, context: Tensor | None, mask: Tensor | None
) -> list[str]:
    """Returns what a call asks for beside self-attention over the frames of each row."""
    reasons = []
    if hidden_states.ndim != 3:
        shape = tuple(hidden_states.shape)
        reasons.append(f"inputs other than (rows, frames, channels), got shape {shape}")
    if context is not None and context is not hidden_states:
        reasons.append(f"cross-attention (context of shape {tuple(context.shape)})")
    if mask is not None:
        reasons.append(f"a mask, got shape {tuple(mask.shape)} (causal attention)")
    return reasons
