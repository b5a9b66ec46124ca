"""What docs/column-attention.md shows runs, and its errors are those that are raised."""

import re

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (ROOT / "docs/column-attention.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names():
    """What the page has made at its end."""
    torch.manual_seed(0)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if vk.backends.available()["cpu"]:  # then it takes the reference and says that it is slow
            patch.setattr("warnings.warn", lambda *arguments, **options: None)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, found)
    return found


def test_the_examples(names):
    assert names["maps"].shape == (4, 60, 3)


def test_the_errors(names):
    shown = re.findall(r">>> (.*)\n    ValueError: (.*)\n", PAGE)
    assert len(shown) == 2
    for call, message in shown:
        with pytest.raises(ValueError, match=re.escape(message)):
            eval(call, names)


def test_the_table_of_sizes():
    """The sizes of one layer in MiB, counted."""
    rows = re.findall(r"\| ([\d,]+) × (\d+) \| (\d+) \| (\d+) MiB \| (\d+) MiB \| (.*?) MiB", PAGE)
    assert len(rows) == 4
    for queries, *rest in rows:
        count = int(queries.replace(",", ""))
        heads, frames, weights, query, maps = map(float, rest)
        mib = frames * count / 2**20
        assert weights == round(mib * heads * 77 * 2)
        assert query == round(mib * heads * 64 * 2)
        assert maps == round(mib * 4 * 4, 1)
