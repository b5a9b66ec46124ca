"""What a study leaves in its folder: tables, figures, and a page with the videos side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vstar_kernels.analysis.frames import normalize_jointly, similarity_histogram
from vstar_kernels.analysis.plots import plot_histogram, plot_similarities
from vstar_kernels.cli.page import figure_uri, render
from vstar_kernels.cli.study.figures import (
    labels_of,
    plot_intervals,
    plot_sweep,
    plot_variants,
    swept_names,
)
from vstar_kernels.cli.study.plan import SYMBOLS, Video
from vstar_kernels.cli.study.table import (
    Row,
    columns_of,
    means_of,
    variants_csv,
    videos_csv,
)
from vstar_kernels.files import write_atomically
from vstar_kernels.reading import FormatError, decode, read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, VIDEOS_TABLE, VARIANTS_TABLE = "study.html", "scores.csv", "variants.csv"
FIGURES = "figures.json"  # the names of the figures that were written
_FIGURE = re.compile(r"[\w-]+\.png")
DPI = 120
MOST_PANELS = 6  # variants beside each other


def write_report(
    output: Path,
    title: str,
    videos: Sequence[Video],
    rows: Sequence[Row],
    failures: Sequence[tuple[str, str]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Writes the tables, the figures as PNG, and the page.

    Args:
        output: The study's folder.
        title: What the page is called.
        videos: All of them.
        rows: Of those that are there, their scores.
        failures: What failed, and why.
        facts: What else the page says, by name.

    Raises:
        OSError: A file cannot be written.
    """
    means = means_of(rows)
    columns = columns_of(rows)
    write_atomically(output / VIDEOS_TABLE, videos_csv(rows))
    write_atomically(output / VARIANTS_TABLE, variants_csv(means))
    figures = _figures(rows, columns)
    _replace_figures(output, {f"{name}.png": figure for name, _, figure, _ in figures})
    shown = [(heading, figure_uri(figure), caption) for _, heading, figure, caption in figures]
    table = [
        [name, *(str(some[column]) if column in some else "" for column in columns)]
        for name, some in means.items()
    ]
    page = render(
        "study.html",
        title=title,
        facts=facts,
        failures=failures,
        header=["variant", *columns],
        table=table if columns else [],
        figures=shown,
        groups=_groups(videos, {row.number: row for row in rows}),
    )
    write_atomically(output / PAGE, page)


def _replace_figures(output: Path, figures: Mapping[str, Figure]) -> None:
    """Writes the figures by the names of their files, in the place of an earlier run's.

    Those that this study has not must not look like a part of it. The folder may hold pictures of
    others under any name: only those go that are in the record of what was written.
    """
    record = output / FIGURES
    with suppress(OSError, FormatError):  # there is none, or it is not ours
        written = decode(read_text(record))
        for name in written if isinstance(written, list) else []:
            if isinstance(name, str) and _FIGURE.fullmatch(name) and name not in figures:
                (output / name).unlink(missing_ok=True)
    write_atomically(record, json.dumps([*figures], indent=1) + "\n")
    for name, figure in figures.items():
        figure.savefig(output / name, dpi=DPI)


def _figures(rows: Sequence[Row], columns: Sequence[str]) -> list[tuple[str, str, Figure, str]]:
    """Returns each figure with the name of its file, its heading and its caption."""
    if not columns:
        return []
    found = [
        (
            "over-variants",
            "Scores over variants",
            plot_variants(rows, columns),
            "A point for each video, a bar for their mean.",
        )
    ]
    for name in swept_names(rows):
        label = SYMBOLS.get(name, name)
        figure = plot_sweep(rows, columns, name, label)
        caption = "Means over prompts and seeds."
        found.append((f"over-{name.replace('_', '-')}", f"Scores over {label}", figure, caption))
    for curve in dict.fromkeys(name for row in rows for name in row.curves):
        figure = plot_intervals(rows, curve)
        caption = "Means over the pairs of frames at each interval, prompts and seeds."
        found.append(("over-interval", "Similarity over the interval", figure, caption))
    for name in dict.fromkeys(name for row in rows for name in row.matrices):
        found += _similarities([row for row in rows if name in row.matrices], name)
    return found


def _similarities(rows: Sequence[Row], name: str) -> list[tuple[str, str, Figure, str]]:
    """Returns the first prompt's matrices side by side, and the histograms of all (S.1, S.2)."""
    first = rows[0]
    variants = list(dict.fromkeys(row.variant.name for row in rows))[:MOST_PANELS]
    labels = labels_of(variants)
    of_first = {
        labels[row.variant.name]: torch.tensor(row.matrices[name])
        for row in rows
        if (row.prompt, row.seed) == (first.prompt, first.seed) and row.variant.name in variants
    }
    found = []
    with suppress(ValueError):  # all alike: there is no scale to show them on
        figure = plot_similarities(normalize_jointly(of_first))
        caption = f"{name}: {first.prompt}, seed {first.seed}."
        found.append(("similarities", "Similarity of frames", figure, caption))
    if len({len(row.matrices[name]) for row in rows}) > 1:
        return found  # of other numbers of frames: they have not the same intervals
    every = {
        variant: [torch.tensor(row.matrices[name]) for row in rows if row.variant.name == variant]
        for variant in variants
    }
    pairs = torch.cat(
        [x[~torch.eye(len(x), dtype=torch.bool)] for some in every.values() for x in some]
    )
    low, high = float(pairs.min()), float(pairs.max())
    if low < high:
        histograms = {
            labels[variant]: similarity_histogram(some, limits=(low, high))
            for variant, some in every.items()
        }
        caption = f"{name}, of all prompts and seeds."
        figure = plot_histogram(histograms)
        found.append(("histograms", "Histograms of similarity", figure, caption))
    return found


def _groups(
    videos: Sequence[Video], rows: Mapping[int, Row]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns the videos of each prompt and seed, variant by variant."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for number, video in enumerate(videos, start=1):
        row = rows.get(number)
        values = {} if row is None else row.values
        groups.setdefault(f"{video.prompt.text} · seed {video.seed}", []).append(
            {
                "variant": video.variant.name,
                "folder": None if row is None else row.folder,
                "scores": [f"{name}: {value:.4g}" for name, value in values.items()],
            }
        )
    return list(groups.items())
