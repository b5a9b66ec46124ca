"""The GPU benchmark's cases and figures; what measures them needs a GPU."""

import pytest

from benchmarks.gpu import report, suites

ENVIRONMENT = {"gpu": "a GPU", "torch": "2", "triton": "3"}


def row(**medians):
    times = {
        name.replace("_", " "): {"median": x, "quartiles": [], "error": "" if x else "no memory"}
        for name, x in medians.items()
    }
    case = suites.Case("model", "0", batch=2, frames=16, heads=4, head_dim=64, flex=False)
    times["vstar_kernels"] = times.pop("ours")
    return {
        **vars(case), "traffic": case.traffic, "operations": case.operations, "times": times
    }  # fmt: skip


def test_bytes_and_operations_by_hand():
    case = suites.Case("model", "0", batch=2, frames=16, heads=4, head_dim=64, flex=False)
    assert case.traffic == 4 * 2 * (2 * 16 * 4 * 64)
    assert case.operations == 2 * 2 * 2 * 4 * 16 * 16 * 64


def test_every_workload_is_a_case_and_the_largest_come_first():
    cases = suites.tile()
    sizes = [(x.batch, x.frames, x.heads, x.head_dim) for x in cases]
    assert len(set(sizes)) == len(sizes)
    assert {(8192, 16, 8, 40), (28160, 128, 5, 64), (32, 48, 20, 64)} <= set(sizes)
    assert [x.traffic for x in cases] == sorted((x.traffic for x in cases), reverse=True)
    assert {(x.frames, x.head_dim) for x in cases if x.flex} == suites.FLEX_SIZES
    assert {x.frames for x in suites.stream()} == {1024, 2048, 4096, 8192}


def test_figures_by_hand():
    found = row(ours=2e-3, strength_0=1.6e-3, copy=1.5e-3, eager=20e-3, sdpa_flash=None,
                sdpa_efficient=3e-3, sdpa_math=9e-3)  # fmt: skip
    assert report.share(found) == pytest.approx(0.75)
    cells = report.cells(found)
    assert cells[6:8] == ["2000", "75%"]
    assert cells[9:] == ["1.250", "10.0", "–", "1.50 efficient"]


def test_what_failed_and_was_not_reached_is_said():
    result = {
        "suite": "tile", "environment": ENVIRONMENT, "rows": [row(ours=1e-3, sdpa_flash=None)],
        "not_reached": [{}],
    }  # fmt: skip
    text = report.table(result)
    assert "- sdpa flash on (2, 16, 4, 64): no memory" in text
    assert "Not reached in the time: 1 cases." in text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for suite in ("tile", "stream"):
        result = {"suite": suite, "environment": ENVIRONMENT, "rows": [row(ours=1e-3, copy=1e-3)]}
        path = tmp_path / f"{suite}.png"
        report.plot(result, path)
        assert path.stat().st_size > 1000
