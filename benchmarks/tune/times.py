"""A file of choices by time: a line for each as it is made, with the seconds of all candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import json_lines
from benchmarks.codegen.cases import Entry, Key
from vstar_kernels.attention.triton import configs

# Of tiles, those first whose speed is known least and that models call the most.
ORDER = (32, 64, 128, 16)


def in_order_of_value(keys: list[Key], widths: tuple[int, ...]) -> list[Key]:
    """Returns the keys by frames, and by widths as these are named."""

    def rank(key: Key) -> tuple[int, int]:
        of_frames = ORDER.index(key.frames) if key.frames in ORDER else len(ORDER)
        return of_frames, widths.index(key.width)

    return sorted(keys, key=rank)


def append(path: Path, key: Key, chosen: Entry | None, seconds: Mapping[Entry, float]) -> None:
    """Adds a choice."""
    line = {
        "key": asdict(key),
        "chosen": chosen and asdict(chosen.config),
        "seconds": [[asdict(entry.config), time] for entry, time in seconds.items()],
    }
    json_lines.append(path, line)


def read(path: Path) -> dict[Key, Entry | None]:
    """Returns the choices; a line that an interruption left incomplete does not count.

    Raises:
        ValueError: A line is no choice; the message names file and line.
    """
    return dict(json_lines.read(path, _choice))


def _choice(line: dict[str, Any]) -> tuple[Key, Entry | None]:
    key, config = Key(**line["key"]), line["chosen"]
    if config is None:
        return key, None
    make = configs.stream_config if key.family == "stream" else configs.tile_config
    return key, Entry(**line["key"], config=make(**config))
