"""The quick cases under pytest-benchmark, for developers: ``make bench-pytest``.

``--benchmark-autosave`` keeps a run, ``--benchmark-compare`` compares with it, and
``--benchmark-compare-fail=median:10%`` fails where one is slower. Peers are not interleaved here:
``python -m benchmarks`` is for claims, this is for steering.
"""

import argparse
import contextlib

import pytest
import torch

from benchmarks.operations import OPERATIONS
from benchmarks.peers import PEERS
from benchmarks.planning import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUITES = ["short", "long", "backward", "maps"]
QUICK = argparse.Namespace(
    device=DEVICE, quick=True, full_rows=False, peers=None, threads=None, isa=None, suites=SUITES
)
CASES = [task.case for task in plan(QUICK).tasks]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.key)
def operation(request):
    """A case with its inputs."""
    torch.manual_seed(0)
    case = request.param
    return OPERATIONS[case.operation](case, DEVICE, num_sets=1)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_speed(benchmark, operation, peer):
    """The peer's result is right; its time is measured."""
    case = operation.case
    if not operation.offers(peer):
        pytest.skip(f"{peer.name} has no {case.operation}")
    if why := peer.unavailable(DEVICE, case.torch_dtype):
        pytest.skip(why)
    benchmark.group = case.key
    (inputs,) = operation.inputs
    with contextlib.nullcontext() if case.operation == "backward" else torch.no_grad():
        contestant, _ = operation.contestant(peer)
        operation.check(peer, contestant.call(*inputs))

        def call():
            contestant.call(*inputs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)
