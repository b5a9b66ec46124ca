"""One case: every peer checked, then timed in turn, beside a copy and a matrix product.

``python -m benchmarks.measure FILE ALLOCATOR SECONDS`` is the process that measures what a run's
file lacks. Each allocator setting has one of its own, because the allocator reads it once, at the
start; and a peer that brings its process down does not take the run with it. Where a process is of
no more use, it ends with the status ``RESTART``, and another goes on with the same case.
"""

from __future__ import annotations

import functools
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
from benchmarks.clock import (
    FEWEST_ROUNDS,
    CaptureError,
    CpuClock,
    TimedCall,
    WarmCall,
    clock_for,
    time_in_turn,
)
from benchmarks.cross import Cross, CrossBackward
from benchmarks.frame_adapters import RefusedError
from benchmarks.frames import Frames
from benchmarks.machine import Watch, end_with_parent, free_bytes, peak_bytes
from benchmarks.operations import OPERATIONS, Forward
from benchmarks.peers import PEERS, Peer
from benchmarks.progress import RESTART, Progress, RestartError, Trouble
from benchmarks.results import Outcome, Plan, Record, Task
from benchmarks.suites import WORKLOADS
from benchmarks.transformers import Transformer
from benchmarks.unet import Step

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
COPY = "copy"
SHARE_OF_MEMORY = 0.5  # of what is free, that a peer's logits may take


def measure(
    task: Task, plan: Plan, show: Callable[[str], None], progress: Progress | None = None
) -> Record:
    """Returns a case's record; ``show`` gets the name of what is being done.

    ``progress`` has what earlier processes learnt of the case, and gets who is at work.

    Raises:
        RestartError: A peer has made this process useless.
    """
    case, device = task.case, plan.device
    at = progress.at if progress else lambda peer: None
    known = progress.troubles if progress else {}
    copied = 4 * case.elements * case.torch_dtype.itemsize  # bytes
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(case.threads or plan.threads)
    clock = clock_for(device)
    operation = make_operation(case, plan, clock.sets(copied))
    outcomes: dict[str, Outcome] = {}
    calls: list[WarmCall] = []
    with torch.set_grad_enabled(case.operation.endswith("backward")):
        for name, peer in PEERS.items():
            if name in plan.peers and operation.offers(peer):
                show(f"checks {peer.title}")
                at(name)
                outcomes[name], call = _prepare(
                    name, peer, operation, clock, device, known.get(name)
                )
                calls += [call] if call else []
                torch.cuda.empty_cache()  # nothing where there is no GPU
        at("")
        calls += _yardsticks(operation, clock, device)
        at("")
        show("times")
        watch = Watch()
        limits = {"rounds": plan.rounds, "seconds": plan.seconds}
        times = time_in_turn(clock, calls, len(operation.inputs), **limits)
        disturbance = watch.others() if device == "cpu" else None
    for name in outcomes.keys() & times.keys():
        outcomes[name] = replace(outcomes[name], seconds=times.pop(name))
    if device == "cuda":
        times |= _products_of_a_gpu(case.torch_dtype)
    # The best rounds of the yardsticks are the device's speed.
    bandwidth = copied / min(times[COPY]) if COPY in times else None
    product = min(min(seconds) for name, seconds in times.items() if name != COPY)
    flops_per_second = 2 * MATRIX_SIZE[device] ** 3 / product
    return Record(case, task.allocator, outcomes, times, bandwidth, flops_per_second, disturbance)


def make_operation(case: Case, plan: Plan, num_sets: int) -> Forward | Step | Transformer:
    """Returns the operation of a case."""
    if case.operation == "step":
        return Step(case, plan.device, plan.unet_width)
    if case.operation in ("block", "model"):
        (use,) = case.uses
        return Transformer(case, plan.device, WORKLOADS["dit-model"]["models"][use.model])
    others = {"frames": Frames, "cross": Cross, "cross-backward": CrossBackward}
    return {**OPERATIONS, **others}[case.operation](case, plan.device, num_sets)


