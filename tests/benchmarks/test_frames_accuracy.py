"""The errors that benchmarks.frames_accuracy prints are those of what the backends return."""

import pytest
import torch

pytest.importorskip("tyro")
from benchmarks import frames_accuracy
from vstar_kernels.attention.frames import composed

TINY = ["--frames", "5", "--tokens", "6", "--head-dim", "16", "--dtypes", "float32"]


def printed(capsys):
    """The cells of each rule's row, under the names of its columns."""
    frames_accuracy.main(TINY)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    return {cells[1]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


def test_every_backend_has_its_errors(capsys):
    rows = printed(capsys)
    assert list(rows) == list(frames_accuracy.RULES)
    for rule, cells in rows.items():
        for column in ("dense formula", *frames_accuracy.backends()):
            name = next(x for x in cells if x.startswith(column))  # "triton, interpreted"
            if column == "composed" and cells[name] == "–":
                assert rule in ("TAR, row_max", "band", "attenuate", "all of them")
            else:
                assert 0 < float(cells[name]) < 1e-5, (rule, column)


def test_a_wrong_result_shows(capsys, monkeypatch):
    def wrong(call, *, save=False):
        found = forward(call, save=save)
        return found._replace(out=found.out + torch.tensor(0.5))

    forward = composed.forward
    monkeypatch.setattr(composed, "forward", wrong)
    assert float(printed(capsys)["none"]["composed"]) == pytest.approx(0.5, rel=0.1)
