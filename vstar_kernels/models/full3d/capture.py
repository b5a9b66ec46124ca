"""The maps between frames of full-3D transformers, while they sample, for ``capture_maps``.

A watcher sits beside each layer that is captured: it sees the queries and keys that the layer
attends with, and what a rule makes of them, if one is on. What the layer returns stays the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import FrameMap, frame_map
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.full3d.families import Family
from vstar_kernels.models.full3d.layouts import Call
from vstar_kernels.models.full3d.routes import make_route
from vstar_kernels.models.full3d.seats import (
    FrameChange,
    FrameLayer,
    Reading,
    Seat,
    check,
    seat_of,
)
from vstar_kernels.models.hooks import Hooks, put_back
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.schedule import timestep_value

_LOCK = threading.RLock()  # of the watchers of all seats
NO_TIMESTEP = float("nan")  # of a model of an unknown class that is told none


class _WatchedPass(ForwardPass):
    """One forward pass of a full-3D transformer, and the maps that it has given so far.

    Args:
        call: The model's arguments.
        step: The index of the denoising step, if it is known.
        timestep: What the model is given; of several, the noisiest.
        branch: The side of guidance, see :class:`AttentionMap`.
        wanted: The names of the layers that are to be captured.
        keeps_graph: Whether the maps are in autograd's graph.
    """

    def __init__(
        self,
        call: Call,
        step: int | None,
        timestep: float,
        branch: int,
        wanted: set[str],
        *,
        keeps_graph: bool,
    ) -> None:
        super().__init__()
        self.call: Call | None = call
        self.step = step
        self.timestep = timestep
        self.branch = branch
        self.wanted = wanted
        self.keeps_graph = keeps_graph
        self.reading: Reading | None = None
        self.maps: list[FrameMap] = []

    def end(self) -> None:
        """Lets go of what it holds of the model's activations; its reading may be asked again."""
        super().end()
        self.call, self.maps = None, []

    def is_like(self, other: Any) -> bool:
        """Returns whether a layer that is called again has a map of the same kind in both."""
        mine, its = self.reading, other.reading
        return bool(
            (self.wanted, self.keeps_graph) == (other.wanted, other.keeps_graph)
            and mine is not None
            and its is not None
            and mine.layout == its.layout
            and mine.key_layout == its.key_layout
            and mine.key_lengths is its.key_lengths is None
        )


class FrameWatch:
    """What watches the layers of one full-3D transformer.

    Args:
        capture: What takes the maps, and says which ones it wants.
        name: The model's name in its pipeline.
        model: The model, not wrapped.
        family: What is known of it.
        layout: Goes before what the call says.
        heads: Whether to keep the map of each head.

    Attributes:
        passes: Its forward passes.
    """

    def __init__(
        self,
        capture: MapCapture,
        name: str,
        model: nn.Module,
        family: Family,
        *,
        layout: Layout | None,
        heads: bool,
    ) -> None:
        self._capture = capture
        self._name = name
        self._model = model
        self._family = family
        self._layout = layout
        self._heads = heads
        self.passes: ForwardPasses[_WatchedPass] = ForwardPasses()
        self._hooks = Hooks()
        self._seats: list[Seat] = []  # all that were ever watched
        self._removed = False

    def install(self) -> None:
        """Puts the hooks on the model; it sits down at its layers with the first forward pass."""
        watch(self._model, self.passes)
        self._hooks.before(self._model, self._begin)
        self._hooks.after(self._model, self._end)

    def remove(self) -> None:
        """Takes all hooks off, and leaves the seats; nothing happens the second time."""
        with _LOCK:
            put_back(
                self._close,
                self._hooks.remove,
                *(self._leaving(seat) for seat in list(self._seats)),
                lambda: unwatch(self._model, self.passes),
            )

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
        """Takes the map of a layer's call, as it attends."""
        forward = self.passes.current()
        if forward is None or self._removed or layer.name not in forward.wanted:
            return
        # Gradient checkpointing wants the operations again that are in the graph, not their result.
        is_running = forward.ended is None
        if not is_running and not forward.keeps_graph:
            return
        if change is not None:
            forward.reading = change.reading
        reading = self._reading(forward)
        reading = reading.of(layer)
        rule = reading.rule if change is None else change.rule
        check(layer, query, key, reading, masked and key_lengths is None)
        with torch.set_grad_enabled(forward.keeps_graph and torch.is_grad_enabled()):
            found, positions = frame_map(
                query,
                key,
                reading.layout,
                rule,
                key_layout=reading.key_layout,
                key_lengths=reading.key_lengths if key_lengths is None else key_lengths,
                scale=scale,
                heads=self._heads,
                max_rows=self._capture.max_rows,
            )
        if is_running:
            forward.maps.append(self._as_map(layer, forward, reading.layout, found, positions))

    def _as_map(
        self,
        layer: FrameLayer,
        forward: _WatchedPass,
        layout: Layout,
        found: Tensor,
        positions: int,
    ) -> FrameMap:
        if not self._capture.differentiable:
            found = found.cpu()
        mean = found.mean(1) if self._heads else found
        return FrameMap(
            model=self._name,
            layer=layer.name,
            level=0,
            place="blocks",
            step=forward.step,
            timestep=forward.timestep,
            branch=forward.branch,
            map=mean[..., :-1],
            positions=positions,
            text=mean[..., -1],
            heads=found if self._heads else None,
            coordinates=layout.coordinates,
        )

    def _reading(self, forward: _WatchedPass) -> Reading:
        """Returns what the model's call says, once a layer asks for it."""
        if forward.reading is None:
            if self._layout is not None:
                forward.reading = Reading(
                    self._layout, "the layout= of capture_maps", is_given=True
                )
            else:
                assert forward.call is not None
                forward.reading = self._family.read(forward.call)
        return forward.reading

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is None:  # another thread has just taken the hook off
            return
        call = Call(model, args, kwargs)
        timestep = self._family.read_timestep(call)
        step = self._capture.steps.find(model, timestep)
        wanted = self._watch_layers() if self._capture.steps.wants(step) else set()
        is_told = timestep is not None and isinstance(call.sample, Tensor)
        branch = 0
        if is_told:
            scheduler = self._capture.steps.find_scheduler(model)
            branch = self.passes.turns.branch(call.timestep, call.sample, scheduler)
        self.passes.begin(
            _WatchedPass(
                call,
                step,
                NO_TIMESTEP if timestep is None else timestep_value(timestep),
                branch,
                wanted,
                keeps_graph=self._capture.differentiable and torch.is_grad_enabled(),
            )
        )

    def _end(self, *_: object) -> None:
        # A layer that was not called is one that a cache has skipped.
        forward = self.passes.current()
        if forward is not None and not forward.is_cut:
            self._capture.add(forward.maps)

    def _watch_layers(self) -> set[str]:
        """Sits down beside the layers that are to be captured, and sees that they are reached.

        Layers and processors may have been replaced since the last forward pass.
        """
        layers = [x for x in self._family.find_layers(self._model) if self._capture.chooses(x)]
        with _LOCK:
            for layer in [] if self._removed else layers:
                seat = seat_of(layer)
                if self not in seat.watchers:
                    self._seats.append(seat)  # noted first, so that it can be left at any time
                    seat.watchers = (*seat.watchers, self)
                seat.keep(lambda seat: make_route(self._family, seat))
        return {layer.name for layer in layers}

    def _leaving(self, seat: Seat) -> Callable[[], None]:
        def leave() -> None:
            seat.watchers = tuple(x for x in seat.watchers if x is not self)
            seat.release()

        return leave

    def _close(self) -> None:
        self._removed = True
        self.passes.close()