def _prepare(
    name: str,
    peer: Peer,
    operation: Forward | Step | Transformer,
    clock: CpuClock,
    device: str,
    trouble: Trouble | None,
) -> tuple[Outcome, WarmCall | None]:
    """Builds, runs and checks a peer: its outcome so far, and what to time if it may be."""
    case = operation.case
    if trouble and trouble.fatal:
        return Outcome(results.FAILED, reason=trouble.reason), None
    if why := peer.unavailable(device, case.torch_dtype):
        if _broken(device):
            raise RestartError(name, Trouble(why, fatal=True))
        return Outcome(results.UNAVAILABLE, reason=why), None
    if why := _too_large(peer, case, device):
        return Outcome(results.REFUSED, reason=why), None
    # Whatever a peer raises is what it has to say.
    try:
        timed, note = operation.timed_call(name, peer)
        if trouble:
            timed = replace(timed, capture=False)
            note = "; ".join(filter(None, (note, "launched, not captured")))
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
    except CaptureError as error:
        raise RestartError(name, Trouble(reason(error), fatal=False)) from error
    except Exception as error:
        if _broken(device):
            raise RestartError(name, Trouble(reason(error), fatal=True)) from error
        failed = Outcome(results.FAILED, reason=reason(error))
    else:
        return Outcome(results.MEASURED, note=note, largest_error=error, peak_bytes=peak), call
    gc.collect()  # what failed for want of memory may be held by a cycle
    return failed, None


def _broken(device: str) -> bool:
    """Returns whether nothing runs any more on this process's GPU, as after a stray access."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
    """Returns a copy, but of whole models; on a CPU, matrix products that may serve the case too.

    Other processes take a CPU's time, and nobody a GPU's: its products are timed once.
    """
    case, calls = operation.case, []
    if device == "cpu":
        calls += [
            clock.warm_up(_product(device, dtype), [()])
            for dtype in dict.fromkeys((case.torch_dtype, torch.float32))
        ]
    if case.bytes is not None:
        # It reads two tensors and writes two, as many bytes as the forward moves.
        target = torch.empty_like(operation.blocks[0][:2])
        copy = TimedCall(COPY, lambda block: target.copy_(block[:2]))
        calls.append(clock.warm_up(copy, [(block,) for block in operation.blocks]))
    return calls


def _product(device: str, dtype: torch.dtype) -> TimedCall:
    """Returns a matrix product, which takes no inputs."""
    size = MATRIX_SIZE[device]
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    name = f"matrix product in {dtype}".replace("torch.", "")
    return TimedCall(name, lambda: torch.mm(a, b, out=c))


@functools.cache
def _products_of_a_gpu(dtype: torch.dtype) -> dict[str, list[float]]:
    """Returns the seconds of matrix products by round, under their name."""
    clock = clock_for("cuda")
    product = clock.warm_up(_product("cuda", dtype), [()])
    return time_in_turn(clock, [product], 1, rounds=FEWEST_ROUNDS, seconds=0.0)


def main(path: Path, allocator: str, seconds: float) -> int:
    """Measures this allocator's tasks in order, until ``seconds`` have passed.

    Returns the exit status: 0, or ``RESTART``.
    """
    deadline = time.monotonic() + seconds
    logging.getLogger("xformers").setLevel(logging.ERROR)  # its reasons are in the results
    run = results.load(path)
    missing = [task for task in run.missing if task.allocator == allocator]
    progress, total = Progress.beside(path), len(run.plan.tasks)
    with tqdm(total=total, initial=total - len(run.missing), unit="case") as bar:
        for task in missing:
            if time.monotonic() > deadline:
                break
            bar.set_description(task.key)
            # What is imported by now is not garbage, and takes long to look through.
            gc.collect()
            gc.freeze()
            torch.cuda.empty_cache()  # nothing where there is no GPU
            progress.begin(task.key)
            # A case may fail in any way; the others still run.
            try:
                record = measure(task, run.plan, bar.set_postfix_str, progress)
            except RestartError as restart:
                progress.add(restart.peer, restart.trouble)
                return RESTART
            except Exception as error:
                record = Record(task.case, allocator, {}, failure=reason(error))
            results.append(path, record)
            bar.update()
            if record.failure and _broken(run.plan.device):
                return RESTART
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
