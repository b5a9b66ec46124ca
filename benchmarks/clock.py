"""How calls are timed: in turn, in another order every round, by wall clock or by CUDA events.

On a GPU each contestant's calls are captured as CUDA graphs, one for each set of inputs, and the
sets are rotated so that none is found in the cache again. What cannot be captured is launched
behind work that keeps the GPU busy for as long as the CPU needs to queue it.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BUSY_CYCLES = 1_000_000  # about half a millisecond
CACHES = 3  # times the L2 cache, that the inputs of one contestant's calls in turn take
MAX_SETS = 64
FEWEST_ROUNDS = 5

Tensors = tuple[Tensor, ...]


def nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Contestant:
    """What is timed: ``call`` with one set of inputs after the other.

    ``prepare`` is run before each timed call. ``repeats`` calls are timed as one where a single one
    is too short; ``whole`` times all that happens on the CPU too.
    """

    name: str
    call: Callable[..., object]
    prepare: Callable[[], None] = nothing
    repeats: int = 1
    whole: bool = False


@dataclass(frozen=True)
class Ready:
    """A warm contestant; ``call`` takes the number of a set of inputs."""

    contestant: Contestant
    call: Callable[[int], object]


class Clock(Protocol):
    """Times contestants on one kind of device."""

    def sets(self, traffic: int) -> int:
        """How many sets of inputs calls that move so many bytes rotate through."""

    def ready(self, contestant: Contestant, inputs: Sequence[Tensors]) -> Ready:
        """Warm up."""

    def seconds(self, contestant: Contestant, call: Callable[[], object]) -> float:
        """Of one call."""


class CpuClock:
    """Wall time; the inputs of all calls are the same."""

    def sets(self, traffic: int) -> int:
        return 1

    def ready(self, contestant: Contestant, inputs: Sequence[Tensors]) -> Ready:
        contestant.prepare()
        contestant.call(*inputs[0])
        return _launched(contestant, inputs)

    def seconds(self, contestant: Contestant, call: Callable[[], object]) -> float:
        return wall_seconds(call, contestant.repeats)


class GpuClock:
    """CUDA events around graphs; wall time for contestants that are timed whole."""

    def __init__(self) -> None:
        # One for all graphs: none needs what another leaves.
        self._pool = torch.cuda.graph_pool_handle()

    def sets(self, traffic: int) -> int:
        cache = torch.cuda.get_device_properties().L2_cache_size
        return min(max(2, -(-CACHES * cache // traffic) + 1), MAX_SETS)

    def ready(self, contestant: Contestant, inputs: Sequence[Tensors]) -> Ready:
        contestant.prepare()
        for _ in range(2):  # compiles, then runs warm
            contestant.call(*inputs[0])
        torch.cuda.synchronize()
        if contestant.whole:
            return _launched(contestant, inputs)
        try:
            graphs = [self._capture(contestant.call, tensors) for tensors in inputs]
        # Peers synchronise, allocate or compile in a capture, each with an error of its own.
        except Exception:
            torch.cuda.synchronize()
            return _launched(contestant, inputs)
        return Ready(contestant, lambda index: graphs[index].replay())

    def seconds(self, contestant: Contestant, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        if contestant.whole:
            taken = wall_seconds(call, contestant.repeats)
            torch.cuda.synchronize()
            return taken
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        for _ in range(contestant.repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / contestant.repeats

    def _capture(self, call: Callable[..., object], inputs: Tensors) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call(*inputs)
        return graph


def _launched(contestant: Contestant, inputs: Sequence[Tensors]) -> Ready:
    return Ready(contestant, lambda index: contestant.call(*inputs[index]))


def wall_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Of one of so many calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def clock_for(device: str) -> Clock:
    """The device's clock."""
    return GpuClock() if device == "cuda" else CpuClock()


def time_in_turn(
    clock: Clock,
    contestants: Sequence[Ready],
    num_sets: int,
    *,
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds by contestant and round: ``rounds`` of them, fewer where they take too long.

    A round before them is not timed: it finds the memory as all contestants leave it. After
    ``FEWEST_ROUNDS`` no round begins once ``seconds`` have passed.
    """
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {x.contestant.name: [] for x in contestants}
    for ready in order:
        ready.contestant.prepare()
        ready.call(0)
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for ready in order:
            ready.contestant.prepare()
            call = functools.partial(ready.call, turn % num_sets)
            times[ready.contestant.name].append(clock.seconds(ready.contestant, call))
    return times
