"""Test cases in which every pair of options occurs."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(options: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Choices from ``options`` such that any two values of different options meet in one of them.

    Greedy: of some random cases around a pair that is still missing, the one that adds most pairs.
    """
    draw = random.Random(seed)
    names = list(options)
    indices = {name: range(len(values)) for name, values in options.items()}
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i in indices[a]
        for j in indices[b]
    }
    cases = []
    while missing:
        wanted = dict(min(missing, key=sorted))
        candidates = [{n: draw.choice(indices[n]) for n in names} | wanted for _ in range(50)]
        best = max(candidates, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        cases.append({name: options[name][index] for name, index in best.items()})
    return cases


def some(options: dict[str, list[Any]], count: int) -> list[dict[str, Any]]:
    """Returns so many of :func:`pairwise`'s cases, those with the most pairs, for slow tests."""
    places = {name: {repr(value): i for i, value in enumerate(x)} for name, x in options.items()}
    cases = pairwise(options)
    pairs = [_pairs({name: places[name][repr(x)] for name, x in case.items()}) for case in cases]
    chosen: list[int] = []
    met: set[frozenset[tuple[str, int]]] = set()
    while len(chosen) < count:
        best = max(range(len(cases)), key=lambda n: len(pairs[n] - met))
        chosen.append(best)
        met |= pairs[best]
    return [cases[n] for n in sorted(chosen)]


def _pairs(case: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
