"""One case: every peer checked, then timed in turn, beside a copy and a matrix product."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.clock import Clock, Contestant, clock_for, time_in_turn
from benchmarks.disturbance import Watch
from benchmarks.memory import peak_bytes
from benchmarks.operations import OPERATIONS, Operation, Step
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.peer import reason
from benchmarks.results import Outcome, Plan, Record, Task

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
    contestants: dict[str, Contestant] = {}
    calls: dict[str, Callable[[int], object]] = {}
    gradients = torch.enable_grad if case.operation == "backward" else torch.no_grad
    with gradients():
        for peer in PEERS:
            if peer.name not in plan.peers or not operation.offers(peer):
                continue
            progress(f"checks {peer.title}")
            outcome, contestant = _prepare(peer, operation, device)
            if contestant is not None:
                try:
                    calls[peer.name] = clock.ready(contestant, operation.inputs)
                    contestants[peer.name] = contestant
                except Exception as error:
                    outcome = Outcome(results.FAILED, reason=reason(error))
            peers[peer.name] = outcome
        yardsticks = _matrix_products(case, device)
        calls |= {x.name: clock.ready(x, operation.inputs) for x in yardsticks}
        if case.bytes is not None:
            yardsticks.append(_copy(operation.blocks))
            blocks = [(block,) for block in operation.blocks]
            calls[COPY] = clock.ready(yardsticks[-1], blocks)
        progress("times")
        watch = Watch()
        times = time_in_turn(
            clock,
            [*contestants.values(), *yardsticks],
            calls,
            len(operation.inputs),
            rounds=plan.rounds,
            seconds=plan.seconds,
        )
        others = watch.others() if device == "cpu" else None
    for name in contestants:
        peers[name] = replace(peers[name], seconds=times.pop(name))
    copied = 4 * case.elements * case.torch_dtype.itemsize
    bandwidth = copied / min(times[COPY]) if COPY in times else None
    product = min(min(seconds) for name, seconds in times.items() if name != COPY)
    rate = 2 * MATRIX_SIZE[device] ** 3 / product
    return Record(task, peers, times, bandwidth, rate, others)


def _operation(case: Case, plan: Plan, clock: Clock) -> Operation | Step:
    if case.operation == "step":
        return Step(case, plan.device, plan.unet_width)
    traffic = 4 * case.elements * case.torch_dtype.itemsize
    return OPERATIONS[case.operation](case, plan.device, clock.sets(traffic))


def _prepare(
    peer: Peer, operation: Operation | Step, device: str
) -> tuple[Outcome, Contestant | None]:
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
    except Exception as error:
        _release(device)
        return Outcome(results.FAILED, reason=reason(error)), None
    _release(device)
    return Outcome(results.MEASURED, note=note, largest_error=error, peak_bytes=peak), contestant


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
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _matrix_products(case: Case, device: str) -> list[Contestant]:
    """In each type that may serve the case."""
    size = MATRIX_SIZE[device]
    found = []
    for dtype in dict.fromkeys((case.torch_dtype, torch.float32)):
        a, b, c = torch.randn(3, size, size, device=device).to(dtype).unbind()
        name = f"matrix product in {dtype}".replace("torch.", "")
        found.append(Contestant(name, lambda *_, a=a, b=b, c=c: torch.mm(a, b, out=c)))
    return found


def _copy(blocks: Sequence[Tensor]) -> Contestant:
    """It reads two tensors and writes two, as many bytes as the forward moves."""
    target = torch.empty_like(blocks[0][:2])
    return Contestant(COPY, lambda block: target.copy_(block[:2]))


def _release(device: str) -> None:
    """Give back what a peer leaves, before the next is measured."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
