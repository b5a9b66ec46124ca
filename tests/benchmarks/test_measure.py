import dataclasses
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure as measuring
from benchmarks.cases import Case
from benchmarks.machine import Watch, peak_bytes
from benchmarks.measure import measure
from benchmarks.operations import OPERATIONS
from benchmarks.peers import EAGER, PEERS, VSTAR_KERNELS
from benchmarks.results import FAILED, MEASURED, RECORD, REFUSED, UNAVAILABLE, WRONG, Record, Task
from benchmarks.unet import Step

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"batch": 3, "frames": 9, "heads": 2, "head_dim": 16}


def replaced(monkeypatch, **changes):
    """The eager peer with something else in it."""
    peer = dataclasses.replace(PEERS[EAGER], **changes)
    monkeypatch.setattr(measuring, "PEERS", {name: PEERS[name] for name in (VSTAR_KERNELS, EAGER)})
    monkeypatch.setitem(measuring.PEERS, EAGER, peer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_right_or_says_why_it_cannot_run(name, operation, dtype):
    peer = PEERS[name]
    case = Case("suite", operation, dtype, **SIZES)
    torch.manual_seed(0)
    found = OPERATIONS[operation](case, "cpu", 1)
    if not found.offers(peer):
        return
    if (name, operation, dtype) == ("eager-compiled", "backward", "float16"):
        pytest.skip("Inductor takes seconds, and compiles float16 as it does bfloat16")
    if why := peer.unavailable("cpu", case.torch_dtype):
        assert name in ("flex", "xformers", "xformers-bias", "flash-attn"), why
        assert len(why) > 20
        return
    with torch.set_grad_enabled(operation == "backward"):
        timed, _ = found.timed_call(name, peer)
        result = timed.function(*found.inputs[0])
        found.check(peer, result)
        tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
        for tensor in tensors:
            tensor[-1] *= 1.5
            with pytest.raises(AssertionError, match="error"):
                found.check(peer, result)
            tensor[-1] /= 1.5


def test_why_peers_cannot_run_on_a_cpu_is_their_own_reason():
    reasons = {name: peer.unavailable("cpu", torch.float32) for name, peer in PEERS.items()}
    assert "max scores is not supported on CPU" in reasons["flex"]
    assert "xformers" in reasons["xformers"] or "device=cpu" in reasons["xformers"]
    assert reasons["vstar_kernels"] == reasons["eager"] == reasons["sdpa"] == ""


def test_a_wrong_result_is_not_timed(monkeypatch, task, plan):
    replaced(monkeypatch, build=lambda _: lambda query, key, value: value)
    record = measure(task, plan, lambda _: None)
    assert record.peers["eager"].status == WRONG
    assert record.peers["eager"].seconds == []
    assert "error" in record.peers["eager"].reason
    assert record.peers["vstar_kernels"].status == MEASURED


def test_a_failing_peer_is_recorded_and_the_others_are_measured(monkeypatch, task, plan):
    def build(inputs):
        def call(query, key, value):
            if query.shape[0] == task.case.batch:
                raise RuntimeError("no such\nkernel")
            return query

        return call

    replaced(monkeypatch, build=build)
    record = measure(task, plan, lambda _: None)
    outcome = record.peers["eager"]
    assert (outcome.status, outcome.reason) == (FAILED, "RuntimeError: no such kernel")
    assert len(record.peers["vstar_kernels"].seconds) == plan.rounds


def test_logits_that_do_not_fit_are_not_tried(monkeypatch, task, plan):
    replaced(monkeypatch)
    monkeypatch.setattr(measuring, "free_bytes", lambda _: 100)
    outcome = measure(task, plan, lambda _: None).peers["eager"]
    assert outcome.status == REFUSED
    assert "its logits take" in outcome.reason


def test_figures_of_a_record(task, plan):
    record = measure(task, plan, lambda _: None)
    ours = record.peers["vstar_kernels"]
    assert ours.status == MEASURED
    assert 0 < ours.largest_error < 1e-5
    assert record.peers["flex"].status == UNAVAILABLE
    copied, product = record.yardsticks["copy"], record.yardsticks["matrix product in float32"]
    assert len(ours.seconds) == len(copied) == len(product) == plan.rounds
    assert record.bandwidth == pytest.approx(task.case.bytes / min(copied))
    assert record.flops_per_second == pytest.approx(2 * 1024**3 / min(product))
    floor = max(task.case.bytes / record.bandwidth, task.case.flops / record.flops_per_second)
    assert record.floor == floor
    assert record.floor_over_time("vstar_kernels") == pytest.approx(floor / ours.median)


def test_other_processes_are_noticed():
    """One that is busy all the time takes one core; so do we."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = Watch()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            pass
        share = watch.others() * os.cpu_count()
    finally:
        busy.kill()
        busy.wait()
    assert share > 0.4


@pytest.mark.skipif(peak_bytes("cpu", lambda: None) is None, reason="no /proc here")
def test_peak_memory_counts_what_is_neither_given_nor_returned():
    megabytes = 64

    def call():
        scratch = torch.ones(megabytes * 2**18)  # float32
        return scratch[: megabytes * 2**17] * scratch.sum()

    call()
    peak = peak_bytes("cpu", call)
    assert megabytes * 2**20 * 0.95 < peak < megabytes * 2**20 * 1.2


class NoNumbers(TorchDispatchMode):
    """Refuses what would wait for a GPU: tensors made of numbers, and numbers of tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func is torch.ops.aten.lift_fresh.default
        waits |= torch.Tag.data_dependent_output in func.tags
        assert not waits, f"{func} cannot be captured in a graph"
        return func(*args, **(kwargs or {}))


def test_a_whole_unet_is_checked_against_the_reference(plan):
    pytest.importorskip("diffusers")
    case = Case("unet", "step", "float32", 32, 2, 1, 32, latents=(4, 4))
    with torch.no_grad():
        step = Step(case, "cpu", width=32)
        results = {}
        for name in ("vstar_kernels", "eager", "sdpa"):
            timed, _ = step.timed_call(name, PEERS[name])
            timed.prepare()
            with NoNumbers():
                results[PEERS[name]] = timed.function(*step.inputs[0])
        for peer, result in results.items():
            step.check(peer, result)
            other = next(x for x in results if x.tar != peer.tar)
            with pytest.raises(AssertionError, match="relative error"):
                step.check(other, result)


def test_a_case_is_the_same_after_json(task):
    case = dataclasses.replace(task.case, latents=(4, 6), threads=2)
    record = Record(case, "warm", {})
    read = RECORD.validate_json(RECORD.dump_json(record, by_alias=True))
    assert read == record
    assert read.case.uses == case.uses
    assert Task(case, "warm").key == "short/float32/4x3x2x16/latents-4x6/2-threads/warm-allocator"
