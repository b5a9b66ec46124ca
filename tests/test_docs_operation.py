"""The table of docs/operation.md is what a run of the transformations prints."""

import pytest
import torch

from tests.attention import transformations
from vstar_kernels.attention import native

PAGE = transformations.PAGE.read_text(encoding="utf-8")
TABLE = PAGE.split(transformations.START)[1].split(transformations.END)[0].splitlines()
QUICK = [x for x in transformations.ROWS if x not in transformations.PACKAGES]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
@pytest.mark.skipif(transformations.torch_version() not in TABLE, reason="another version of torch")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is of a CPU")
@pytest.mark.parametrize("name", QUICK)
def test_the_row_is_what_a_run_prints(name):
    assert transformations.line(name) in TABLE


def test_no_row_and_no_note_is_missing():
    rows = [x.split(" | ")[0].removeprefix("| ") for x in TABLE if x.startswith("| ")]
    assert rows == ["|", *transformations.ROWS]
    assert TABLE[-1 - len(transformations.NOTES) : -1] == transformations.notes()
    assert all(x in TABLE for x in transformations.heading())


def test_a_wrong_number_is_no_note(monkeypatch):
    """Nor is an error that no note explains, nor a note that nothing needs."""
    tar = transformations.OPERATIONS[0]
    wrong = transformations.Operation(tar.name, lambda *x: 1.01 * tar.attend(*x), tar.exact, "")
    with pytest.raises(AssertionError, match="not close"):
        transformations.run("gradients", wrong)
    monkeypatch.setattr(transformations, "NOTES", ())
    with pytest.raises(AssertionError, match="must be an ordinary"):
        transformations.run("nested tensors (jagged)", tar)
    note = transformations.Note("gradients", (tar.name,), "", "")
    monkeypatch.setattr(transformations, "NOTES", (note,))
    with pytest.raises(AssertionError, match="a note says why not"):
        transformations.run("gradients", tar)
