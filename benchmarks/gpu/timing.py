"""How GPU calls are timed: with CUDA events, on inputs that are not in the cache, in turn.

Before each call the GPU is kept busy for as long as the CPU needs to queue it, so that launching is
not in its time; calls of all contestants alternate, so that clocks and neighbours hit all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUSY_CYCLES = 1_000_000  # about half a millisecond
CACHES = 3  # times the L2 cache, that the inputs of one contestant's calls in turn take
MAX_SETS = 64

Call = Callable[..., object]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant over the rounds, or why there are none."""

    median: float | None
    quartiles: list[float]
    error: str = ""


def sets_needed(traffic: int) -> int:
    """How many sets of inputs it takes to find none of them in the cache again."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(max(2, -(-CACHES * cache // traffic) + 1), MAX_SETS)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Query, key and value."""
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    query, key, value = (torch.randn(shape, **options) for _ in range(3))
    return query, key, value


def compare(
    contestants: dict[str, Call], inputs: Sequence[Inputs], rounds: int
) -> dict[str, Times]:
    """The times of ``contestants``, each called with one set of inputs after the other.

    A contestant that fails is left out, with the reason as its result; that it may fail is part of
    what is measured.
    """
    errors: dict[str, str] = {}
    for name, call in contestants.items():
        try:
            for _ in range(2):  # compiles, then runs warm
                call(*inputs[0])
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, AssertionError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            torch.cuda.empty_cache()
    running = {name: call for name, call in contestants.items() if name not in errors}
    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, call in running.items():
            times[name].append(once(call, inputs[turn % len(inputs)]))
    found = {name: Times(statistics.median(x), _quartiles(x)) for name, x in times.items()}
    return found | {name: Times(None, [], error) for name, error in errors.items()}


def once(call: Call, inputs: Inputs) -> float:
    """Seconds of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    call(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times, n=4)[::2]
