"""``vstar-kernels`` and ``python -m vstar_kernels``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from vstar_kernels._version import __version__
from vstar_kernels.cli.info import Info
from vstar_kernels.cli.output import whole_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 130 where Ctrl-C ends it."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # while a command's packages were imported, which takes seconds
        print("vstar-kernels: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and prompts are of all scripts, which a log in another encoding must not end.
        sys.stdout.reconfigure(errors="backslashreplace")
    # These two answer wherever the package is, with none of its extras.
    if arguments == ["--version"]:
        with whole_output():
            print(__version__)
        return 0
    if arguments == ["info"]:
        return Info().run()
    try:
        from vstar_kernels.cli.demo.command import DemoOptions
        from vstar_kernels.cli.generate.command import Generate
        from vstar_kernels.cli.options import run_command
        from vstar_kernels.cli.study.command import Study
    except ImportError as error:
        print(
            f"vstar-kernels: error: commands other than info need {error.name} ({error}): "
            "pip install 'vstar_kernels[generate]', or [demo]",
            file=sys.stderr,
        )
        return 2
    return run_command(
        {"info": Info, "demo": DemoOptions, "generate": Generate, "study": Study},
        arguments,
        prog="vstar-kernels",
        description="Fused kernels for temporal attention regularization. COMMAND --help shows a "
        "command's options, --version the version.",
    )
