"""Checks that a release is one: ``check_release.py TAG [FOLDER]``, such as ``v0.1.0 dist``.

- The tag, the package, the changelog's newest heading and ComfyUI's node pack are of one version.
- The folder holds the release's archives, each of that version, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the version stands, and between what.
PLACES = (
    ("vstar_kernels/_version.py", r'^__version__ = "(.+)"$'),
    ("CHANGELOG.md", r"^## \[?([^\]\s]+)\]?"),
    ("integrations/comfyui/pyproject.toml", r'^version = "(.+?)"'),
    ("integrations/comfyui/pyproject.toml", r'^dependencies = \["vstar-kernels\[.+\]>=(.+?)"'),
)
ARCHIVES = {
    "the sources": r"\.tar\.gz",
    "a wheel for x86-64": r"-py3-none-manylinux[\w.]*_x86_64\.whl",
    "a wheel for Arm": r"-py3-none-manylinux[\w.]*_aarch64\.whl",
    "a wheel for every platform": r"-py3-none-any\.whl",
}


def wrong_versions(tag: str, root: Path) -> list[str]:
    """Returns what says another version than the tag, with that one."""
    is_version = re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag)
    wrong = [] if is_version else [f"the tag {tag} is no version"]
    for place, pattern in PLACES:
        match = re.search(pattern, (root / place).read_text(encoding="utf-8"), re.M)
        version = match[1] if match else "none"
        if f"v{version}" != tag:
            wrong.append(f"{place} has {version}, the tag is {tag}")
    return wrong


def wrong_archives(tag: str, folder: Path) -> list[str]:
    """Returns what a folder lacks of a release, and what it has besides."""
    if not folder.is_dir():
        return [f"{folder} must be the folder of the archives, and is none"]
    names = sorted(path.name for path in folder.iterdir())
    stem = re.escape(f"vstar_kernels-{tag.removeprefix('v')}")
    wrong = []
    for what, pattern in ARCHIVES.items():
        found = [name for name in names if re.fullmatch(stem + pattern, name)]
        if len(found) != 1:
            wrong.append(f"{folder} must hold {what}, once, and has {len(found)}")
        names = [name for name in names if name not in found]
    return wrong + [f"{folder} holds {name}, which is of no release {tag}" for name in names]


def main() -> int:
    """Checks a release; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("folder", type=Path, nargs="?", help="of the archives")
    args = parser.parse_args()
    wrong = wrong_versions(args.tag, ROOT)
    if args.folder is not None:
        wrong += wrong_archives(args.tag, args.folder)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
