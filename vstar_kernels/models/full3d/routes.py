"""By which route a layer is reached: through its backend, or by a processor of ours.

Where a model's processors do not go through diffusers' attention dispatcher, one of ours takes the
place of the processor (route B), or runs the processor with PyTorch's attention exchanged (C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from vstar_kernels.models.full3d.backend_member import MemberRoute
from vstar_kernels.models.full3d.families import Family
from vstar_kernels.models.full3d.seats import Route, Seat


class SeatProcessor:
    """A processor of ours in the place of a model's: computes what leads to ``attend(seat, …)``.

    A subclass has ``__call__`` with the keywords of the processor that it stands for, as
    ``Attention.forward`` passes on only those that it finds there by name. Where
    ``seat.change()`` is None it returns what ``previous`` returns.

    Attributes:
        seat: The layer's.
        previous: The processor that it took the place of.
    """

    def __init__(self, seat: Seat, previous: Any) -> None:
        self.seat = seat
        self.previous = previous

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies what was there before, as nothing controls the copy of a model under a rule."""
        return _same, (self.previous,)


def _same(value: Any) -> Any:
    return value


class ProcessorRoute:
    """Routes B and C of one layer.

    Args:
        seat: The layer's.
        make: Makes a processor of ours for the one that it takes the place of; raises ValueError
            where it cannot stand for it.
    """

    def __init__(self, seat: Seat, make: Callable[[Seat, Any], SeatProcessor]) -> None:
        self._seat = seat
        self._make = make
        # All that were ever put in: a model may keep one, and put it back later.
        self._made: WeakSet[SeatProcessor] = WeakSet()

    def is_in(self) -> bool:
        """Returns whether the layer has a processor of ours."""
        return self._seat.layer.module.processor in self._made

    def put_in(self) -> None:
        """Gives the layer a processor of ours."""
        module = self._seat.layer.module
        processor = self._make(self._seat, module.processor)
        self._made.add(processor)  # noted first, so that it can be undone at any time
        _set_processor(module, processor)

    def take_out(self) -> None:
        """Gives the layer its own processor back, where it still has one of ours."""
        module = self._seat.layer.module
        if module.processor in self._made:
            _set_processor(module, module.processor.previous)


def _set_processor(module: Any, processor: Any) -> None:
    """Gives a module a processor, by its ``set_processor`` where it has one (Mochi has not)."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def make_route(family: Family, seat: Seat) -> Route:
    """Returns the route to a layer of a model of a family."""
    return MemberRoute(seat)
