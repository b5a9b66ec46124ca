"""By which route a layer is reached: its backend, a processor of ours, or a mode."""

from __future__ import annotations

from vstar_kernels.models.full3d.backend_member import MemberRoute
from vstar_kernels.models.full3d.families import Family
from vstar_kernels.models.full3d.function_mode import FunctionModeRoute
from vstar_kernels.models.full3d.processors import ProcessorRoute
from vstar_kernels.models.full3d.seats import Route, Seat


def make_route(family: Family, seat: Seat) -> Route:
    """Returns the route to a layer of a model of a family."""
    if family.hook == "backend":
        return MemberRoute(seat)
    return ProcessorRoute(seat) if family.hook == "processor" else FunctionModeRoute(seat)
