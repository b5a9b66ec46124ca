"""``vstar-kernels`` and ``python -m vstar_kernels``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vstar_kernels._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="vstar-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, the native library, and what can run here")
    args = parser.parse_args(arguments)
    return _info()


def _info() -> int:
    from vstar_kernels.environment import info

    facts = info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0
