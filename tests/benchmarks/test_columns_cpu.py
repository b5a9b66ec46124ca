"""The command that measures column_attention on the CPU, and that its peers compute the same."""

import json

import pytest
import torch

from benchmarks import columns_cpu
from benchmarks.column_adapters import PEERS, columns_of_words
from vstar_kernels.attention import native
from vstar_kernels.testing import eager_columns

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_peer_is_right(name, dtype):
    query, key, value = (torch.randn(2, n, 3, 12).to(dtype) for n in (20, 16, 16))
    columns = columns_of_words(16)
    expected = eager_columns(query.double(), key.double(), value.double(), columns.double())
    bounds = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.04}
    for found, exact in zip(PEERS[name](query, key, value, columns), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, **bounds)


def test_columns_are_means_of_tokens():
    columns = columns_of_words(8, ((2,), (4, 7)))
    assert columns.T.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0, 0, 0.5]]


@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
def test_the_command_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "columns.json"
    sizes = ["--levels", "9", "2", "--frames", "1", "--keys", "16", "--rounds", "1"]
    columns_cpu.main([*sizes, "--json", str(path)])
    float32, bfloat16 = json.loads(path.read_text())["results"]
    assert (float32["dtype"], bfloat16["dtype"]) == ("float32", "bfloat16")
    assert set(float32["speedup"]) == set(PEERS)
    assert float32["over_without_maps"] > 0
    assert "9 × 2" in capsys.readouterr().out
