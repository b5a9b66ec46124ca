"""The site's pages: every public name is on one, and every page is in its contents."""

import operator
import re

import pytest

import vstar_kernels as vk
from tests.helpers import ROOT

API = [
    (path.stem, kind, name)
    for path in sorted(ROOT.glob("docs/api/*.rst"))
    for kind, name in re.findall(
        r"^\.\. auto(\w+):: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
]
INDEX = (ROOT / "docs/index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(vk.__all__) - {"__version__"}))
def test_every_public_name_is_on_one_page(name):
    found = [page for page, _, shown in API if shown.removeprefix("vstar_kernels.") == name]
    assert len(found) == 1, found


def test_pages_name_what_there_is():
    for page, kind, name in API:
        if name == "_Bias":  # whose text the public ones share
            continue
        shown = operator.attrgetter(name.removeprefix("vstar_kernels."))(vk)
        kinds = {
            "function": callable(shown) and not isinstance(shown, type),
            "class": isinstance(shown, type),
            "exception": isinstance(shown, type) and issubclass(shown, Exception),
            "module": hasattr(shown, "__path__") or hasattr(shown, "__spec__"),
        }
        assert kinds[kind], f"{page}: {name} is no {kind}"


def test_every_page_is_in_the_contents():
    pages = {
        str(path.relative_to(ROOT / "docs").with_suffix(""))
        for kind in ("md", "rst")
        for path in ROOT.glob(f"docs/**/*.{kind}")
    }
    assert pages - {"index"} == set(re.findall(r"^[\w/-]+$", INDEX, re.MULTILINE))
