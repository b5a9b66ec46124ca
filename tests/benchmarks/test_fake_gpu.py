"""The benchmarks' way through a GPU's suites, on one that is none (``fake_gpu``)."""

import os
import threading

import pytest
import torch
from tqdm import tqdm

import vstar_kernels as vk
from benchmarks import measure, run, suites
from benchmarks.cases import Case
from benchmarks.clock import MOST_CALLS, SHORTEST, CaptureError, GpuClock, TimedCall
from benchmarks.progress import Progress
from benchmarks.results import FAILED, MEASURED, REFUSED
from tests.benchmarks.conftest import a_plan
from tests.benchmarks.fake_gpu import LAUNCH, FakeGpu, Worker
from vstar_kernels.attention import triton

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a worker is a fork here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]
NAMES = ("vstar_kernels", "eager", "sdpa")
SIZES = {"batch": 4, "heads": 2, "head_dim": 16}


def cases(*frames):
    return [Case("short", "forward", "float32", frames=n, **SIZES) for n in frames]


def a_run(path, found):
    tasks = suites.tasks(found, "cuda", ())
    return run.begin(path, a_plan(found, device="cuda", peers=NAMES, tasks=tasks))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


@pytest.fixture
def started(monkeypatch):
    """Has workers on a fake GPU; gives what chooses who misbehaves, and counts them."""
    found = []

    def choose(faults):
        def start(path, allocator, seconds):
            found.append(Worker(path, allocator, seconds, faults))
            return found[-1]

        monkeypatch.setattr(run, "_start", start)
        monkeypatch.setattr(run, "POLL", 0.02)
        return found

    return choose


@pytest.fixture
def gpu():
    with FakeGpu().installed() as found:
        yield found


def outcomes(record):
    return {name: outcome.status for name, outcome in record.peers.items()}


def test_a_run_survives_whatever_a_peer_does(path, started, gpu):
    """Each costs the peer alone, in its case; the others of that case are measured."""
    how = {3: "raise", 4: "memory", 5: "hang", 6: "kill", 7: "access", 8: "capture"}
    workers = started({"eager": how})
    a_run(path, cases(*how, 9))
    done = run.measure(path, patience=1.5)
    assert [record.case.frames for record in done.records] == [*how, 9]
    reasons = {}
    for record in done.records:
        assert not record.failure
        assert record.peers["vstar_kernels"].status == MEASURED
        assert record.peers["sdpa"].status == MEASURED
        eager = record.peers["eager"]
        reasons[record.case.frames] = eager.reason
        assert eager.status == (FAILED if record.case.frames < 8 else MEASURED), eager
    assert reasons[3] == "RuntimeError: no kernel for it"
    assert reasons[4].startswith("OutOfMemoryError: CUDA out of memory")
    assert reasons[5] == "hung for 1.5 s"
    assert reasons[6] == "ended by SIGSEGV"
    assert "illegal memory access" in reasons[7]
    assert done.records[5].peers["eager"].note == "launched, not captured"
    assert done.records[6].peers["eager"].note == ""
    # A new one after each that hung, was killed, lost its GPU or left a capture open.
    assert len(workers) == 5
    assert not Progress.beside(path).path.exists()


def test_a_fault_of_all_costs_the_case(path, started, gpu, monkeypatch):
    """While peers are timed in turn nobody's name is known."""
    timed = measure.time_in_turn

    def in_turn(clock, calls, sets, **options):
        if calls and calls[0].timed.name == "vstar_kernels" and path.stat().st_size < size + 10:
            gpu.misbehave("kill")
        return timed(clock, calls, sets, **options)

    monkeypatch.setattr(measure, "time_in_turn", in_turn)
    workers = started({})
    a_run(path, cases(3, 4))
    size = path.stat().st_size
    first, second = run.measure(path).records
    assert first.failure == "ended by SIGSEGV"
    assert outcomes(second) == dict.fromkeys(NAMES, MEASURED)
    assert len(workers) == 2


