"""The quick cases under pytest-benchmark, for developers: ``make bench-pytest``.

``--benchmark-autosave`` keeps a run, ``--benchmark-compare`` compares with it, and
``--benchmark-compare-fail=median:10%`` fails where one is slower. Peers are not interleaved here:
``python -m benchmarks`` is for claims, this is for steering.
"""

import pytest
import torch

from benchmarks.operations import OPERATIONS
from benchmarks.peers import PEERS
from benchmarks.suites import Selection, plan

QUICK = plan(Selection(quick=True, suites=("short", "long", "backward", "maps")))


@pytest.fixture(scope="module", params=[task.case for task in QUICK.tasks], ids=lambda x: x.key)
def operation(request):
    """A case with its inputs."""
    torch.manual_seed(0)
    return OPERATIONS[request.param.operation](request.param, QUICK.device, num_sets=1)


@pytest.mark.parametrize("name", PEERS)
def test_speed(benchmark, operation, name):
    """The peer's result is right; its time is measured."""
    case, peer = operation.case, PEERS[name]
    if not operation.offers(peer):
        pytest.skip(f"{name} has no {case.operation}")
    if why := peer.unavailable(QUICK.device, case.torch_dtype):
        pytest.skip(why)
    benchmark.group = case.key
    inputs = operation.inputs[0]
    with torch.set_grad_enabled(case.operation.endswith("backward")):
        timed, _ = operation.timed_call(name, peer)
        operation.check(peer, timed.function(*inputs))

        def call():
            timed.function(*inputs)
            if QUICK.device == "cuda":
                torch.cuda.synchronize()

        benchmark(call)
