import contextlib
import dataclasses
import io
import re

import pytest

from benchmarks import publish, results
from benchmarks.report import figures, page, tables
from benchmarks.report.page import write_report
from benchmarks.results import FAILED, MEASURED, Outcome, Record, Run
from tests.benchmarks.conftest import a_plan, small_cases
from tests.browser import HOSTILE, scripts_run


@pytest.fixture(scope="module")
def run(finished):
    return results.load(finished)


def a_record(case, **seconds):
    peers = {name.replace("_", "-"): Outcome(MEASURED, [x] * 5) for name, x in seconds.items()}
    peers["vstar_kernels"] = peers.pop("ours")
    return Record(case, "warm", peers, bandwidth=1e9, flops_per_second=1e12)


def test_a_models_step_is_the_sum_of_its_calls():
    three, eight, *_ = small_cases()
    records = [a_record(three, ours=2e-3, eager=6e-3), a_record(eight, ours=1e-3, sdpa=2e-3)]
    run = Run({}, a_plan([three, eight]), records)
    steps = figures.steps(run).set_index(["model", "frames"])
    assert set(steps.index) == {(m, n) for m in ("a-model", "b-model") for n in (3, 8)}
    step = steps.loc["a-model", 3].set_index("peer")  # 40 rows of which 4 were measured, 10 calls
    assert dict(step.time) == {"vstar_kernels": pytest.approx(0.2), "eager": pytest.approx(0.6)}
    assert step.ratio["eager"] == pytest.approx(3)
    assert set(step.calls) == set(step.scale) == {10}
    assert steps.loc["b-model", 8].set_index("peer").time["sdpa"] == pytest.approx(2 * 2e-3)


def test_a_step_with_a_level_missing_has_no_sum():
    three, *_ = small_cases()
    other_level = dataclasses.replace(three, heads=5, uses=three.uses[:1])
    plan = a_plan([three, other_level])
    found = figures.steps(Run({}, plan, [a_record(three, ours=2e-3)]))
    assert list(found.model) == ["b-model"]


def test_who_is_first():
    three, eight, *_ = small_cases()
    records = [
        a_record(three, ours=2e-3, eager=3e-3, sdpa_bias=1e-3, sdpa=0.5e-3),
        a_record(eight, ours=2e-3, eager=3e-3, strength_0=1e-3, sdpa=0.5e-3),
    ]
    rows = figures.kernel_rows(Run({}, a_plan([three, eight]), records))
    assert list(figures.fastest_others(rows).peer) == ["sdpa-bias", "eager"]
    slower = figures.not_first(rows)
    assert [*zip(slower.key, slower.peer, slower.ratio, strict=True)] == [
        (records[0].key, "sdpa-bias", 0.5)
    ]


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    """The report's Markdown, its page and what is printed."""
    folder = tmp_path_factory.mktemp("report")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        write_report(finished, folder / "report")
    return *((folder / f"report.{x}").read_text() for x in ("md", "html")), printed.getvalue()


def test_the_report_has_every_case_and_says_what_could_not_run(run, written):
    markdown, html, printed = written
    for text in (markdown, html):
        for record in run.records:
            assert " × ".join(map(str, record.case.shape)) in text
        assert "max scores is not supported on CPU" in text
        assert run.environment["commit"] in text
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) >= 3
    assert "Overview" in printed


def test_the_page_needs_nothing_beside_it(written):
    html = written[1]
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', html)
    drawn = set(re.findall(r'<img[^>]* alt="([^"]*)"', html))
    assert drawn == {"Time against frames", "Speed-up by model", "Share of the floor",
                     "Memory against frames", "Long sequences", "Forward and backward",
                     "With the mean map", "What a rule costs", "Scaling with threads"}  # fmt: skip
    assert html.count("prefers-color-scheme: dark)") == 1 + len(drawn)


def test_tables_are_rectangular(run):
    for table in tables.all_tables(run):
        assert {len(row) for row in table.rows} <= {len(table.head)}, table.title


def test_failures_are_in_the_report(run):
    first, second, *rest = run.records
    peers = {**first.peers, "eager": Outcome(FAILED, reason="no memory")}
    changed = [
        dataclasses.replace(first, peers=peers),
        Record(second.case, second.allocator, {}, failure="ended by SIGKILL"),
        *rest,
    ]
    changed_run = dataclasses.replace(run, records=changed)
    rows = tables.failures(changed_run).rows
    assert (first.key, "eager formula", FAILED, "no memory") in rows
    assert (second.key, "all", FAILED, "ended by SIGKILL") in rows


@pytest.mark.parametrize(
    ("page", "name", "make"),
    [
        ("README.md", "cpu", publish.margins),
        ("docs/performance/cpu.md", "pages", publish.of_pages),
        ("docs/performance/cpu.md", "machines", publish.machines),
        ("docs/performance/cpu.md", "plots", publish.pictures),
        ("docs/performance/cpu.md", "cpu", publish.everything),
        ("docs/performance/gpu.md", "predictions", publish.predictions),
        ("docs/performance/gpu.md", "measured", publish.measured),
    ],
)
def test_what_is_published_is_that_of_the_kept_results(page, name, make):
    text = (publish.ROOT / page).read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n\n{make()}\n\n<!-- end -->" in text


def test_no_script_of_a_file_whose_cases_all_failed_runs_in_the_report(run, tmp_path, monkeypatch):
    """Plots have none of these texts; they are images, in which no script runs."""
    monkeypatch.setattr(page, "all_plots", lambda run: [])
    environment = {
        name: value + HOSTILE if isinstance(value, str) else value
        for name, value in run.environment.items()
    }
    reasons = Outcome(FAILED, reason=HOSTILE, note=HOSTILE)
    records = [
        dataclasses.replace(record, failure=HOSTILE, peers={**record.peers, "eager": reasons})
        for record in run.records
    ]
    text = page.render(dataclasses.replace(run, environment=environment, records=records))
    assert "dataset.ran" in text
    assert not scripts_run(text, tmp_path)


def test_a_peer_that_nobody_knows_is_refused(finished, tmp_path):
    text = finished.read_text().replace('"eager":', '"eagle":')
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(results.ResultsError, match="there is no peer eagle"):
        write_report(tmp_path / "run.jsonl", tmp_path / "report")
