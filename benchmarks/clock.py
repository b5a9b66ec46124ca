"""How calls are timed: in turn, in another order every round, by wall clock or by CUDA events.

On a GPU the calls are captured as CUDA graphs, one for each set of inputs, and the sets are rotated
so that none is found in the cache again. What cannot be captured is launched behind work that keeps
the GPU busy for as long as the CPU needs to queue it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUSY_CYCLES = 1_000_000  # about half a millisecond
CACHES = 3  # times the L2 cache, that the inputs of successive calls take
MAX_SETS = 64
FEWEST_ROUNDS = 5

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class TimedCall:
    """A function to time, which is called with one set of inputs after the other.

    ``prepare`` is run before each timed call. ``repeats`` calls are timed as one where a single one
    is too short; ``wall_clock`` times all that happens on the CPU too.
    """

    name: str
    function: Callable[..., object]
    prepare: Callable[[], object] = lambda: None
    repeats: int = 1
    wall_clock: bool = False


@dataclass(frozen=True)
class WarmCall:
    """A timed call that has run before; ``run`` takes the number of a set of inputs."""

    timed: TimedCall
    run: Callable[[int], object]


class CpuClock:
    """Measures wall time; the inputs of all calls are the same."""

    def sets(self, traffic: int) -> int:
        """Returns how many sets of inputs rotate for calls that move ``traffic`` bytes."""
        return 1

    def warm_up(self, timed: TimedCall, inputs: Sequence[Tensors]) -> WarmCall:
        """Runs the call until it is as fast as it gets."""
        timed.prepare()
        timed.function(*inputs[0])
        return WarmCall(timed, lambda index: timed.function(*inputs[index]))

    def seconds(self, call: WarmCall, index: int) -> float:
        """Returns the time of one call with a set of inputs."""
        start = time.perf_counter()
        for _ in range(call.timed.repeats):
            call.run(index)
        return (time.perf_counter() - start) / call.timed.repeats


class GpuClock(CpuClock):
    """Measures CUDA events around graphs, and wall time where the CPU's part is wanted."""

    def __init__(self) -> None:
        # One for all graphs: none needs what another leaves.
        self._pool = torch.cuda.graph_pool_handle()

    def sets(self, traffic: int) -> int:
        cache = torch.cuda.get_device_properties().L2_cache_size
        return min(max(2, -(-CACHES * cache // traffic) + 1), MAX_SETS)

    def warm_up(self, timed: TimedCall, inputs: Sequence[Tensors]) -> WarmCall:
        warm = super().warm_up(timed, inputs)
        warm.run(0)  # the first call compiles
        torch.cuda.synchronize()
        if timed.wall_clock:
            return warm
        try:
            graphs = [self._capture(timed.function, tensors) for tensors in inputs]
        # Peers synchronise, allocate or compile in a capture, each with an error of its own.
        except Exception:
            torch.cuda.synchronize()
            return warm
        return WarmCall(timed, lambda index: graphs[index].replay())

    def seconds(self, call: WarmCall, index: int) -> float:
        torch.cuda.synchronize()
        if call.timed.wall_clock:
            seconds = super().seconds(call, index)
            torch.cuda.synchronize()
            return seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        for _ in range(call.timed.repeats):
            call.run(index)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / call.timed.repeats

    def _capture(self, function: Callable[..., object], inputs: Tensors) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function(*inputs)
        return graph


def clock_for(device: str) -> CpuClock:
    """Returns the device's clock."""
    return GpuClock() if torch.device(device).type == "cuda" else CpuClock()


def time_in_turn(
    clock: CpuClock, calls: Sequence[WarmCall], num_sets: int, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Returns the seconds by name and round: ``rounds`` of them, fewer where they take too long.

    A round before them is not timed: it finds the memory as all calls leave it. After
    ``FEWEST_ROUNDS`` no round begins once ``seconds`` have passed.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle  # an order that repeats, no secret  # nosec B311
    times: dict[str, list[float]] = {call.timed.name: [] for call in calls}
    for call in order:
        call.timed.prepare()
        call.run(0)
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for call in order:
            call.timed.prepare()
            times[call.timed.name].append(clock.seconds(call, turn % num_sets))
    return times
