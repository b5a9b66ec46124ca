"""One case: every peer checked, then timed in turn, beside a copy and a matrix product."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.clock import Clock, Contestant, Ready, clock_for, time_in_turn
from benchmarks.disturbance import Watch
from benchmarks.memory import peak_bytes
from benchmarks.operations import OPERATIONS, Operation, Step
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.peer import reason
from benchmarks.results import Outcome, Plan, Record, Task
from vstar_kernels.cli.demo.measure import read_bytes

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
COPY = "copy"
MEMINFO = Path("/proc/meminfo")
SHARE_OF_MEMORY = 0.5  # of what is free, that a peer's logits may take


def measure(task: Task, plan: Plan, progress: Callable[[str], None]) -> Record:
    """A case's record; ``progress`` gets the name of what is being done."""
    case, device = task.case, plan.device
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(case.threads or plan.threads)
    clock = clock_for(device)
    operation = _operation(case, plan, clock)
    peers: dict[str, Outcome] = {}
    timed: list[Ready] = []
    with torch.enable_grad() if case.operation == "backward" else torch.no_grad():
        for peer in PEERS:
            if peer.name in plan.peers and operation.offers(peer):
                progress(f"checks {peer.title}")
                peers[peer.name], ready = _prepare(peer, operation, clock, device)
                timed += [ready] if ready else []
                _release(device)
        timed += _yardsticks(operation, clock, device)
        progress("times")
        watch = Watch()
        sets, limits = len(operation.inputs), {"rounds": plan.rounds, "seconds": plan.seconds}
        times = time_in_turn(clock, timed, sets, **limits)
        others = watch.others() if device == "cpu" else None
    for name in peers.keys() & times.keys():
        peers[name] = replace(peers[name], seconds=times.pop(name))
    return Record(task, peers, times, *_rates(case, times, device), others)


def _operation(case: Case, plan: Plan, clock: Clock) -> Operation | Step:
    if case.operation == "step":
        return Step(case, plan.device, plan.unet_width)
    return OPERATIONS[case.operation](case, plan.device, clock.sets(_copied_bytes(case)))


def _prepare(
    peer: Peer, operation: Operation | Step, clock: Clock, device: str
) -> tuple[Outcome, Ready | None]:
    """Build, run and check a peer: its outcome so far, and what to time if it may be."""
    case = operation.case
    if why := peer.unavailable(device, case.torch_dtype):
        return Outcome(results.UNAVAILABLE, reason=why), None
    if why := _too_large(peer, case, device):
        return Outcome(results.REFUSED, reason=why), None
    # Whatever a peer raises is what it has to say.
    try:
        contestant, note = operation.contestant(peer)
        contestant.prepare()
        result = contestant.call(*operation.inputs[0])
        try:
            error = operation.check(peer, result)
        except AssertionError as wrong:
            return Outcome(results.WRONG, reason=reason(wrong), note=note), None
        del result
        contestant.prepare()  # the check of a whole model has exchanged its processors
        peak = peak_bytes(device, lambda: contestant.call(*operation.inputs[0]))
        ready = clock.ready(contestant, operation.inputs)
    except Exception as error:
        return Outcome(results.FAILED, reason=reason(error)), None
    return Outcome(results.MEASURED, note=note, largest_error=error, peak_bytes=peak), ready


def _too_large(peer: Peer, case: Case, device: str) -> str:
    """Why a peer that holds all logits is not tried; empty if it may be."""
    factor = 2 if case.operation == "backward" else 1
    needed = factor * peer.logits * case.logits_bytes
    free = _free_bytes(device)
    if free is None or needed <= SHARE_OF_MEMORY * free:
        return ""
    return f"its logits take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _free_bytes(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not MEMINFO.exists():
        return None
    return read_bytes(MEMINFO, "MemAvailable")


def _yardsticks(operation: Operation | Step, clock: Clock, device: str) -> list[Ready]:
    """Matrix products in each type that may serve the case; a copy, unless it is a whole model."""
    case, size = operation.case, MATRIX_SIZE[device]
    found = []
    for dtype in dict.fromkeys((case.torch_dtype, torch.float32)):
        a, b, c = torch.randn(3, size, size, device=device).to(dtype).unbind()
        name = f"matrix product in {dtype}".replace("torch.", "")
        product = Contestant(name, lambda *_, a=a, b=b, c=c: torch.mm(a, b, out=c))
        found.append(clock.ready(product, operation.inputs))
    if isinstance(operation, Operation) and case.bytes is not None:
        # It reads two tensors and writes two, as many bytes as the forward moves.
        target = torch.empty_like(operation.blocks[0][:2])
        copy = Contestant(COPY, lambda block: target.copy_(block[:2]))
        found.append(clock.ready(copy, [(block,) for block in operation.blocks]))
    return found


def _rates(
    case: Case, times: dict[str, list[float]], device: str
) -> tuple[float | None, float | None]:
    """Of the yardsticks' best rounds: bytes and floating-point operations per second."""
    bandwidth = _copied_bytes(case) / min(times[COPY]) if COPY in times else None
    product = min(min(seconds) for name, seconds in times.items() if name != COPY)
    return bandwidth, 2 * MATRIX_SIZE[device] ** 3 / product


def _copied_bytes(case: Case) -> int:
    """Four tensors."""
    return 4 * case.elements * case.torch_dtype.itemsize


def _release(device: str) -> None:
    """Give back what a peer leaves, before the next is measured."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
