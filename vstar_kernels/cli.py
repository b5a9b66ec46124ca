"""``vstar-kernels`` and ``python -m vstar_kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vstar_kernels._version import __version__
from vstar_kernels.demo.options import DemoError, add_arguments, from_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="vstar-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, the native library, and what can run here")
    info.set_defaults(run=_info)
    demo = commands.add_parser("demo", help="a video UNet denoises with and without the kernels")
    add_arguments(demo)
    demo.set_defaults(run=_demo)
    args = parser.parse_args(arguments)
    return args.run(args)


def _info(args: argparse.Namespace) -> int:
    from vstar_kernels.environment import info

    facts = info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    try:
        options = from_arguments(args)
        from vstar_kernels.demo.run import run

        return run(options)
    except DemoError as error:
        print(f"vstar-kernels demo: error: {error}", file=sys.stderr)
        return 2
