"""A temporal attention layer of a model, and what TAR puts in the place of its attention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vstar_kernels.analysis.maps import Level, Place
from vstar_kernels.attention.bias import Bias, GaussianBias
from vstar_kernels.attention.columns.operation import column_attention
from vstar_kernels.attention.temporal import tar_attention

Override = Literal["identity", "uniform"]
OVERRIDE_MAPS: dict[Override, Callable[[int], Tensor]] = {
    "identity": torch.eye,
    "uniform": lambda frames: torch.full((frames, frames), 1 / frames),
}


@dataclass(frozen=True)
class TemporalLayer:
    """One temporal self-attention module.

    Attributes:
        name: The module's name in its model.
        level: The UNet's resolution level, 0 the finest; each halves the latents' height and width,
            rounding up. ``"init"`` for the block before the UNet's own (``transformer_in``,
            ``init_attn``), which VSTAR leaves alone. A transformer of one resolution has level 0.
        place: ``"down"``, ``"mid"``, ``"up"`` or ``"init"``; ``"blocks"`` in a transformer.
        module: The attention module.
    """

    name: str
    level: Level
    place: Place
    module: Any


@dataclass(frozen=True)
class CrossLayer:
    """One cross-attention module from a frame's positions to the text.

    Attributes:
        name, level, place, module: As of a :class:`TemporalLayer`.
    """

    name: str
    level: int
    place: Place
    module: Any


LayerChoice = Callable[[Any], bool] | Collection[int | str] | None


def layer_chooser(layers: LayerChoice, available: Sequence[Any]) -> Callable[[Any], bool]:
    """Returns whether a layer is one of those that the user wants.

    Args:
        layers: A callable of a layer; or levels and names of layers, of which it has one; None is
            all layers.
        available: The layers that there are, each with a ``name`` and a ``level``.

    Raises:
        TypeError: It is nothing of that.
        ValueError: It names nothing, or what there is not.
    """
    if layers is None:
        return lambda layer: True
    if callable(layers):
        return layers
    kinds = "levels, names of layers, a callable of a layer or None"
    if isinstance(layers, str | bytes) or not isinstance(layers, Collection):
        raise TypeError(f"layers must be {kinds}, got {type(layers).__name__}")
    if not layers:
        raise ValueError(f"layers names none: give {kinds}, for all")
    levels = {layer.level for layer in available}
    names = {layer.name for layer in available}
    for item in layers:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise TypeError(f"layers must be {kinds}, got {type(item).__name__} among them")
        if item not in levels and item not in names:
            raise ValueError(
                f"layers names {item!r}, which there is not: the levels are "
                f"{', '.join(sorted(map(str, levels)))}, and a layer's name is one such as "
                f"{min(names, default='none')}"
            )
    wanted = frozenset(layers)
    return lambda layer: layer.level in wanted or layer.name in wanted


@dataclass(frozen=True)
class Regularization:
    """What changes one layer's attention: a bias, or a map in the place of its own (Fig. 4).

    Without either, the layer's attention stays plain.

    Attributes:
        bias: The regularization; None is plain attention.
        override: What replaces the map, or None.
        stock: Whether the layer is left to the attention that it had before TAR.
    """

    bias: Bias | None = None
    override: Override | None = None
    stock: bool = False


PLAIN = Regularization()
STOCK = Regularization(stock=True)


@dataclass(frozen=True)
class RegularizedLayer:
    """What TAR does to one temporal attention layer at the regularized steps.

    Attributes:
        model: The model's name in its pipeline; empty for a model by itself.
        name, level, place: Of the :class:`TemporalLayer`.
        width: Of the layer's feature maps, in the last forward pass; None before the first.
        bias: Δ and its weight; None where the map is replaced.
        override: What replaces the map; None where there is a bias.
    """

    model: str
    name: str
    level: Level
    place: str
    width: int | None
    bias: Bias | None
    override: Override | None

    @property
    def sigma(self) -> float | None:
        """σ in frames; None where Δ is not Gaussian."""
        return self.bias.sigma if isinstance(self.bias, GaussianBias) else None

    @property
    def strength(self) -> float | None:
        """The factor on Δ; None where the map is replaced."""
        return None if self.bias is None else self.bias.strength


class ColumnController(Protocol):
    """What takes the column maps of a model under ``capture_columns``."""

    def columns(self, layer: str, query: Tensor, keys: int) -> Tensor | None:
        """Returns the columns for a layer's call, None where its maps are not captured.

        Args:
            layer: The layer's name.
            query: ``(rows, positions, channels)``.
            keys: How many there are.
        """

    def add(self, layer: str, maps: Tensor) -> None:
        """Takes the maps of a layer's call, ``(rows, positions, columns)``."""


