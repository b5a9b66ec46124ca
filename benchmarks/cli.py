"""The command line of ``python -m benchmarks``: run, compare, report, list."""

from __future__ import annotations

import argparse
import math
import sys
from datetime import datetime
from pathlib import Path

from benchmarks import results, run
from benchmarks.compare import compare
from benchmarks.listing import listing
from benchmarks.peers import VSTAR_KERNELS
from benchmarks.planning import plan
from benchmarks.report import write_report
from benchmarks.report.render import console
from benchmarks.results import ResultsError
from benchmarks.suites import SUITES
from vstar_kernels.cli.options import integer

OUTPUT = Path("benchmark-output")
OURS = VSTAR_KERNELS.name
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except ResultsError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.resume:
        path = args.resume
        begun = run.resume(path)
    else:
        planned = plan(args)
        name = f"{planned.device}-{datetime.now():%Y-%m-%dT%H%M%S}.jsonl"
        path = args.output or OUTPUT / name
        begun = run.begin(path, planned)
    print(f"{len(begun.missing)} cases to measure; results in {path}")
    to_go_on = f"To go on: python -m benchmarks run --resume {path}"
    try:
        done = run.measure(path, args.stop_after)
    except KeyboardInterrupt:
        print(f"\n{to_go_on}", file=sys.stderr)
        return 130
    write_report(path, path)
    if done.missing:
        print(f"{len(done.missing)} cases are not measured yet. {to_go_on}")
    wrong = [x for x in done.records if x.peers and x.peers[OURS].status == results.WRONG]
    for record in wrong:
        print(f"wrong: {record.task.key}: {record.peers[OURS].reason}", file=sys.stderr)
    return 1 if wrong else 0


def _compare(args: argparse.Namespace) -> int:
    comparison = compare(
        results.load(args.a),
        results.load(args.b),
        peer=args.peer,
        tolerance=args.tolerance,
    )
    comparison.print(console())
    return 0 if comparison.passed else 1


def _report(args: argparse.Namespace) -> int:
    write_report(args.file, args.output or args.file)
    return 0


def _list(args: argparse.Namespace) -> int:
    listing(plan(args), console())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="measure, and report")
    command.set_defaults(command=_run)
    _add_selection(command)
    command.add_argument("--rounds", type=integer(2), help="of all peers in turn, at most")
    command.add_argument("--seconds", type=float, help="for the rounds of a case, about")
    command.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no case then"
    )
    command.add_argument("--output", type=Path, help=f"default: a new file in {OUTPUT}/")
    command.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on with what was interrupted"
    )

    command = commands.add_parser("compare", help="two runs; exit status 1 where B is slower")
    command.set_defaults(command=_compare)
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--tolerance", type=float, default=0.05, help="default: 0.05")
    command.add_argument("--peer", default=OURS, help=f"default: {OURS}")

    command = commands.add_parser("report", help="the tables and the page of a run")
    command.set_defaults(command=_report)
    command.add_argument("file", type=Path)
    command.add_argument("--output", type=Path, help="default: beside the file")

    command = commands.add_parser("list", help="what a run would measure, and who cannot run here")
    command.set_defaults(command=_list)
    _add_selection(command)
    return parser


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="less of everything: some 3 minutes")
    command.add_argument("--suites", nargs="+", choices=SUITES, metavar="SUITE")
    command.add_argument(
        "--models", nargs="+", metavar="MODEL", help="of benchmarks/workloads.json"
    )
    command.add_argument("--frames", nargs="+", type=integer(1), metavar="N")
    command.add_argument("--long-frames", nargs="+", type=integer(1), metavar="N")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="TYPE")
    command.add_argument("--peers", nargs="+", metavar="PEER", help="beside vstar_kernels")
    command.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    command.add_argument("--threads", type=integer(1), help="of a CPU; default: PyTorch's choice")
    command.add_argument(
        "--isa", choices=run.ISAS, help="limit kernels, PyTorch and MKL to this set"
    )
    command.add_argument(
        "--allocators", nargs="+", choices=("warm", "default"), help="of a CPU; default: both"
    )
    command.add_argument("--full-rows", action="store_true", help="on a CPU too; takes long")
    command.add_argument("--unet-frames", nargs="+", type=integer(1), metavar="N")
    command.add_argument("--unet-width", type=integer(32), help="channels at level 0, really 320")
    command.add_argument("--unet-latents", type=integer(1), nargs=2, metavar=("HEIGHT", "WIDTH"))
