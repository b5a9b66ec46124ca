"""One self-attention layer of a full-3D transformer: where rule, watchers and route meet.

A route puts something into the layer that computes its queries, keys and values and then calls
:func:`attend`. Routes know their kind of model, and nothing of rules; what controls or watches the
layer knows nothing of routes. Both meet in the layer's :class:`Seat`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.hooks import plain_name


@dataclass(frozen=True)
class FrameLayer:
    """One self-attention module over all tokens of a video.

    Attributes:
        name: The module's name in its model.
        index: Its place among them in the order of the model, from 0.
        module: The attention module.
    """

    name: str
    index: int
    module: Any


@dataclass(frozen=True, eq=False)
class Reading:
    """What the arguments of a model's call say about the sequences of its video self-attention.

    Attributes:
        layout: The frame of each query.
        source: What it was read from, in words, for the error if it does not fit.
        key_layout: The frame of each key, where keys are others than the queries.
        key_lengths: ``(batch,)`` int32: how many keys of each sequence exist. None: all.
        rule: What the model itself masks, as a rule; None: nothing.
        masked: Whether ``key_lengths`` and ``rule`` say all that the layers' own mask says.
        config: What the model is to read as its configuration where all layers follow ``rule``, so
            that it makes no mask; None: its own.
        layers: Readings for the layers whose sequences are others, by the layers' plain names; of
            the same frames.
        is_given: Whether the caller gave it, and not the call.
    """

    layout: Layout
    source: str
    key_layout: Layout | None = None
    key_lengths: Tensor | None = None
    rule: FrameRule | None = None
    masked: bool = False
    config: Any = None
    layers: Mapping[str, Reading] = field(default_factory=dict)
    is_given: bool = False

    def of(self, layer: FrameLayer) -> Reading:
        """Returns the reading for a layer."""
        return self.layers.get(plain_name(layer.name), self) if self.layers else self


@dataclass(frozen=True, eq=False)
class FrameChange:
    """What is done to the attention of a model's controlled layers in one forward pass.

    Attributes:
        rule: What is done between frames, the model's own mask included.
        reading: The layouts, and what the layers mask.
        backend: As for :func:`vstar_kernels.frame_attention`.
        key: Tells it from all others; compiled code is compiled for one.
    """

    rule: FrameRule
    reading: Reading
    backend: str | None
    key: str


class Controller(Protocol):
    """What knows what is done to the layers of a model, forward pass by forward pass."""

    def change(self) -> FrameChange | None:
        """Returns what is done in the forward pass that calls; None: nothing.

        Raises:
            RuntimeError: A layer is called outside of a forward pass of its model.
        """


class Watcher(Protocol):
    """What looks on while a layer attends, in eager mode."""

    def see(
        self,
        layer: FrameLayer,
        query: Tensor,
        key: Tensor,
        change: FrameChange | None,
        *,
        key_lengths: Tensor | None,
        scale: float | None,
        masked: bool,
    ) -> None:
        """Takes what :func:`attend` is called with, and what is done."""


class Traced(threading.local):
    """What is done in the forward pass that runs in this thread, for code under torch.compile."""

    def __init__(self) -> None:  # of each thread: torch 2.11 traces a class's attributes instead
        self.inside = False
        self.change: FrameChange | None = None


class Route(Protocol):
    """How the attention of a kind of layers is reached: what it puts into one of them."""

    def is_in(self) -> bool:
        """Returns whether what it puts in is there."""

    def put_in(self) -> None:
        """Puts it in; what it takes the place of is noted first."""

    def take_out(self) -> None:
        """Puts back all that it took the place of; nothing happens the second time."""


class Seat:
    """One layer: who controls it, who watches it, and its route.

    Args:
        layer: The layer.

    Attributes:
        controller: What says how it attends; None: as the model does.
        traced: What compiled code asks in the place of ``controller``.
        watchers: What looks on.
        route: How it is reached; there is one from the first :meth:`keep` to the last
            :meth:`release`.
        common: What stands for all controlled layers of a model, where they share compiled code:
            torch.compile would compile it once more for each of them. None: each has its own.
    """

    def __init__(self, layer: FrameLayer) -> None:
        self.layer = layer
        self.controller: Controller | None = None
        self.traced: Traced = _NOTHING
        self.watchers: tuple[Watcher, ...] = ()
        self.route: Route | None = None
        self.common: Seat | None = None

    def change(self) -> FrameChange | None:
        """Returns what is done in the call that runs; None: the model's own attention.

        Raises:
            RuntimeError: It is called outside of a forward pass of its model.
        """
        if torch.compiler.is_compiling() and self.traced.inside:
            return self.traced.change
        controller = self.controller  # which another thread may take away
        return None if controller is None else controller.change()

    def is_taken(self) -> bool:
        """Returns whether the call that runs is changed or watched."""
        return bool(self.watchers) or self.change() is not None

    def keep(self, make_route: Callable[[Seat], Route]) -> None:
        """Has the route in place, whatever has been done to the layer meanwhile."""
        if self.route is None:
            self.route = make_route(self)
        if not self.route.is_in():
            self.route.put_in()

    def release(self) -> None:
        """Takes the route out if nobody controls or watches the layer any more."""
        if self.route is not None and self.controller is None and not self.watchers:
            self.route.take_out()
            self.route = None


_NOTHING = Traced()
# By the id of the layer's module, which a seat keeps alive, as what is here must not: whoever
# controls or watches a layer keeps its seat, and the model's hooks keep them.
_SEATS: WeakValueDictionary[int, Seat] = WeakValueDictionary()
_LOCK = threading.RLock()


def seat_of(layer: FrameLayer) -> Seat:
    """Returns the seat of a layer, the same one as long as somebody keeps it."""
    with _LOCK:
        seat = _SEATS.get(id(layer.module))
        if seat is None:
            seat = _SEATS[id(layer.module)] = Seat(layer)
        seat.layer = layer  # its name may have changed
        return seat


def attend(
    seat: Seat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    masked: bool = False,
    stock: Callable[[], Tensor],
) -> Tensor:
    """Returns the attention of one layer's call, as its controller has it.

    Args:
        seat: The layer's.
        query, key, value: ``(batch, tokens, heads, head_dim)``, normed, with positions.
        key_lengths: Goes before what was read from the model's call, see :class:`Reading`.
        scale: As for :func:`vstar_kernels.frame_attention`.
        masked: Whether the model passes a mask of its own to its attention, which the reading must
            account for.
        stock: Computes what the model itself computes in this call.

    Returns:
        ``(batch, tokens, heads, head_dim)``.

    Raises:
        ValueError: The sequence is not what the model's arguments said, or the model masks what
            nothing accounts for.
    """
    change = seat.change()
    if change is not None and key_lengths is None:
        key_lengths = change.reading.of(seat.layer).key_lengths
    for watcher in seat.watchers:
        watcher.see(
            seat.layer, query, key, change, key_lengths=key_lengths, scale=scale, masked=masked
        )
    if change is None or _skips_scores():
        return stock()
    assert change.key  # which torch.compile holds the next call against, as it cannot a rule
    reading = change.reading.of(seat.layer)
    check(seat.layer, query, key, reading, masked)
    return frame_attention(
        query,
        key,
        value,
        reading.layout,
        change.rule,
        key_layout=reading.key_layout,
        key_lengths=key_lengths,
        scale=scale,
        backend=change.backend,
    )


def check(layer: FrameLayer, query: Tensor, key: Tensor, reading: Reading, masked: bool) -> None:
    """Raises ValueError unless a call is of the sequences that were read."""
    if masked and not reading.masked:
        raise ValueError(
            f"{layer.name} masks its attention, and nothing that {reading.source} says tells which "
            "keys of which frames: frame_attention would leave the mask out"
        )
    key_layout = reading.layout if reading.key_layout is None else reading.key_layout
    for name, tensor, layout in (("queries", query, reading.layout), ("keys", key, key_layout)):
        if tensor.shape[1] != layout.tokens:
            takes_layout = not reading.is_given and reading.key_layout is None
            raise ValueError(
                f"{layer.name} was called with {tensor.shape[1]} {name}, but {reading.source} "
                f"{'says' if reading.is_given else 'say'} {layout.tokens}: {layout}"
                f"{'. Give the layout=' if takes_layout else ''}"
            )


def _skips_scores() -> bool:
    """Returns whether diffusers runs the layer to skip its attention scores (PAG, STG).

    Its mode catches PyTorch's own attention, which the model's own way leads to.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)
