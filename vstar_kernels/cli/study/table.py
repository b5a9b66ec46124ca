"""The scores of a study as tables: of its videos, and of its variants."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vstar_kernels.cli.study.plan import Variant

Column = str


@dataclass(frozen=True)
class Row:
    """The scores of one video.

    Attributes:
        number, folder: The video's.
        prompt, variant, seed: What it is of.
        values, curves, matrices: Its scores, see :class:`vstar_kernels.cli.study.scores.Scored`.
    """

    number: int
    folder: str
    prompt: str
    variant: Variant
    seed: int
    values: Mapping[Column, float]
    curves: Mapping[str, Sequence[float]]
    matrices: Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Mean:
    """A score over the videos of a variant.

    Attributes:
        mean: Over them.
        deviation: The standard deviation of samples; NaN of a single one.
        count: How many they are.
    """

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        """Returns it as a cell of a table."""
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2g}"
        return f"{self.mean:.4g}{spread}"


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Returns the names of all scores, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def means_of(rows: Sequence[Row]) -> dict[str, dict[Column, Mean]]:
    """Returns each score's mean by the names of variants."""
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row.variant.name, []).append(row)
    return {
        name: {
            column: _mean([row.values[column] for row in some if column in row.values])
            for column in columns_of(some)
        }
        for name, some in by_variant.items()
    }


def mean_of(values: Sequence[float]) -> float:
    """Returns the mean of some numbers."""
    return math.fsum(values) / len(values)


def videos_csv(rows: Sequence[Row]) -> str:
    """Returns a line for each video."""
    columns = columns_of(rows)
    header = ["number", "folder", "prompt", "variant", "seed", *columns]
    lines = [
        [row.number, row.folder, row.prompt, row.variant.name, row.seed]
        + [row.values.get(column, "") for column in columns]
        for row in rows
    ]
    return _csv(header, lines)


def variants_csv(means: Mapping[str, Mapping[Column, Mean]]) -> str:
    """Returns a line for each variant: of each score the mean, the deviation and the number."""
    columns = list(dict.fromkeys(column for some in means.values() for column in some))
    header = ["variant"]
    for column in columns:
        header += [column, f"{column}, deviation", f"{column}, videos"]
    lines = []
    for name, some in means.items():
        line: list[object] = [name]
        for column in columns:
            found = some.get(column)
            line += ["", "", 0] if found is None else [found.mean, found.deviation, found.count]
        lines.append(line)
    return _csv(header, lines)


def _mean(values: Sequence[float]) -> Mean:
    mean = mean_of(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan
    return Mean(mean, deviation, len(values))


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue()
