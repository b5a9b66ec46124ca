"""The stages of ``gpu_check.sh``, on a CPU and on a GPU that is none."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu_check, json_lines, precompile, publish, pytest_lines, results
from benchmarks.__main__ import main
from benchmarks.gpu_check import BY_NAME, STAGES, Check, Options
from benchmarks.results import FAILED, MEASURED, Outcome, Record, ResultsError
from benchmarks.suites import SUITES as SUITES_OF_ALL
from tests.benchmarks.conftest import a_plan, no_workers, small_cases
from tests.benchmarks.fake_gpu import FakeGpu
from tests.helpers import ROOT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name != "posix", reason="a shell script"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]
# Beyond what is quick for somebody who waits for it.
SMALL = (
    *("--unet-latents", "4", "4", "--unet-width", "32", "--unet-frames", "2", "--seconds", "0"),
    *("--peers", "eager", "composed", "sdpa-values"),
)
SUITES = [stage.name for stage in STAGES if stage.suites]


def check(tmp_path, *names, **options):
    stages = tuple((BY_NAME[name],) for name in names)
    options = {"device": "cpu", "quick": True, "jobs": 1, **options}
    return Check(Options(stages, output=tmp_path / "out", **options))


@pytest.fixture
def in_this_process(monkeypatch):
    """Has commands of the benchmarks run here, which has imported everything."""
    ran = []

    def command(self, command, seconds, environment=None):
        ran.append(command)
        assert command[1:4] == ["-m", "benchmarks", "run"]
        with no_workers():
            return main(command[3:])

    monkeypatch.setattr(Check, "_command", command)
    monkeypatch.setattr(gpu_check, "QUICK", (*gpu_check.QUICK, *SMALL))
    return ran


@pytest.mark.parametrize("name", SUITES)
def test_every_stage_that_measures_does_so_on_a_cpu(name, tmp_path, in_this_process, monkeypatch):
    if name in ("unet", "transformers"):
        pytest.importorskip("diffusers")
    monkeypatch.setattr("benchmarks.suites.QUICK_TOKENS", 128)
    monkeypatch.setattr("benchmarks.suites.CPU_CHANNELS", 128 * 1536)
    monkeypatch.setattr("benchmarks.suites.QUICK_ELEMENTS", 2**16)
    assert check(tmp_path, name).run() == 0
    run = results.load(tmp_path / f"out/{name}.jsonl")
    assert run.records
    assert not run.missing
    assert {record.case.suite for record in run.records} <= set(BY_NAME[name].suites)
    assert all(x.peers["vstar_kernels"].status == MEASURED for x in run.records)
    summary = (tmp_path / "out/summary.md").read_text()
    assert f"| {name} | {len(run.records)} of {len(run.records)} cases |" in summary


def test_the_stages_are_runs_of_a_gpu_in_order_of_value(monkeypatch):
    planned = {}

    def begin(path, plan):
        planned[path.stem] = plan
        raise ResultsError("no more is wanted")

    monkeypatch.setattr("benchmarks.run.begin", begin)
    monkeypatch.setattr(Check, "_python", lambda self, command, seconds: main(command[2:]))
    with FakeGpu().installed():
        for name in SUITES:
            check(Path("nowhere"), name, device="cuda", quick=False)._measure(
                BY_NAME[name], Path(f"{name}.jsonl"), 60.0
            )
    assert list(planned) == SUITES
    found = {name: [task.case for task in plan.tasks] for name, plan in planned.items()}
    assert all(found.values())
    assert list(dict.fromkeys(case.frames for case in found["tile"])) == [32, 64, 128, 16, 48]
    assert found["long"][0].frames == 1024
    assert {case.operation for case in found["transformers"]} == {"model"}
    assert {case.latents for case in found["unet"]} == {(40, 64)}
    # Everything that can be measured on a GPU is in one of them.
    assert {case.suite for cases in found.values() for case in cases} == {*SUITES_OF_ALL} - {
        "threads"
    }


def test_the_script_runs_stages_and_says_how_they_ended(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "DEVICE": "cpu",
                   "QUICK": "1", "WHEELS": "none"}  # fmt: skip
    command = [ROOT / "benchmarks/gpu_check.sh", "tune"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=True
    )
    assert "tune: times nothing without a GPU" in done.stdout
    assert "| tune | times nothing without a GPU |" in (tmp_path / "summary.md").read_text()


def test_what_is_no_stage_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["2", "tiel"])
    assert "must be a run or a stage, got 'tiel'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "value"), [("--jobs", "0"), ("--limit", "nan"), ("--limit", "0")]
)
def test_numbers_that_no_run_can_have_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["tune", option, value])
    assert refused.value.code == 2
    assert f"got '{value}'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_end_is_an_exit(request_, monkeypatch):
    monkeypatch.setattr(Check, "run", lambda self: signal.raise_signal(request_))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(["tune"])
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert ended.value.code == 128 + request_


def test_a_run_is_of_few_files_and_its_stages_fit_into_ten_minutes():
    for number in "12345":
        stages = gpu_check.stages_of(number)
        assert len(stages) <= 6
        assert sum(stage.limit for stage in stages) <= 600
    assert [stage.run for stage in STAGES] == sorted(stage.run for stage in STAGES)
    assert [stage.name for stage in STAGES[-2:]] == ["sanitizer", "shipped"]
    with pytest.raises(ValueError, match="got 'tiel'; known: 1, 2, 3, 4, 5, tests, tile"):
        gpu_check.stages_of("tiel")


def test_a_stage_goes_on_with_earlier_results(tmp_path, in_this_process):
    assert check(tmp_path, "columns").run() == 0
    earlier = tmp_path / "out/columns.jsonl"
    lines = earlier.read_text().splitlines(keepends=True)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/columns.jsonl").write_text("".join(lines[:-1]))
    earlier.unlink()
    assert check(tmp_path, "columns", resume=tmp_path / "earlier").run() == 0
    assert "--resume" in in_this_process[-1]
    assert earlier.read_text().splitlines(keepends=True)[:-1] == lines[:-1]
    assert not results.load(earlier).missing
    in_this_process.clear()
    assert check(tmp_path, "columns").run() == 0
    assert in_this_process == []  # nothing is begun for what is finished


def test_a_stage_whose_file_is_no_run_does_not_keep_the_next_from_running(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/columns.jsonl").write_text("mine\n")
    assert check(tmp_path, "columns", "tune").run() == 1
    summary = (tmp_path / "out/summary.md").read_text()
    assert "| columns | ResultsError: " in summary
    assert "| tune | times nothing without a GPU |" in summary
    assert (tmp_path / "out/columns.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("line", ["mine", "[]", '{"test": "a"}', '{"test": [], "outcome": "x"}'])
def test_a_file_that_is_none_of_tests_costs_its_stage_alone(line, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sanitizer.jsonl").write_text(f"{line}\n")
    assert check(tmp_path, "sanitizer", "tune").run() == 1
    summary = (tmp_path / "out/summary.md").read_text()
    assert "sanitizer.jsonl, line 1: " in summary
    assert "| tune | times nothing without a GPU |" in summary


def test_a_torn_line_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    json_lines.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert json_lines.read(path, dict) == [{"a": 1}]
    json_lines.append(path, {"a": 3})
    assert json_lines.read(path, dict) == [{"a": 1}, {"a": 3}]


def test_resuming_from_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(
        SystemExit, match=r"resume must be a folder with results, .*nowhere is none"
    ):
        check(tmp_path, "tune", resume=tmp_path / "nowhere").run()


def test_what_is_stopped_leaves_nothing_behind_and_a_summary(tmp_path, monkeypatch):
    """Neither the program nor what it started in turn, though that ignores the request to end."""
    marker = tmp_path / "pid"
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    program = (
        f"import pathlib, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"pathlib.Path({str(marker)!r}).write_text(str(p.pid)); p.wait()"
    )
    monkeypatch.setattr(gpu_check, "MOMENT", 0.5)

    def measured(self, stage, file, seconds):
        while not marker.exists() or not marker.read_text():
            with gpu_check.started([sys.executable, "-c", program], subprocess.DEVNULL, {}):
                end = time.monotonic() + 60
                while time.monotonic() < end and not (marker.exists() and marker.read_text()):
                    time.sleep(0.05)
                raise SystemExit(143)  # as a signal makes it

    monkeypatch.setattr(Check, "_measure", measured)
    with pytest.raises(SystemExit):
        check(tmp_path, "tile").run()
    pid = int(marker.read_text())
    gone = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < gone
        time.sleep(0.05)
    assert "| tile | stopped |" in (tmp_path / "out/summary.md").read_text()


def test_a_command_has_its_time(tmp_path):
    made = check(tmp_path, "tile")
    made.options.output.mkdir()
    began = time.monotonic()
    assert made._command([sys.executable, "-c", "import time; time.sleep(100)"], 0.3) is None
    assert time.monotonic() - began < 30
    assert made._command([sys.executable, "-c", "print('said'); raise SystemExit(4)"], 60) == 4
    assert "said" in (tmp_path / "out/log.txt").read_text()


# ---- tests ----

HANGS = """
import os, time
import pytest

