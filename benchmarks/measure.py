"""One case: every peer checked, then timed in turn, beside a copy and a matrix product.

``python -m benchmarks.measure FILE ALLOCATOR SECONDS`` is the process that measures what a run's
file lacks. Each allocator setting has one of its own, because the allocator reads it once, at the
start; and a peer that brings its process down does not take the run with it.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.adapters import reason
from benchmarks.cases import Case
from benchmarks.clock import CpuClock, TimedCall, WarmCall, clock_for, time_in_turn
from benchmarks.cross import Cross, CrossBackward
from benchmarks.frame_adapters import RefusedError
from benchmarks.frames import Frames
from benchmarks.machine import Watch, free_bytes, peak_bytes
from benchmarks.operations import OPERATIONS, Forward
from benchmarks.peers import PEERS, Peer
from benchmarks.results import Outcome, Plan, Record, Task
from benchmarks.suites import WORKLOADS
from benchmarks.transformers import Transformer
from benchmarks.unet import Step

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
COPY = "copy"
SHARE_OF_MEMORY = 0.5  # of what is free, that a peer's logits may take


def measure(task: Task, plan: Plan, progress: Callable[[str], None]) -> Record:
    """Returns a case's record; ``progress`` gets the name of what is being done."""
    case, device = task.case, plan.device
    copied = 4 * case.elements * case.torch_dtype.itemsize  # bytes
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(case.threads or plan.threads)
    clock = clock_for(device)
    operation = _operation(case, plan, clock.sets(copied))
    outcomes: dict[str, Outcome] = {}
    calls: list[WarmCall] = []
    with torch.set_grad_enabled(case.operation.endswith("backward")):
        for name, peer in PEERS.items():
            if name in plan.peers and operation.offers(peer):
                progress(f"checks {peer.title}")
                outcomes[name], call = _prepare(name, peer, operation, clock, device)
                calls += [call] if call else []
                gc.collect()
                torch.cuda.empty_cache()  # nothing where there is no GPU
        calls += _yardsticks(operation, clock, device)
        progress("times")
        watch = Watch()
        limits = {"rounds": plan.rounds, "seconds": plan.seconds}
        times = time_in_turn(clock, calls, len(operation.inputs), **limits)
        disturbance = watch.others() if device == "cpu" else None
    for name in outcomes.keys() & times.keys():
        outcomes[name] = replace(outcomes[name], seconds=times.pop(name))
    # The best rounds of the yardsticks are the device's speed.
    bandwidth = copied / min(times[COPY]) if COPY in times else None
    product = min(min(seconds) for name, seconds in times.items() if name != COPY)
    flops_per_second = 2 * MATRIX_SIZE[device] ** 3 / product
    return Record(case, task.allocator, outcomes, times, bandwidth, flops_per_second, disturbance)


def _operation(case: Case, plan: Plan, num_sets: int) -> Forward | Step | Transformer:
    """Returns the operation of a case."""
    if case.operation == "step":
        return Step(case, plan.device, plan.unet_width)
    if case.operation in ("block", "model"):
        (use,) = case.uses
        return Transformer(case, plan.device, WORKLOADS["dit-model"]["models"][use.model])
    others = {"frames": Frames, "cross": Cross, "cross-backward": CrossBackward}
    return {**OPERATIONS, **others}[case.operation](case, plan.device, num_sets)


def _prepare(
    name: str, peer: Peer, operation: Forward | Step | Transformer, clock: CpuClock, device: str
) -> tuple[Outcome, WarmCall | None]:
    """Builds, runs and checks a peer: its outcome so far, and what to time if it may be."""
    case = operation.case
    if why := peer.unavailable(device, case.torch_dtype):
        return Outcome(results.UNAVAILABLE, reason=why), None
    if why := _too_large(peer, case, device):
        return Outcome(results.REFUSED, reason=why), None
    # Whatever a peer raises is what it has to say.
    try:
        timed, note = operation.timed_call(name, peer)
        timed.prepare()
        result = timed.function(*operation.inputs[0])
        try:
            error = operation.check(peer, result)
        except AssertionError as wrong:
            return Outcome(results.WRONG, reason=reason(wrong), note=note), None
        del result
        timed.prepare()  # the check of a whole model has exchanged its processors
        peak = peak_bytes(device, lambda: timed.function(*operation.inputs[0]))
        call = clock.warm_up(timed, operation.inputs)
    except RefusedError as refusal:
        return Outcome(results.REFUSED, reason=str(refusal)), None
    except Exception as error:
        return Outcome(results.FAILED, reason=reason(error)), None
    return Outcome(results.MEASURED, note=note, largest_error=error, peak_bytes=peak), call


def _too_large(peer: Peer, case: Case, device: str) -> str:
    """Returns why a peer that holds all logits is not tried; nothing if it may be."""
    factor = 2 if case.operation.endswith("backward") else 1
    needed, free = factor * peer.logits_held * case.logits_bytes, free_bytes(device)
    if needed <= SHARE_OF_MEMORY * free:
        return ""
    return f"its logits take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _yardsticks(
    operation: Forward | Step | Transformer, clock: CpuClock, device: str
) -> list[WarmCall]:
    """Returns matrix products in each type that may serve the case; a copy but of whole models."""
    case, size = operation.case, MATRIX_SIZE[device]
    calls = []
    for dtype in dict.fromkeys((case.torch_dtype, torch.float32)):
        a, b, c = torch.randn(3, size, size, device=device).to(dtype).unbind()
        name = f"matrix product in {dtype}".replace("torch.", "")
        product = TimedCall(name, lambda *_, a=a, b=b, c=c: torch.mm(a, b, out=c))
        calls.append(clock.warm_up(product, operation.inputs))
    if case.bytes is not None:
        # It reads two tensors and writes two, as many bytes as the forward moves.
        target = torch.empty_like(operation.blocks[0][:2])
        copy = TimedCall(COPY, lambda block: target.copy_(block[:2]))
        calls.append(clock.warm_up(copy, [(block,) for block in operation.blocks]))
    return calls


def main(path: Path, allocator: str, seconds: float) -> None:
    """Measures this allocator's tasks in order, until ``seconds`` have passed."""
    deadline = time.monotonic() + seconds
    logging.getLogger("xformers").setLevel(logging.ERROR)  # its reasons are in the results
    run = results.load(path)
    missing = [task for task in run.missing if task.allocator == allocator]
    total = len(run.plan.tasks)
    with tqdm(total=total, initial=total - len(run.missing), unit="case") as progress:
        for task in missing:
            if time.monotonic() > deadline:
                break
            progress.set_description(task.key)
            gc.freeze()  # what is imported by now is not garbage, and takes long to look through
            # A case may fail in any way; the others still run.
            try:
                record = measure(task, run.plan, progress.set_postfix_str)
            except Exception as error:
                record = Record(task.case, allocator, {}, failure=reason(error))
            results.append(path, record)
            progress.update()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
