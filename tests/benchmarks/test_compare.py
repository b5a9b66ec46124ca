import dataclasses
import random

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.results import FAILED, MEASURED, Outcome, Record, ResultsError, Run
from tests.benchmarks.conftest import a_plan, small_cases

ENVIRONMENT = {"device": "a device", "torch": "2"}
PLAN = a_plan(small_cases())


def a_run(seed, *, kernels=1.0, machine=1.0, noise=0.03, only=None):
    """Made-up times: ``kernels`` times as long for the kernels, ``machine`` for all."""
    random.seed(seed)
    records = []
    for task in PLAN.tasks:
        peers = {}
        for name, seconds in (("vstar_kernels", 1e-3), ("eager", 4e-3), ("sdpa", 3e-3)):
            slowed = name == "vstar_kernels" and only in (None, task.key)
            factor = machine * (kernels if slowed else 1.0)
            times = [seconds * factor * random.lognormvariate(0, noise) for _ in range(15)]
            peers[name] = Outcome(MEASURED, times)
        records.append(Record(task.case, task.allocator, peers))
    return Run(ENVIRONMENT, PLAN, records)


def outcome(a, b):
    return compare(a, b, peer="vstar_kernels", tolerance=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_the_same_kernels_on_a_slower_machine_are_not_slower(seed):
    found = outcome(a_run(seed), a_run(seed + 100, machine=1.7))
    assert found.passed
    assert all(0.9 < line.relative.value < 1.1 for line in found.cases)
    assert all(1.5 < line.seconds.value < 1.9 for line in found.cases)


@pytest.mark.parametrize("seed", range(10))
def test_a_fifth_more_time_is_caught(seed):
    found = outcome(a_run(seed), a_run(seed + 100, kernels=1.2))
    assert {line.name for line in found.slower} >= {"short", "backward", "long"}
    assert not found.passed
    back = outcome(a_run(seed + 100, kernels=1.2), a_run(seed))
    assert back.passed
    assert {line.verdict for line in back.suites} == {"faster"}


@pytest.mark.parametrize("seed", range(3))
def test_faster_peers_are_no_slower_kernels(seed):
    """They are machine=0.7 times as slow, the kernels take as long as before."""
    found = outcome(a_run(seed), a_run(seed + 100, machine=0.7, kernels=1 / 0.7))
    assert found.passed
    assert all(line.relative.value > 1.2 for line in found.cases)


@pytest.mark.parametrize("machine", [0.95, 1.5])
def test_a_fifth_more_time_is_caught_on_another_machine(machine):
    assert not outcome(a_run(1), a_run(2, machine=machine, kernels=1.2)).passed


def test_one_slow_case_is_caught():
    key = PLAN.tasks[2].key
    found = outcome(a_run(1), a_run(2, kernels=1.3, only=key))
    assert [line.name for line in found.slower] == [key]


def test_noise_is_not_a_regression():
    found = outcome(a_run(3, noise=0.5), a_run(4, noise=0.5, kernels=1.1))
    assert found.passed
    for line in found.cases:
        low, high = line.relative.interval
        assert high - low > 0.2


def test_cases_measured_beside_other_work_say_nothing():
    a, b = a_run(5), a_run(6, kernels=1.5)
    disturbed = [dataclasses.replace(record, disturbance=0.3) for record in b.records]
    mixed = dataclasses.replace(b, records=[*disturbed[:-1], a_run(6).records[-1]])
    found = outcome(a, mixed)
    assert found.passed
    assert [x.verdict for x in found.cases] == ["disturbed"] * (len(PLAN.tasks) - 1) + [""]
    with pytest.raises(ResultsError, match="measured beside other work"):
        outcome(a, dataclasses.replace(b, records=disturbed))


def test_a_case_that_fails_in_b_is_lost():
    b = a_run(6)
    first = b.records[0]
    failed = {**first.peers, "vstar_kernels": Outcome(FAILED, reason="no memory")}
    b.records[0] = dataclasses.replace(first, peers=failed)
    found = outcome(a_run(5), b)
    assert not found.passed
    assert found.lost == [f"Lost: {first.key}: no memory"]


def test_runs_without_a_common_case_are_refused():
    b = a_run(6)
    with pytest.raises(ResultsError, match="share no case in which vstar_kernels"):
        outcome(a_run(5), dataclasses.replace(b, records=[]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a", "b", "--tolerance", "nan"], "--tolerance: must be a finite number"),
        (["compare", "a", "b", "--tolerance", "-1"], "--tolerance: must be at least 0, got '-1'"),
        (["run", "--seconds", "nan"], "--seconds: must be a finite number, got 'nan'"),
        (["run", "--stop-after", "nan"], "--stop-after: must be a finite number, got 'nan'"),
        (["run", "--patience", "-1"], "--patience: must be at least 0, got '-1'"),
    ],
)
def test_no_number_that_decides_nothing_is_taken(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("benchmarks.run.begin", None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"Error parsing {message}" in capsys.readouterr().err


def test_the_command_fails_on_a_regression(tmp_path, capsys):
    paths = []
    for name, kernels in (("a", 1.0), ("b", 1.0), ("c", 1.2)):
        made = a_run(name, kernels=kernels)
        paths.append(str(tmp_path / f"{name}.jsonl"))
        environment = {**ENVIRONMENT, "torch": name}
        results.create(tmp_path / f"{name}.jsonl", environment, PLAN)
        for record in made.records:
            results.append(tmp_path / f"{name}.jsonl", record)
    assert main(["compare", paths[0], paths[1]]) == 0
    printed = capsys.readouterr().out
    assert "Not slower" in printed
    assert "A and B differ in torch: a and b" in printed
    assert main(["compare", paths[0], paths[2]]) == 1
    assert "Slower: short" in capsys.readouterr().out
