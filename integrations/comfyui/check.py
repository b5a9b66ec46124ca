"""Checks the node pack in a real ComfyUI: the examples, the numbers, the failures, the page.

    COMFYUI_DIR=~/ComfyUI python integrations/comfyui/check.py

from the repository's root, with the Python that runs ComfyUI. It starts a server of its own, on a
processor and with a folder of its own: nothing is written to COMFYUI_DIR. Models are tiny and
random, so that no weights are needed. With AnimateDiff-Evolved in its ``custom_nodes/`` that is
checked, too; with comfy-cli, what the registry asks for; with ``--browser``, Playwright and
Chromium, the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs the checks and prints a table; returns 1 where one failed, 2 where ComfyUI is not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the checks with this in their name")
    parser.add_argument("--browser", action="store_true", help="run the page in Chromium, too")
    parser.add_argument("--pictures", type=Path, help="where to write pictures of the page")
    options = parser.parse_args()
    comfyui = Path(os.environ.get("COMFYUI_DIR", "")).expanduser()
    if not (comfyui / "main.py").is_file() or not os.environ.get("COMFYUI_DIR"):
        print("COMFYUI_DIR must name a folder with ComfyUI's main.py", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from tests.integrations.real_comfyui import browser, checks, graphs
    from tests.integrations.real_comfyui.run import NotHereError, Run
    from tests.integrations.real_comfyui.server import Server

    todo = checks.CHECKS | (browser.CHECKS if options.browser else {})
    todo = {name: function for name, function in todo.items() if options.only in name}
    failed = skipped = 0
    with tempfile.TemporaryDirectory(prefix="vstar-comfyui-") as folder:
        log = Path(folder, "comfyui.log")
        with Server(comfyui.resolve(), Path(folder, "base"), log) as server:
            server.placeholders(graphs.FILES)
            run = Run(server, options.pictures)
            print(run.versions(), flush=True)
            for name, function in todo.items():
                start = time.perf_counter()
                try:
                    status, said = "ok", function(run)
                except NotHereError as reason:
                    status, said, skipped = "skipped", str(reason), skipped + 1
                except Exception as error:
                    status, said = "FAILED", f"{type(error).__name__}: {error}"
                    failed += 1
                seconds = time.perf_counter() - start
                print(f"{status:7}  {seconds:5.1f} s  {name}\n{'':18}{said}", flush=True)
            if failed:
                print(f"\nThe end of ComfyUI's log:\n{server.tail()}")
    print(f"\n{len(todo) - failed - skipped} ok, {skipped} skipped, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