class WatchedCrossAttention:
    """A layer's cross-attention, with its column maps; each front end has a subclass of it.

    Args:
        controller: What says which columns' maps are captured, and takes them.
        layer: The layer's name in its model.
        previous: What it takes the place of, and leaves calls to that are not captured.
        backend: As for :func:`vstar_kernels.column_attention`.
    """

    def __init__(
        self, controller: ColumnController, layer: str, previous: Any, backend: str | None
    ) -> None:
        self.controller, self.layer, self.previous = controller, layer, previous
        self._backend = backend

    def attend(
        self, module: Any, hidden_states: Tensor, context: Tensor, columns: Tensor
    ) -> Tensor:
        """Attends to the context, up to the output projection, and gives the maps away.

        Args:
            module: Has ``to_q``, ``to_k``, ``to_v``, ``heads`` and ``scale``.
            hidden_states: ``(rows, positions, channels)``.
            context: ``(rows, keys, channels)``.
            columns: What the controller returned.
        """
        query, key, value = (
            project(tokens).unflatten(-1, (module.heads, -1))
            for project, tokens in (
                (module.to_q, hidden_states),
                (module.to_k, context),
                (module.to_v, context),
            )
        )
        out, maps = column_attention(
            query, key, value, columns, scale=module.scale, backend=self._backend
        )
        self.controller.add(self.layer, maps)
        return out.flatten(-2)


def override_map(value: Tensor, override: Override) -> Tensor:
    """Returns what attention over frames is with another map; ``(rows, frames, channels)``."""
    if override == "identity":
        return value
    return value.mean(dim=1, keepdim=True).expand_as(value)


class Controller(Protocol):
    """What knows how the layers of a model under ``apply_tar`` are regularized."""

    def regularization(self, layer: str) -> Regularization:
        """Returns the change to a layer's attention in the forward pass that calls the layer.

        Raises:
            RuntimeError: The layer is called outside of a forward pass of its model.
        """


class Traced(threading.local):
    """The change to a layer's attention in the forward pass that runs in this thread.

    It is for code that torch.compile traces, which is the same for all layers only as long as it
    looks nothing up by the layer's name.
    """

    def __init__(self) -> None:  # of each thread: torch 2.11 traces a class's attribute instead
        self.change: Regularization | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is in no forward pass."""
        return Traced, ()


class RegularizedAttention:
    """The attention of one layer under TAR; each front end has a subclass that its layers call.

    Attributes:
        bias: The regularization; None is plain attention.
        override: ``"identity"`` or ``"uniform"`` instead of the attention map (VSTAR, Fig. 4).
        backend: As for :func:`vstar_kernels.tar_attention`.
        controller: What knows the regularization of each forward pass, where this is part of a
            model under ``apply_tar``; ``bias`` and ``override`` are not looked at then.
        layer: The layer's name in that model.
        previous: What it took the place of in that model, and leaves calls to where it is stock.
        stock: Whether it was part of such a model, and is left behind.
        traced: What compiled code asks in the place of ``controller``.
    """

    controller: Controller | None = None
    layer: str = ""
    previous: Any = None
    stock: bool = False

    def __init__(
        self,
        bias: Bias | None = None,
        *,
        override: Override | None = None,
        backend: str | None = None,
    ) -> None:
        self.bias = bias
        self.override = override
        self.backend = backend
        self.traced = Traced()

    def regularization(self) -> Regularization:
        """Returns the change to the attention in the call that runs, or that has just ended.

        Raises:
            RuntimeError: The model is under ``apply_tar``, and not in a forward pass.
        """
        controller = self.controller  # which another thread may take away
        if torch.compiler.is_compiling() and self.traced.change is not None:
            return self.traced.change
        if controller is not None:
            return controller.regularization(self.layer)
        return STOCK if self.stock else Regularization(self.bias, self.override)

    def attend(self, module: Any, hidden_states: Tensor, change: Regularization) -> Tensor:
        """Attends over frames, up to the output projection; ``(rows, frames, channels)``.

        Args:
            module: Has ``to_q``, ``to_k``, ``to_v``, ``heads`` and ``scale``.
            hidden_states: ``(rows, frames, channels)``.
            change: What :meth:`regularization` returned.
        """
        # The projections are called, not read: adapters, casting and offloading hook into the call.
        if change.override is not None:
            return override_map(module.to_v(hidden_states), change.override)
        query, key, value = (
            project(hidden_states).unflatten(-1, (module.heads, -1))
            for project in (module.to_q, module.to_k, module.to_v)
        )
        return self.operate(query, key, value, change, module.scale).flatten(-2)

    def operate(
        self, query: Tensor, key: Tensor, value: Tensor, change: Regularization, scale: float
    ) -> Tensor:
        """Computes attention over frames; all ``(rows, frames, heads, head_dim)``."""
        return tar_attention(query, key, value, change.bias, scale=scale, backend=self.backend)
