"""A plugin of pytest: a line of JSON for each test as it ends, and tests that may bring a GPU down.

``pytest -p benchmarks.pytest_lines --lines FILE [--but FILE]``. ``--but`` leaves out what passed or
was skipped in an earlier run's lines. A test that takes longer than ``--patience`` seconds ends its
process, as one does after which the GPU answers no more; pytest-xdist then starts another.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import json_lines

ENDED = ("passed", "skipped")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the lines of a file by their tests, the last of each; a torn line does not count.

    Raises:
        ValueError: A line is none of a test; the message names file and line.
    """
    return dict(json_lines.read(path, _of_test))


def _of_test(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for name in ("test", "outcome"):
        if not isinstance(line[name], str):
            raise ValueError(f"{name} must be a text, got {line[name]!r}")
    return line["test"], line


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    parser.addoption("--lines", type=Path)
    parser.addoption("--but", type=Path)
    parser.addoption("--patience", type=float, default=300.0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an earlier run has done."""
    if (path := config.getoption("--but")) is None:
        return
    done = {name for name, x in read(path).items() if x["outcome"] in ENDED}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends a worker that hangs, or whose GPU does not answer."""
    faulthandler.dump_traceback_later(
        item.config.getoption("--patience"), exit=True, file=sys.__stderr__
    )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized() and hasattr(item.config, "workerinput"):
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


class Lines:
    """Writes the lines, in the process that hears of all tests."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes a test's line."""
        if report.when != "call" and report.passed:
            return
        found = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        if not report.passed:
            found["why"] = report.longreprtext[-2000:] if report.failed else str(report.longrepr)
        json_lines.append(self._path, found)


def pytest_configure(config: pytest.Config) -> None:
    """Begins to write."""
    path = config.getoption("--lines")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(path))
