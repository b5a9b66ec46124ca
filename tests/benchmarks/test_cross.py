"""The operations of the cross suites: peers are right, and what is wrong is seen."""

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.cross import Cross, CrossBackward
from benchmarks.peers import PEERS
from benchmarks.suites import WORKLOADS, Selection, plan

pytestmark = pytest.mark.usefixtures("one_thread")
OPERATIONS = {"cross": Cross, "cross-backward": CrossBackward}
SIZES = {"batch": 3, "frames": 9, "heads": 2, "head_dim": 16, "keys": 13, "columns": 4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.build_cross])
def test_every_peer_is_right(name, operation, dtype):
    torch.manual_seed(0)
    peer, found = PEERS[name], OPERATIONS[operation](Case("s", operation, dtype, **SIZES), "cpu", 1)
    if why := peer.unavailable("cpu", found.case.torch_dtype):
        pytest.skip(why)
    with torch.set_grad_enabled(operation == "cross-backward"):
        timed, _ = found.timed_call(name, peer)
        result = timed.function(*found.inputs[0])
        assert len(result) == 2 + (operation == "cross-backward")
        found.check(peer, result)
        for tensor in result:
            tensor[-1] *= 1.5
            with pytest.raises(AssertionError):
                found.check(peer, result)
            tensor[-1] /= 1.5


def test_bytes_and_operations_by_hand():
    forward = Case("cross", "cross", "bfloat16", **SIZES)
    elements, text, maps = 3 * 9 * 2 * 16, 2 * 3 * 13 * 2 * 16, 4 * 3 * 9 * 4
    assert forward.bytes == 2 * (2 * elements + text) + maps
    assert forward.flops == 2 * 2 * elements * 13
    assert forward.logits_bytes == 2 * 3 * 2 * 9 * 13
    backward = Case("cross", "cross-backward", "bfloat16", **SIZES)
    assert backward.bytes == 2 * (5 * elements + 2 * text) + 2 * maps
    assert backward.flops == 5 * forward.flops / 2
    assert forward.key == "cross/bfloat16/3x9x2x16/keys-13-columns-4"
    assert forward.size == "3 × 9 × 2 × 16, 13 keys, 4 columns"


def test_the_suite_has_every_level_once():
    chosen = Selection(suites=("cross",), device="cpu", threads=1, full_rows=True)
    found = [task.case for task in plan(chosen).tasks]
    assert len({case.key for case in found}) == len(found)
    used = {(use.model, use.level, case.batch) for case in found for use in case.uses}
    table = WORKLOADS["cross"]
    assert used == {
        (model, str(level), frames)
        for model in table["models"] for level in range(4) for frames in table["frames"]
    }  # fmt: skip
    (finest,) = (x for x in found if x.shape == (16, 2560, 5, 64))
    assert (finest.keys, finest.columns) == (77, 4)
