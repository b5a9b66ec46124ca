import pytest
import torch

from vstar_kernels.attention.schemas import STAT_NUMBERS, STAT_TENSOR
from vstar_kernels.testing import inputs

forward = torch.ops.vstar_kernels.cpu_forward
pytestmark = pytest.mark.usefixtures("isa")


def arguments(**changes):
    q, k, v = inputs(2, 6, 3, 8)
    names = {
        "out": torch.empty_like(q),
        "map": None,
        "query": q,
        "key": k,
        "value": v,
        "bias": torch.rand(1, 11),
        "stat_values": None,
        "scale": 0.3,
        "strength": 1.0,
        "stat": STAT_NUMBERS["row_max"],
        "clamp_negative": False,
    }
    return tuple({**names, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": None},
        {"bias": torch.rand(3, 6, 6)},
        {"stat": STAT_TENSOR, "stat_values": torch.rand(2, 6, 3)},
    ],
)
def test_opcheck(changes):
    torch.library.opcheck(
        forward, arguments(**changes), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.rand(6, 3, 8)}, "query must be 4-D or 5-D"),
        ({"key": torch.rand(2, 6, 3, 9)}, "key must have query's shape"),
        ({"value": torch.rand(2, 6, 3, 8).half()}, "value must have query's type"),
        ({"out": torch.rand(2, 6, 8, 3).mT}, "out must be contiguous in head_dim"),
        ({"bias": torch.rand(1, 9)}, "must be odd in length and reach all frames"),
        ({"bias": torch.rand(2, 11)}, "1 or 3 heads, got 2"),
        ({"bias": torch.rand(3, 5, 5)}, "dense bias must be"),
        ({"bias": torch.rand(1, 11).double()}, "contiguous float32"),
        ({"stat": 4}, "stat must be 0 to 3, got 4"),
        ({"stat": STAT_TENSOR}, "goes with stat_values"),
        ({"stat": STAT_TENSOR, "stat_values": torch.rand(2, 5, 3)}, "without head_dim"),
    ],
)
def test_direct_calls_cannot_leave_their_tensors(changes, message):
    with pytest.raises(RuntimeError, match=message):
        forward(*arguments(**changes))
