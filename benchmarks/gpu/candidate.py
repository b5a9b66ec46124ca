"""Times one launch configuration, for ``benchmarks.tune``."""

from __future__ import annotations

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.codegen import cases
from benchmarks.codegen.cases import Row
from benchmarks.gpu.check import check
from benchmarks.gpu.timing import compare, random_inputs, sets_needed
from tests.helpers import largest_error, oracle
from vstar_kernels.backends.triton import launch, plan
from vstar_kernels.backends.triton.configs import TileConfig
from vstar_kernels.backends.triton.facts import Facts
from vstar_kernels.backends.triton.plan import Launch

TRAFFIC = 512 * 2**20  # bytes of one call
ROUNDS = 15
TF32_ERROR = 2e-2


def architecture() -> str:
    """Whose rows serve this GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU to measure; --predict needs none")
    return launch._device(torch.device("cuda", 0)).architecture


def seconds(row: Row) -> float:
    """The median of a Gaussian call with this configuration, checked first."""
    facts = small_facts(row)
    call = a_launch(row, facts)
    shape, dtype = facts.shape, facts.dtype
    traffic = 4 * torch.Size(shape).numel() * dtype.itemsize
    inputs = [random_inputs(shape, dtype) for _ in range(sets_needed(traffic))]
    query, key, value = inputs[0]
    out = torch.full_like(query, float("nan"))
    call({"q": query, "k": key, "v": value, "out": out})
    bias = vk.GaussianBias(1.0)
    if row.kind == "tf32":
        check_tf32(out, query, key, value, bias)
    else:
        check(out, query, key, value, bias)

    def run(query: Tensor, key: Tensor, value: Tensor) -> None:
        call({"q": query, "k": key, "v": value, "out": out})

    found = compare({"candidate": run}, inputs, ROUNDS)["candidate"]
    return float("inf") if found.median is None else found.median


def small_facts(row: Row) -> Facts:
    """A Gaussian call on this GPU that moves about TRAFFIC bytes."""
    facts = cases.facts(row, cases.GAUSSIAN, row.width)
    _, *sizes = facts.shape
    sequence_bytes = 4 * torch.Size(sizes).numel() * facts.dtype.itemsize
    batch = max(1, TRAFFIC // sequence_bytes)
    device = launch._device(torch.device("cuda", 0))
    return facts._replace(shape=(batch, *sizes), device=device)


def a_launch(row: Row, facts: Facts) -> Launch:
    """The configuration's kernel."""
    if isinstance(row.config, TileConfig):
        return plan.tile_launch(facts, row.config)
    return plan.stream_launch(facts, row.config)


def check_tf32(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: vk.GaussianBias
) -> None:
    """TF32 keeps ten bits of the operands."""
    error = largest_error(out[:2], oracle(query[:2], key[:2], value[:2], bias))
    if not error <= TF32_ERROR:
        raise SystemExit(f"wrong result for {tuple(query.shape)} in TF32: error {error}")
