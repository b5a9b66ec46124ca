"""How calls are timed: in turn, in another order every round, by wall clock or by CUDA events.

On a GPU the calls are captured as CUDA graphs, of as many calls in a chain as take long enough to
be timed, and the sets of inputs are rotated so that none is found in the cache again. What cannot
be captured is launched behind work that keeps the GPU busy while the CPU queues it.
"""

from __future__ import annotations

import math
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
# An event and the start of a replay take microseconds, as many as a short call: so much is timed as
# one, in seconds, of at most so many calls.
SHORTEST, MOST_CALLS = 200e-6, 256
TRIALS = 3  # of a graph, to find out how many calls take that long

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class TimedCall:
    """A function to time, which is called with one set of inputs after the other.

    ``prepare`` is run before each timed call. ``repeats`` calls are timed as one where a single one
    is too short; ``wall_clock`` times all that happens on the CPU too. What has ``capture`` off is
    launched on a GPU, and not replayed.
    """

    name: str
    function: Callable[..., object]
    prepare: Callable[[], object] = lambda: None
    repeats: int = 1
    wall_clock: bool = False
    capture: bool = True


@dataclass(frozen=True)
class WarmCall:
    """A timed call that has run before; ``run`` takes the number of a set of inputs.

    It makes as many ``calls`` of the function, with that set and those after it.
    """

    timed: TimedCall
    run: Callable[[int], object]
    calls: int = 1


class CaptureError(RuntimeError):
    """A call cannot be captured in a graph.

    PyTorch leaves such a capture open: nothing can be captured, and little be allocated, in this
    process any more.
    """


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
        if timed.wall_clock or not timed.capture:
            return warm
        calls = self._calls(timed, inputs)
        graphs = [
            self._capture(timed.function, _chain(inputs, first, calls))
            for first in range(0, len(inputs), calls)
        ]
        return WarmCall(timed, lambda index: graphs[index % len(graphs)].replay(), calls)

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
        return start.elapsed_time(end) / 1e3 / (call.timed.repeats * call.calls)

    def _calls(self, timed: TimedCall, inputs: Sequence[Tensors]) -> int:
        """Returns how many calls in a chain take ``SHORTEST`` at least."""
        calls = 1
        while True:
            graph = self._capture(timed.function, _chain(inputs, 0, calls))
            chain = WarmCall(timed, lambda _, graph=graph: graph.replay())
            seconds = min(self.seconds(chain, 0) for _ in range(TRIALS))
            if seconds >= SHORTEST or calls == MOST_CALLS:
                return calls
            longer = calls * SHORTEST / max(seconds, SHORTEST / MOST_CALLS)
            calls = min(MOST_CALLS, max(calls + 1, math.ceil(longer)))

    def _capture(
        self, function: Callable[..., object], chain: Sequence[Tensors]
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                for inputs in chain:
                    function(*inputs)
        # Peers synchronise, allocate or compile in a capture, each with an error of its own.
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        return graph


def _chain(inputs: Sequence[Tensors], first: int, calls: int) -> list[Tensors]:
    """Returns so many sets of inputs in turn, from one of them on."""
    return [inputs[(first + n) % len(inputs)] for n in range(calls)]


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
