"""``vstar-kernels`` and ``python -m vstar_kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vstar_kernels._version import __version__
from vstar_kernels.cli.demo import options as demo_options
from vstar_kernels.cli.generate import options as generate_options
from vstar_kernels.cli.options import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="vstar-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, the native library, and what can run here")
    info.set_defaults(run=_info)
    demo = commands.add_parser("demo", help="a video UNet denoises with and without the kernels")
    demo_options.add_arguments(demo)
    demo.set_defaults(run=_demo)
    generate = commands.add_parser("generate", help="a video from a prompt, with the whole method")
    generate_options.add_arguments(generate)
    generate.set_defaults(run=_generate)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"vstar-kernels {args.command}: error: {error}", file=sys.stderr)
        return 2


def _info(args: argparse.Namespace) -> int:
    from vstar_kernels.cli.info import info

    facts = info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    options = demo_options.from_arguments(args)
    from vstar_kernels.cli.demo.run import run

    return run(options)


def _generate(args: argparse.Namespace) -> int:
    options = generate_options.from_arguments(args)
    from vstar_kernels.cli.generate.run import run

    return run(options)
