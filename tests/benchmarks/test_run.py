import json
import os
import subprocess
import sys

import pytest

from benchmarks import results, run
from benchmarks.__main__ import main
from benchmarks.results import MEASURED, WRONG, Outcome, Record, ResultsError
from tests.benchmarks.conftest import a_plan, no_workers, small_cases
from tests.helpers import ROOT


def few():
    return a_plan(list(small_cases())[:2], peers=("vstar_kernels",))


def test_every_case_is_measured_with_each_of_its_allocators(finished, plan):
    found = results.load(finished)
    assert found.plan == plan
    assert [record.key for record in found.records] == [task.key for task in plan.tasks]
    assert not found.missing
    assert {x.allocator for x in found.records if x.case.suite == "short"} == {
        "warm",
        "default",
    }
    for record in found.records:
        assert not record.failure
        assert record.peers["vstar_kernels"].status == MEASURED
    assert found.environment["threads"] == 1


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, finished):
    path = tmp_path / "run.jsonl"
    lines = finished.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:100])  # the last but one is torn
    begun = results.load(path)
    assert len(begun.missing) == 2
    resumed = run.resume(path)
    assert [task.key for task in resumed.missing] == [task.key for task in begun.missing]
    with no_workers():
        run.measure(path)
    after = path.read_text().splitlines(keepends=True)
    assert after[:-2] == lines[:-2]  # what was measured stays
    assert not results.load(path).missing


def test_no_case_begins_after_the_time_that_was_given(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    run.begin(path, few())
    resume = ["run", "--no-report", "--resume", str(path)]
    with no_workers():
        assert main([*resume, "--stop-after", "0"]) == 0
        assert not results.load(path).records
        assert "cases are not measured yet" in capsys.readouterr().out
        assert main(resume) == 0
    assert not results.load(path).missing


def test_a_run_in_another_environment_is_not_resumed(tmp_path, finished):
    path = tmp_path / "run.jsonl"
    header, *rest = finished.read_text().splitlines()
    changed = json.loads(header)
    changed["environment"] |= {"torch": "1.0", "commit": "another"}
    path.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"torch: 1.0 and .*commit: another and"):
        run.resume(path)
    assert path.read_bytes() == before


def test_an_existing_file_is_not_touched(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("mine\n")
    with pytest.raises(ResultsError, match="exists; --resume goes on with it"):
        run.begin(path, few())
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"schema": 99, "environment": {}, "plan": {}}\n', "has schema 99, this program reads"),
        ("name,seconds\n", "is not a run of these benchmarks"),
        ("", "is not a run of these benchmarks"),
        ("[1]\n", "is not a run of these benchmarks"),
    ],
)
def test_other_files_are_refused(tmp_path, content, text, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert text in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_worker_that_is_killed_costs_one_case(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    run.begin(path, few())
    with no_workers():
        work, calls = run._work, []

        def killed_at_first(*args):
            calls.append(args)
            return -9 if len(calls) == 1 else work(*args)

        monkeypatch.setattr(run, "_work", killed_at_first)
        first, *others = run.measure(path).records
    assert first.failure == "ended by SIGKILL"
    assert all(record.peers["vstar_kernels"].status == MEASURED for record in others)


def test_a_worker_that_cannot_work_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    run.begin(path, few())
    monkeypatch.setattr(run, "_work", lambda *_: 1)
    with pytest.raises(ResultsError, match="ended with exit status 1"):
        run.measure(path)
    assert results.load(path).records == []


def test_a_wrong_result_of_our_own_fails_the_command(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    plan = few()
    run.begin(path, plan)
    for task in plan.tasks:
        results.append(
            path,
            Record(task.case, task.allocator, {"vstar_kernels": Outcome(WRONG, reason="error 1")}),
        )
    assert main(["run", "--resume", str(path)]) == 1
    captured = capsys.readouterr()
    assert f"wrong: {plan.tasks[0].key}: error 1" in captured.err
    assert "error 1" in path.with_suffix(".html").read_text()


def test_no_case_begins_after_the_time(tmp_path):
    path = tmp_path / "run.jsonl"
    run.begin(path, few())
    assert len(run.measure(path, seconds=0).missing) == 4


@pytest.mark.long
def test_the_command_measures_and_reports(tmp_path):
    """By workers, one for each allocator."""
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "benchmarks", "run", "--suites", "short", "--frames", "2",
               "--models", "latte-512x512", "--peers", "eager", "--rounds", "5", "--device", "cpu",
               "--output", str(path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "2 cases to measure" in done.stdout
    assert "latte-512x512" in done.stdout
    assert "2/2" in done.stderr
    for suffix in (".md", ".html"):
        assert "latte-512x512" in path.with_suffix(suffix).read_text()


def test_the_list_says_who_cannot_run_and_why(capsys):
    assert main(["list", "--quick", "--suites", "short", "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "videocrafter2-320x512 0" in text
    assert "max scores is not supported on CPU" in text
