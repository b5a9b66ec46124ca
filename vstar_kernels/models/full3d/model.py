"""One full-3D transformer under a rule: its layers' seats, and the hook on its forward passes."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.attention.frames.terms import Table, TrainedOfHeads
from vstar_kernels.models.forwards import (
    ForwardPass,
    ForwardPasses,
    called_without_hooks,
    unwatch,
    watch,
)
from vstar_kernels.models.full3d.backend_member import retire_shared
from vstar_kernels.models.full3d.families import Family
from vstar_kernels.models.full3d.layouts import Call
from vstar_kernels.models.full3d.own_masks import SHOWING
from vstar_kernels.models.full3d.routes import make_route
from vstar_kernels.models.full3d.seats import (
    FrameChange,
    FrameLayer,
    Reading,
    Seat,
    Traced,
    seat_of,
)
from vstar_kernels.models.hooks import CopiedHook, Hooks, put_back, take_off
from vstar_kernels.models.schedule import StepGate, timestep_value

Rule = FrameRule | Callable[[int, float], FrameRule | None]
Chooses = Callable[[FrameLayer], bool]
T = TypeVar("T")
HEAD_COUNTS = ("heads", "num_heads", "num_attention_heads")  # what attention modules call them

_INSTALLING = threading.RLock()
_KEYS = itertools.count()


@functools.lru_cache(maxsize=256)
def _one(value: T) -> T:
    """Returns the same object for equal rules or layouts: torch.compile tells them apart by it."""
    return value


@functools.lru_cache(maxsize=256)
def _key(*values: Any) -> str:
    """Returns a name for rules and layouts, the same for the same."""
    return str(next(_KEYS))


def _make_change(rule: FrameRule, reading: Reading, backend: str | None) -> FrameChange:
    """Returns what is done, of objects that are the same for the same."""
    rule = _one(rule)
    layers = {name: _with_one(x) for name, x in reading.layers.items()}
    reading = replace(_with_one(reading), layers=layers)
    layouts = [x for one in (reading, *layers.values()) for x in (one.layout, one.key_layout)]
    return FrameChange(rule, reading, backend, _key(rule, *layouts))


def _with_one(reading: Reading) -> Reading:
    key_layout = reading.key_layout
    return replace(
        reading,
        layout=_one(reading.layout),
        key_layout=None if key_layout is None else _one(key_layout),
    )


@functools.lru_cache(maxsize=32)
def for_heads(
    rule: FrameRule, heads: tuple[int, ...], count: int, layout: Layout, key_layout: Layout | None
) -> FrameRule:
    """Returns a rule that some of ``count`` heads follow, and the others attend as they do.

    Raises:
        ValueError: The rule is more than biases and masks of frames.
    """
    if rule.is_identity:
        raise ValueError("heads= cannot be combined with FrameRule.identity()")
    key_layout = layout if key_layout is None else key_layout
    # What is trained is read at every call; the rest is kept, and of no mode that is on here.
    terms: list[Table] = [
        TrainedOfHeads(term.table, term.strength, term.by_stat, heads, count)
        for term in rule.terms
        if isinstance(term, Table) and term.trained
    ]
    with _disable_current_modes():
        delta, offset, *others = rule.fixed_tables(layout, key_layout)
        if any(table is not None for table in others):
            raise ValueError(
                "heads= takes rules of biases and masks of frames: factors (attenuate) and bands "
                "within frames (band, radial) hold for all heads"
            )
        for table, by_stat in ((delta, True), (offset, False)):
            if table is not None:
                of_heads = torch.zeros(count, *table.shape[-2:], device="cpu", dtype=table.dtype)
                of_heads[list(heads)] = table[list(heads)] if table.ndim == 3 else table
                terms.append(Table(of_heads, 1.0, by_stat))
    return FrameRule(tuple(terms), stat=rule.stat, clamp_negative=rule.clamp_negative)


class RuledPass(ForwardPass):
    """What is done to the layers in one forward pass.

    Args:
        change: What is done; None: nothing.
        traced: What compiled code asks.
    """

    def __init__(self, change: FrameChange | None, traced: Traced) -> None:
        super().__init__()
        self.change = change
        self._traced = traced
        self._outer = traced.inside, traced.change
        traced.inside, traced.change = True, change

    def end(self) -> None:
        """Ends it, for compiled code too."""
        super().end()
        self._traced.inside, self._traced.change = self._outer

    def is_like(self, other: Any) -> bool:
        """Returns whether the same is done in another pass."""
        mine, its = self.change, other.change
        if mine is None or its is None:
            return mine is its
        return bool(
            mine.rule == its.rule
            and mine.reading.layout == its.reading.layout
            and mine.reading.key_layout == its.reading.key_layout
            and mine.reading.key_lengths is None
            and its.reading.key_lengths is None
        )


class RuledModel:
    """A rule on one model; itself a hook on the model, by which it is found and copied.

    Before each forward pass it makes sure that every layer still leads to its seat, looks up
    whether the step is one of the rule's, reads the layouts and begins the :class:`RuledPass`.

    Args:
        name: The model's name in its pipeline.
        model: The model, not wrapped.
        family: What is known of it.
        rule: What to do.
        gate: When to do it.
        layout: Goes before what the call says.
        chooses: Which layers.
        heads: Which heads; None: all.
        backend: As for :func:`vstar_kernels.frame_attention`.

    Raises:
        ValueError: The model has a rule already, or fewer heads.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        family: Family,
        rule: Rule,
        gate: StepGate,
        *,
        layout: Layout | None,
        chooses: Chooses,
        heads: tuple[int, ...] | None,
        backend: str | None,
    ) -> None:
        self.name = name
        self.model = model
        self.family = family
        self.all_layers = family.find_layers(model)
        self.layers = [layer for layer in self.all_layers if chooses(layer)]
        self._rule = rule
        self._gate = gate
        self._layout = layout
        self._chooses = chooses
        self._heads = heads
        self._backend = backend
        self._passes: ForwardPasses[RuledPass] = ForwardPasses(
            f"apply_frames was removed from this {type(model).__name__} while it ran, in another "
            "thread: a part of its layers followed the rule and a part did not",
            opens=self._begin,
        )
        self._hooks = Hooks()
        self._lock = threading.RLock()  # of what is installed
        self._removed = False
        self._seats: list[Seat] = []  # all that were ever taken
        self._traced = Traced()
        self._common = Seat(FrameLayer(f"a layer of {type(model).__name__}", -1, None))
        self._common.controller, self._common.traced = self, self._traced
        self._check_free()
        if heads is not None and heads[-1] >= self._head_count():
            raise ValueError(
                f"heads names index {heads[-1]}, {type(model).__name__} has {self._head_count()} "
                "heads"
            )

    def install(self) -> None:
        """Takes the layers' seats, and puts the hook in."""
        with _INSTALLING:
            self._check_free()
            take_off(self.model, lambda hook: isinstance(hook, CopiedHook))
            self._hooks.before(self.model, self)
        watch(self.model, self._passes)
        if self.family.shows_config:
            SHOWING.put_on(self.model)
        with self._lock:
            self._keep_seats()

    def remove(self) -> None:
        """Takes the hook off, and leaves the layers' seats."""
        with self._lock:
            put_back(
                self._close,
                self._hooks.remove,
                *map(self._leave, list(self._seats)),
                lambda: retire_shared(self._common),
                lambda: SHOWING.take_off(self.model),
                lambda: unwatch(self.model, self._passes),
            )

    def change(self) -> FrameChange | None:
        """Returns what is done in the forward pass that calls a layer.

        Raises:
            RuntimeError: The layer is called outside of a forward pass of the model.
        """
        forward = self._passes.current()
        if forward is not None:
            return forward.change
        if self._removed:
            return None
        raise called_without_hooks(self.model, "attention", "apply_frames")

    def shown_config(self, config: Any) -> Any:
        """Returns what the model reads as its configuration; see ``own_masks.py``."""
        if torch.compiler.is_compiling():
            change = self._traced.change
        else:
            forward = self._passes.current()
            change = None if forward is None else forward.change
        if change is None or change.reading.config is None:
            return config
        return change.reading.config if len(self.layers) == len(self.all_layers) else config

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Marks the model: what runs before each forward pass is :meth:`_begin`."""

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            if self._removed:
                return
            self._keep_seats()
        self._passes.begin(RuledPass(self._find_change(args, kwargs), self._traced))

    def _find_change(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FrameChange | None:
        call = Call(self.model, args, kwargs)
        timestep = self.family.read_timestep(call)
        if not self._gate.is_on(self.model, timestep):
            return None
        rule: Any = self._rule
        if not isinstance(rule, FrameRule):
            rule = rule(self._gate.find(self.model, timestep), timestep_value(timestep))
            if rule is None:
                return None
            if not isinstance(rule, FrameRule):
                raise TypeError(
                    f"a callable rule must return a FrameRule or None, got {type(rule).__name__}"
                )
        reading = self._read(call)
        layout, key_layout = reading.layout, reading.key_layout
        if self._heads is not None:
            rule = for_heads(rule, self._heads, self._head_count(), layout, key_layout)
        if reading.rule is not None:
            rule = reading.rule + rule
        return _make_change(rule, reading, self._backend)

    def _read(self, call: Call) -> Reading:
        if self._layout is not None:
            return Reading(self._layout, "the layout= of apply_frames", is_given=True)
        return self.family.read(call)

    def describe(self) -> str:
        """Returns a line that says which layers follow the rule."""
        names = [layer.name for layer in self.layers]
        shown = names if len(names) <= 4 else [*names[:2], "…", names[-1]]
        heads = "" if self._heads is None else f", heads {', '.join(map(str, self._heads))}"
        where = f"{self.name} ({self.family.name})" if self.name else self.family.name
        count = f"{len(names)} of {len(self.all_layers)} layers"
        return f"{where}: {count}{heads}: {', '.join(shown)}"

    def _head_count(self) -> int:
        module = self.all_layers[0].module
        for name in HEAD_COUNTS:
            count: int | None = getattr(module, name, None)
            if count is not None:
                return count
        raise ValueError(
            f"heads= needs to know how many there are, and a {type(module).__name__} has none of "
            + ", ".join(HEAD_COUNTS)
        )

    def _keep_seats(self) -> None:
        if not all(self._is_in_place(layer) for layer in self.all_layers):
            self.all_layers = self.family.find_layers(self.model)
            self.layers = [layer for layer in self.all_layers if self._chooses(layer)]
        shares = self.family.uniform and self._has_compiled_blocks()
        common = self._common if shares else None
        for layer in self.layers:
            seat = seat_of(layer)
            if seat.controller is not self:
                self._seats.append(seat)  # noted first, so that it can be left at any time
                seat.controller, seat.traced = self, self._traced
            seat.common = common
            seat.keep(lambda seat: make_route(self.family, seat))

    def _has_compiled_blocks(self) -> bool:
        """Returns whether parts of the model are compiled by themselves, the same code for all."""
        parts = (module for module in self.model.modules() if module is not self.model)
        return any(
            part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in parts
        )

    def _is_in_place(self, layer: FrameLayer) -> bool:
        try:
            return self.model.get_submodule(layer.name) is layer.module
        except AttributeError:
            return False

    def _leave(self, seat: Seat) -> Callable[[], None]:
        def leave() -> None:
            if seat.controller is self:
                seat.controller = None
            seat.release()
            seat.common = None

        return leave

    def _close(self) -> None:
        self._removed = True
        self._passes.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes a hook that refuses to run in a copy of the model."""
        return CopiedHook, ("apply_frames",)

    def _check_free(self) -> None:
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(hook, RuledModel):
                raise ValueError(
                    f"this {type(self.model).__name__} is under apply_frames already: remove() "
                    "that handle first, or add the two rules"
                )