@pytest.mark.parametrize("n", range(3))
def test_fine(n):
    pass

def test_wrong():
    assert not "so it is"

def test_hangs():
    time.sleep(60)

def test_left_out():
    pytest.skip("no reason")
"""


def test_tests_have_their_lines_and_one_that_hangs_costs_itself(tmp_path):
    (tmp_path / "test_those.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--patience", "2",
               "-p", "benchmarks.pytest_lines", "-n", "1", "--rootdir", str(tmp_path),
               "--lines", "lines.jsonl", "test_those.py"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def tests(*more):
        subprocess.run([*command, *more], cwd=tmp_path, env=environment, timeout=400, check=False,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        found = pytest_lines.read(tmp_path / "lines.jsonl")
        return {name.split("::")[1]: x["outcome"] for name, x in found.items()}

    expected = {f"test_fine[{n}]": "passed" for n in range(3)}
    expected |= {"test_wrong": "failed", "test_hangs": "failed", "test_left_out": "skipped"}
    assert tests() == expected
    (tmp_path / "lines.jsonl").rename(tmp_path / "before.jsonl")
    assert tests("--but", "before.jsonl") == {"test_wrong": "failed", "test_hangs": "failed"}


# ---- kernels that are compiled beforehand ----


def test_kernels_of_a_runs_cases_are_called_once_with_few_sequences(tmp_path, monkeypatch):
    cases = [x for x in small_cases() if x.suite in ("short", "maps", "unet")]
    many = [x for n in (64, 80, 96) for x in [type(x)(**{**vars(x), "batch": n}) for x in cases]]
    found = precompile.distinct([results.Task(case, "") for case in many])
    assert {case.operation for case in found} == {"forward", "map"}
    assert len(found) == len({(x.operation, x.frames, x.dtype) for x in found})
    assert {case.batch for case in found} == {64}
    called = []
    monkeypatch.setattr(precompile, "call", lambda case, plan: called.append(case) or 1 / 0)
    path = tmp_path / "run.jsonl"
    plan = a_plan([], device="cpu", tasks=tuple(results.Task(case, "") for case in many))
    results.create(path, {}, plan)
    precompile.main(path, 0, 2)
    precompile.main(path, 1, 2)
    assert called == found[::2] + found[1::2]


def test_a_call_beforehand_is_of_this_packages_peers(monkeypatch):
    case = next(small_cases())
    seen = []
    for name, peer in precompile.PEERS.items():
        monkeypatch.setitem(
            precompile.PEERS, name, type(peer)(**{**vars(peer), "build": noted(peer, name, seen)})
        )
    with FakeGpu().installed():
        precompile.call(case, a_plan([case], device="cuda"))
    assert seen == ["vstar_kernels", "strength-0"]


def noted(peer, name, seen):
    if peer.build is None:
        return None

    def build(inputs):
        attention = peer.build(inputs)
        return lambda *qkv: seen.append(name) or attention(*qkv)

    return build


# ---- what is kept ----


def a_gpus_results(folder, device="NVIDIA H100 80GB HBM3"):
    case = next(small_cases())
    environment = {"device": device, "torch": "2.11", "triton": "3.6", "commit": "abc",
                   "clocks and driver": {"driver_version": "580.1"}}  # fmt: skip
    folder.mkdir()
    plan = a_plan([case], device="cuda", tasks=(results.Task(case, ""),))
    results.create(folder / "tile.jsonl", environment, plan)
    peers = {"vstar_kernels": Outcome(MEASURED, [1e-3] * 5), "eager": Outcome(FAILED, reason="no")}
    record = Record(case, "", peers, bandwidth=1e12, flops_per_second=1e14)
    results.append(folder / "tile.jsonl", record)
    lines = [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "passed"}]
    (folder / "tests.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_a_gpus_results_are_kept_under_its_name_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "KEPT", tmp_path / "kept")
    a_gpus_results(tmp_path / "found")
    place = publish.keep(tmp_path / "found")
    assert place == tmp_path / "kept/gpu-nvidia-h100-80gb-hbm3"
    text = publish.measured()
    assert "NVIDIA H100 80GB HBM3, driver 580.1, Triton 3.6, PyTorch 2.11, commit abc" in text
    assert "tests, in parallel: 2 passed." in text
    assert "| a-model |" in text
    assert text.index("passed") < text.index("a-model")


def test_results_of_something_else_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "KEPT", tmp_path / "kept")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultsError, match="of one GPU, has those of none"):
        publish.keep(tmp_path / "empty")
    a_gpus_results(tmp_path / "found")
    other = tmp_path / "other"
    a_gpus_results(other, "Another GPU")
    (other / "tile.jsonl").rename(tmp_path / "found/long.jsonl")
    with pytest.raises(ResultsError, match="'Another GPU', 'NVIDIA H100"):
        publish.keep(tmp_path / "found")
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "kept").iterdir())
