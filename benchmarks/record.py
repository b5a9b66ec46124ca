"""What a benchmark of its own leaves: its figures with its settings and its machine, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.machine import environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_record(options: DataclassInstance, results: Any, **more: Any) -> None:
    """Writes the figures to the file that ``options.json`` names, if it names one.

    Args:
        options: The benchmark's; what is measured on is their ``device``, if they have one.
        results: The figures.
        more: Others, by name.
    """
    settings = asdict(options)
    path = settings.pop("json")
    if path is None:
        return
    record = {
        "settings": settings,
        "environment": environment(settings.get("device", "cpu"), torch.get_num_threads()),
        "results": results,
        **more,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
