"""Memory that is watched: its bounds, alignment, and who touched which place since which barrier.

A race is an access that another warp's to the same place has no barrier before or after, one of
the two a store; between two programs of a launch there is none at all. Each place of ``UNIT`` bytes
has the stamps of its last writer and last reader, which say the warp and after which barrier.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIT = 2  # bytes; accesses of single bytes are not looked at for races
WARPS = 64  # at most, of one program
EVERY_WARP = WARPS - 1  # who reads or writes for all of them: an asynchronous unit
MOST_WATCHED = 2**28  # bytes of a tensor; the stamps of one take some 13 times as many
WIDEST = 16  # bytes of a thread's access
UNWRITTEN = 0xFF  # what no one has written: NaN in all types
Ints = NDArray[np.int64]


class FaultError(RuntimeError):
    """What a GPU would fail at, or compute wrongly by chance."""


@dataclass(frozen=True)
class Moment:
    """Where a program is: after which barrier, of all that the launch has seen.

    ``first`` is the program's own first one.
    """

    epoch: int
    first: int

    def stamps(self, warps: Ints) -> Ints:
        """Returns the stamps of accesses by these warps."""
        return self.epoch * WARPS + warps


class Watch:
    """The stamps of a memory's places, 0 where nobody was."""

    def __init__(self, size: int) -> None:
        units = -(-size // UNIT)
        self.written = np.zeros(units, np.int64)
        self.read = np.zeros(units, np.int64)
        self.read_by_several = np.zeros(units, np.int64)  # stamps' epochs
        self.read_elsewhere = np.zeros(units, bool)  # by several programs

    def reads(self, units: Ints, warps: Ints, now: Moment) -> None:
        """Notes that these warps read these places.

        Raises:
            FaultError: Another one has written there, and no barrier is between.
        """
        self.refuse_unordered(units, warps, now)
        stamps = now.stamps(warps)
        before = self.read[units]
        several = units[(before // WARPS == now.epoch) & (before != stamps)]
        self.read_elsewhere[units[(before != 0) & (before // WARPS < now.first)]] = True
        self.read[units] = stamps
        self.read_by_several[several] = now.epoch
        self.read_by_several[units[self.read[units] != stamps]] = now.epoch

    def refuse_unordered(self, units: Ints, warps: Ints, now: Moment) -> None:
        """Raises what :meth:`reads` raises, of a reader that is waited for otherwise."""
        stamps = now.stamps(warps)
        self._refuse(self.written[units], stamps, now, "reads what another warp writes", units)

    def writes(self, units: Ints, warps: Ints, now: Moment) -> None:
        """Notes that these warps write these places.

        Raises:
            FaultError: Another one reads or writes there, and no barrier is between.
        """
        stamps = now.stamps(warps)
        self._refuse(self.written[units], stamps, now, "writes what another warp writes", units)
        self._refuse(self.read[units], stamps, now, "writes what another warp reads", units)
        if np.any(bad := self.read_by_several[units] == now.epoch):
            raise FaultError(f"writes what another warp reads, at byte {UNIT * units[bad][0]}")
        if np.any(bad := self.read_elsewhere[units]):
            raise FaultError(f"writes what another program reads, {UNIT * units[bad][0]}")
        self.written[units] = stamps

    @staticmethod
    def _refuse(before: Ints, stamps: Ints, now: Moment, what: str, units: Ints) -> None:
        epochs = before // WARPS
        here = (epochs == now.epoch) & (before != stamps)
        elsewhere = (before != 0) & (epochs < now.first)
        if here.any():
            raise FaultError(f"{what} without a barrier, at byte {UNIT * units[here][0]}")
        if elsewhere.any():
            what = what.replace("warp", "program")
            raise FaultError(f"{what}, at byte {UNIT * units[elsewhere][0]}")


class Region:
    """Bytes in a row, watched."""

    def __init__(self, name: str, start: int, data: NDArray[np.uint8], before: int = 0) -> None:
        self.name, self.start, self.end = name, start, start + len(data) - before
        self.base = start - before  # a multiple of what any access is; the data is from there on
        self.views = {
            size: data[: len(data) // size * size].view(f"u{size}") for size in (1, 2, 4, 8)
        }
        self.watch = Watch(len(data)) if len(data) <= MOST_WATCHED else None

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes."""
        return self.views[1]

    def load(
        self, addresses: Ints, size: int, count: int, warps: Ints, now: Moment
    ) -> NDArray[np.unsignedinteger]:
        """Returns ``count`` numbers of ``size`` bytes from each address: ``(addresses, count)``."""
        places = self._places(addresses, size, count, "loads")
        self._watch("reads", addresses, size * count, warps, now)
        return self.views[size][places]

    def store(
        self, addresses: Ints, values: NDArray[np.unsignedinteger], warps: Ints, now: Moment
    ) -> None:
        """Stores ``(addresses, count)`` numbers."""
        size, count = values.dtype.itemsize, values.shape[1]
        places = self._places(addresses, size, count, "stores")
        self._watch("writes", addresses, size * count, warps, now)
        data = self.views[size]
        data[places] = values
        if np.array_equal(data[places], values):
            return
        # Of a warp's threads that store to one place one is heard, always the same. Copies of a sum
        # may differ in their last bit, as multiply-adds round less of a thread's own part.
        of_warps = {}
        for warp in np.unique(warps):
            own = places[warps == warp]
            data[own] = values[warps == warp]
            of_warps[warp] = own, data[own]
        for warp, (own, stored) in of_warps.items():
            if np.any(bad := data[own] != stored):
                raise FaultError(
                    f"warp {warp} and another one store different numbers to {self.name}, at byte"
                    f" {size * own[bad][0]}"
                )

    def arrive(self, addresses: Ints, values: NDArray[np.unsignedinteger]) -> None:
        """Stores numbers that all warps have waited for."""
        self.views[values.dtype.itemsize][
            self._places(addresses, values.dtype.itemsize, 1, "stores")
        ] = values
        self.watch.written[self.units(addresses, values.dtype.itemsize)] = 0

    def note_read(
        self, addresses: Ints, width: int, warp: int, now: Moment, *, waited: bool = False
    ) -> None:
        """Notes that a warp reads so many bytes from each address.

        Where the reader is ``waited`` for by an mbarrier, it is only seen to that they are there.
        """
        what = "refuse_unordered" if waited else "reads"
        self._watch(what, addresses, width, np.full(len(addresses), warp), now)

    def _places(self, addresses: Ints, size: int, count: int, does: str) -> Ints:
        width = size * count
        if np.any(bad := addresses % width != 0):
            raise FaultError(
                f"{does} {width} bytes of {self.name} at {addresses[bad][0]:#x}, which is no"
                f" multiple of that"
            )
        if np.any(bad := (addresses < self.start) | (addresses + width > self.end)):
            raise FaultError(
                f"{does} {width} bytes of {self.name} at byte {addresses[bad][0] - self.start},"
                f" which has {self.end - self.start}"
            )
        return (addresses - self.base)[:, None] // size + np.arange(count)

    def units(self, addresses: Ints, width: int) -> Ints:
        """Returns the places of so many bytes from each address on, ``(addresses, units)``."""
        return (addresses[:, None] - self.base) // UNIT + np.arange(-(-width // UNIT))

    def _watch(self, what: str, addresses: Ints, width: int, warps: Ints, now: Moment) -> None:
        if self.watch is None or width < UNIT:
            return
        units = self.units(addresses, width)
        by_unit = np.broadcast_to(warps[:, None], units.shape)
        getattr(self.watch, what)(units.ravel(), by_unit.ravel(), now)


class Memory:
    """The tensors of a launch, by the addresses that they have on the CPU."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, name: str, address: int, size: int) -> None:
        """Adds so many bytes that lie at an address; of those that overlap there is one region."""
        start, end = address, address + size
        for other in [x for x in self.regions if x.start < end and start < x.end]:
            start, end = min(start, other.start), max(end, other.end)
            self.regions.remove(other)
        if size:
            before = start % WIDEST
            base, size = start - before, end - start + before
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            bisect.insort(self.regions, Region(name, start, data, before), key=lambda x: x.start)

    def load(
        self, addresses: Ints, size: int, count: int, warps: Ints, now: Moment
    ) -> NDArray[np.unsignedinteger]:
        """Loads as :meth:`Region.load` does, from whichever region each address is in."""
        found = np.empty((len(addresses), count), f"u{size}")
        for region, chosen in self._by_region(addresses, "loads"):
            loaded = region.load(addresses[chosen], size, count, warps[chosen], now)
            found[chosen] = loaded
        return found

    def store(
        self, addresses: Ints, values: NDArray[np.unsignedinteger], warps: Ints, now: Moment
    ) -> None:
        """Stores as :meth:`Region.store` does."""
        for region, chosen in self._by_region(addresses, "stores"):
            region.store(addresses[chosen], values[chosen], warps[chosen], now)

    def bytes_at(self, address: int, size: int) -> bytes:
        """Returns so many bytes, which nobody writes in a launch."""
        ((region, _),) = self._by_region(np.array([address]), "reads")
        return region.data[address - region.base :][:size].tobytes()

    def _by_region(self, addresses: Ints, does: str) -> list[tuple[Region, NDArray[np.bool_]]]:
        starts = np.array([x.start for x in self.regions], np.int64)
        number = np.searchsorted(starts, addresses, side="right") - 1
        ends = np.array([*[x.end for x in self.regions], 0], np.int64)  # the last: of number −1
        if np.any(bad := addresses >= ends[number]):
            raise FaultError(f"{does} at {addresses[bad][0]:#x}, where no tensor is")
        return [(self.regions[n], number == n) for n in np.unique(number)]
