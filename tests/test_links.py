"""The pages' links lead somewhere, and what docs/reliability.md promises has tests."""

import ast
import re

import pytest

from tests.helpers import ROOT

LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for _, target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def promises():
    """The page's lines: what follows a dash, up to the next one or to an empty line."""
    text = re.sub(r"<!--.*?-->", "", RELIABILITY, flags=re.DOTALL)
    return re.findall(r"^- (.*?)(?=\n- |\n\n|\Z)", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: " ".join(promise.split())[:40])
def test_every_promise_has_a_test(promise):
    tests = LINK.findall(promise)
    assert tests
    for name, target in tests:
        source = (ROOT / "docs" / target).read_text(encoding="utf-8")
        if target.endswith(".cpp"):  # a C++ test has its file's name
            assert target.endswith(f"bindings/tests/test_{name}.cpp")
            assert re.search(rf"foreach\(test .*\b{name}\b", CMAKE)
            continue
        found = {node.name for node in ast.parse(source).body if hasattr(node, "name")}
        assert name.startswith("test_"), f"{name} is no test"
        assert name in found, f"{target} has no {name}"