def test_a_run_that_was_cut_off_goes_on(path, started, gpu):
    """In the case that it was in, of which it knows who hangs."""
    started({"eager": {4: "hang"}})
    a_run(path, cases(3, 4, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "still", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # ends this process, and its worker with it
            run.measure(path)
    before = path.read_bytes()
    assert run.resume(path).missing
    done = run.measure(path, patience=1.5)
    assert path.read_bytes().startswith(before)
    assert [record.case.frames for record in done.records] == [3, 4, 5]
    assert done.records[1].peers["eager"].reason == "hung for 1.5 s"


def test_a_worker_does_not_wait_for_the_lock_of_another(path, monkeypatch):
    """That of tqdm, which a process has for ever that was killed with it."""

    def main(*_):
        with tqdm.get_lock():
            return 0

    monkeypatch.setattr(measure, "main", main)
    taken, done = threading.Event(), threading.Event()

    def hold():  # the thread that forks could take it again, and its child too
        with tqdm.get_lock():
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    worker = Worker(path, "", 0, {})
    try:
        assert worker.wait(5) == 0
    finally:
        worker.kill()  # while it waits: with the lock, none would have it again
        done.set()
        holder.join()


def test_what_does_not_fit_is_refused(path, started, gpu, monkeypatch):
    monkeypatch.setattr(FakeGpu, "free", 100)
    started({})
    a_run(path, cases(16))
    (record,) = run.measure(path).records
    assert record.peers["eager"].status == REFUSED


def test_a_gpus_records_have_figures_of_its_own(path, started, gpu):
    started({})
    begun = a_run(path, cases(8, 16))
    assert begun.environment["device"].startswith("Fake GPU")
    for record in run.measure(path).records:
        assert record.allocator == ""
        assert record.disturbance is None
        assert len(record.yardsticks["matrix product in float32"]) == 5
        result = record.case.elements * 4
        assert record.peers["vstar_kernels"].peak_bytes == 2**20 - result
        assert record.floor > 0


@pytest.mark.parametrize("seconds", [3e-6, 50e-6, 1e-3, 1e-9])
def test_short_calls_are_captured_in_chains(seconds):
    """So long that the start of a replay is little of what is timed."""
    called = []

    def cost():
        count = len(called)
        called.clear()
        return count * seconds

    inputs = [(n,) for n in range(3)]
    with FakeGpu(cost).installed() as gpu:
        clock = GpuClock()
        warm = clock.warm_up(TimedCall("a", called.append), inputs)
        enough = seconds * warm.calls >= SHORTEST - LAUNCH or warm.calls == MOST_CALLS
        assert enough
        assert warm.calls == 1 or seconds * warm.calls < 3 * SHORTEST
        found = clock.seconds(warm, 1)
        assert found == pytest.approx(seconds + LAUNCH / warm.calls)
        before = gpu.replays
        clock.seconds(warm, 2)
        assert gpu.replays == before + 1


def test_chains_begin_with_every_set_of_inputs_in_turn():
    called = []
    inputs = [(n,) for n in range(5)]
    with FakeGpu(lambda: len(called) * 90e-6).installed():
        clock = GpuClock()
        chains = []
        capture = clock._capture
        clock._capture = lambda function, chain: chains.append(chain) or capture(function, chain)
        warm = clock.warm_up(TimedCall("a", lambda n: None), inputs)
    assert warm.calls == MOST_CALLS  # it takes no time at all
    assert chains[-1][:6] == [(0,), (1,), (2,), (3,), (4,), (0,)]


def test_what_cannot_be_captured_says_so():
    with FakeGpu().installed() as gpu:
        clock = GpuClock()

        def synchronising(x):
            gpu.misbehave("capture")

        with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
            clock.warm_up(TimedCall("a", synchronising), [(0,)])
        with pytest.raises(CaptureError, match="a capture is open"):
            clock.warm_up(TimedCall("b", lambda x: x), [(0,)])
    with FakeGpu().installed() as gpu:
        assert GpuClock().warm_up(TimedCall("a", synchronising, capture=False), [(0,)]).calls == 1


def test_no_later_test_is_told_that_there_is_a_gpu():
    """Where the backends are asked on a fake GPU first, which keep what they answer."""
    triton.unavailable.cache_clear()
    before = vk.backends.available()
    triton.unavailable.cache_clear()
    with FakeGpu().installed():
        vk.backends.available()
    found = vk.backends.available()
    triton.unavailable.cache_clear()
    assert found == before
