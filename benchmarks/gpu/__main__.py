"""``python -m benchmarks.gpu tile|stream``: the kernels against their peers, on this GPU.

Writes JSON, a table and, where matplotlib is installed, a plot; ``plot FILE`` draws it from the
JSON elsewhere.

- *tile*: every row of workloads.json at each of its numbers of frames, those that move most first
- *stream*: long sequences
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.suites import SUITES


def write(result: dict, path: Path) -> None:
    """The JSON, and the table and the plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    path.with_suffix(".md").write_text(report.table(result))
    if importlib.util.find_spec("matplotlib"):
        report.plot(result, path.with_suffix(".png"))
    else:
        print(f"matplotlib is not installed; elsewhere: python -m benchmarks.gpu plot {path.name}")


def main(arguments: list[str] | None = None) -> None:
    """Measure a suite, or draw one that was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in SUITES:
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, default=Path(f"benchmark-output/{name}.json"))
        command.add_argument("--seconds", type=float, default=400, help="after which none begins")
    commands.add_parser("plot").add_argument("file", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "plot":
        write(json.loads(args.file.read_text()), args.file)
        return
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU to measure")
    from benchmarks.gpu.measure import suite

    result = suite(args.command, args.seconds)
    write(result, args.output)
    print(report.table(result))


if __name__ == "__main__":
    main()
