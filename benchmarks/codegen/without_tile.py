"""Sizes for which no tile is fit, each with the reason: ``without_tile.json``.

Their calls go to the stream kernels. ``python -m benchmarks.tune`` writes the file as it looks for
tiles, and ``python -m benchmarks.codegen`` lists it and exits with 1 where a size that has no tile
has no reason either. Reasons that name a version of Triton are written by hand: the tuner compiles
with the installed one alone, and what spills with the oldest is not shipped.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.codegen import cases
from benchmarks.codegen.cases import Key
from vstar_kernels.attention.triton import configs
from vstar_kernels.files import write_atomically

FILE = Path(__file__).with_suffix(".json")
KINDS = ("16-bit", "tf32")  # IEEE float32 has no tiles


def sizes() -> list[Key]:
    """Returns the keys of every forward tile that there could be."""
    choices = (configs.ARCHITECTURES, KINDS, configs.TILE_FRAMES, configs.WIDTHS)
    return list(itertools.starmap(Key, itertools.product(*choices)))


def read() -> dict[Key, str]:
    """Returns the reasons that the file holds."""
    found = {}
    for line in json.loads(FILE.read_text()):
        reason = line.pop("reason")
        found[Key(**line)] = reason
    return found


def write(reasons: Mapping[Key, str]) -> None:
    """Replaces the file by the reasons, in the order of :func:`sizes`."""
    lines = []
    for key in filter(reasons.get, sizes()):
        line = asdict(key)
        del line["backward"]
        lines.append(json.dumps(line | {"reason": reasons[key]}))
    write_atomically(FILE, "[\n  " + ",\n  ".join(lines) + "\n]\n")


def unexplained() -> list[str]:
    """Names sizes that have neither a tile nor a reason, and those that have both."""
    tiles, reasons = {entry.key for entry in cases.entries()}, read()
    return [
        f"{key.architecture} tile {key.kind} N={key.frames} D={key.width}: "
        + ("has a tile, and a reason for none" if key in tiles else "no tile, and no reason")
        for key in sizes()
        if (key in tiles) == (key in reasons)
    ]
