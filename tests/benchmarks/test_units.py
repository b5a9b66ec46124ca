"""What kernels ask of a GPU's units, counted on an emulated one, and candidates in its order."""

import dataclasses
import functools
import math
import os
import shutil
import sys
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks import units
from benchmarks.codegen import cases, column_cases
from benchmarks.emulator import ptx
from benchmarks.emulator.block import Block
from benchmarks.emulator.counts import Counts, count_product
from benchmarks.emulator.memory import Memory
from benchmarks.units import Cycles
from tests.benchmarks.test_emulator import HEAD, LOAD, run
from vstar_kernels.attention.triton.configs import StreamConfig

ZEROS = "mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;"
PRODUCT = "{%r4,%r5,%r6,%r7}, {%r4,%r5,%r6,%r7}, {%r4,%r5}, {%r4,%r5,%r6,%r7}"
FIRST_WARP = "setp.lt.s32 %p1, %r0, 32;"


def asked_for(body):
    """What 64 threads ask for in a body, but for instructions, and what reads parameters."""
    counts = []
    run(body, shared=16384, add=counts.append)
    return dataclasses.replace(sum(counts, Counts()), instructions=0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (LOAD, Counts(sectors=8)),
        ("and.b32 %r4, %r0, 3; mad.wide.u32 %rd4, %r4, 64, %rd0; ld.global.b32 %r9, [%rd4];",
         Counts(sectors=8)),
        (f"{FIRST_WARP} @%p1 {LOAD}", Counts(sectors=4)),
        ("ld.global.b32 %r9, [%rd0];", Counts(sectors=2)),
        ("st.shared.b32 [%r3], %r0;", Counts(shared=2)),
        ("ld.shared.b32 %r9, [%r2];", Counts(shared=2)),
        ("shl.b32 %r4, %r1, 1; add.s32 %r4, %r4, %r2; ld.shared.b32 %r9, [%r4];",
         Counts(shared=4, conflicts=2)),
        ("shl.b32 %r4, %r1, 5; add.s32 %r4, %r4, %r2; ld.shared.b32 %r9, [%r4];",
         Counts(shared=64, conflicts=62)),
        ("shl.b32 %r4, %r1, 2; add.s32 %r4, %r4, %r2; ld.shared.v4.b32 {%r5,%r6,%r7,%r8}, [%r4];",
         Counts(shared=8)),
        ("shl.b32 %r4, %r1, 2; add.s32 %r4, %r4, %r2;"
         "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5,%r6,%r7,%r8}, [%r4];", Counts(shared=8)),
        ("shl.b32 %r4, %r1, 5; add.s32 %r4, %r4, %r2;"
         "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];", Counts(shared=16, conflicts=14)),
        ("mov.b32 %r5, 4; cp.async.ca.shared.global [%r3], [%rd2], 0x4, %r5;",
         Counts(sectors=8, shared=2)),
        ("mov.b32 %r5, 0; cp.async.ca.shared.global [%r3], [%rd2], 0x4, %r5;", Counts(shared=2)),
        (f"{FIRST_WARP} @%p1 ex2.approx.f32 %r9, %r0;", Counts(exponentials=32)),
        (f"{ZEROS} mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {PRODUCT};",
         Counts(operations=2 * 2 * 16 * 8 * 16)),
    ],
)  # fmt: skip
def test_counts(body, expected):
    assert asked_for(body) == expected


@pytest.mark.parametrize(
    ("a", "shared"), [("%rd1", 2 * 16 * (64 + 64)), ("{%r4,%r5,%r6,%r7}", 2 * 16 * 64)]
)
def test_products_of_four_warps_read_shared_memory(a, shared):
    """Two products of 64 × 64 × 16, of 256 threads."""
    sums = ",".join(f"%r{n}" for n in range(10, 42))
    name = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
    body = f"{HEAD}{name} {{{sums}}}, {a}, %rd2, %p1, 1, 1, 0;\n\tret;\n}}"
    product = next(x for x in ptx.read(body).instructions if x.name == "wgmma")
    block = Block(0, 1, 256, 1024, Memory(), 1)
    found = count_product(product)(block, None)
    assert found == Counts(operations=2 * 2 * 64 * 64 * 16, shared=2 * shared // 128)


def test_a_warp_without_threads_runs_nothing():
    counts = []
    run(f"{FIRST_WARP} @%p1 add.s32 %r9, %r0, 1;", add=counts.append)
    before = []
    run(FIRST_WARP, add=before.append)
    assert (sum(counts, Counts()).instructions - sum(before, Counts()).instructions) == 1


def test_cycles_of_a_processor():
    """An H200 has 132 processors, and a bandwidth of 18.4 bytes in each of their cycles."""
    entry = cases.Key("sm_90", "16-bit", 16, 64)
    found = units.cycles(entry, Counts(8, 32, 7568, 3, 5, 2), 184)
    assert found == Cycles(
        issue=2, exp=2, matrix=pytest.approx(2, rel=1e-3), shared=5, cache=3,
        memory=pytest.approx(10, rel=0.01),
    )  # fmt: skip
    assert found.longest == found.memory


@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
)
def test_candidates_come_by_the_work_of_their_busiest_unit():
    """Eight warps of 64 rows compute everything twice; what does not compile comes last."""

    def of_sizes(rows, warps):
        config = column_cases.ColumnsConfig(rows, 0, warps, 1, shared=0)
        return column_cases.entry("sm_90", "16-bit", 128, "forward_80", config)

    twice, once, none = of_sizes(64, 8), of_sizes(64, 4), of_sizes(48, 4)
    assert units.in_order([none, twice, once]) == [once, twice, none]
    assert units.ordered([once, twice], [1.04, 1.0]) == [once, twice]  # they are alike
    amd = [dataclasses.replace(x, architecture="gfx942") for x in (twice, once)]
    assert units.in_order(amd) == amd


@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
)
def test_each_sweep_of_a_stream_s_gradients_costs_less_with_more_rows_of_its_own():
    """The more queries a program has, or keys, the fewer programs read the others."""

    def of_sizes(queries, keys):
        config = StreamConfig(queries, keys, warps=4, stages=2, shared=0)
        return cases.Entry("sm_90", "16-bit", None, 64, True, config=config)

    cost = functools.partial(
        units._costs_of, names=["grad_query", "grad_key"], variant=cases.GRADIENTS, frames=128
    )
    with units.emulated("sm_90") as process:
        of_queries, of_keys = process.map(cost, (of_sizes(64, 32), of_sizes(32, 64)))
    assert of_queries["grad_query"] < of_keys["grad_query"]
    assert of_keys["grad_key"] < of_queries["grad_key"]


def test_each_sweep_has_an_order_of_its_own(monkeypatch):
    """Those that are alike stay in theirs, and what does not run is last."""
    costs = {
        (16, 64): {"grad_query": 30.0, "grad_key": 10.0},
        (64, 16): {"grad_query": 10.0, "grad_key": 10.4},
        (64, 64): {"grad_query": 20.0},
    }
    process = SimpleNamespace(
        map=lambda function, entries: [costs[x.config.queries, x.config.keys] for x in entries]
    )
    monkeypatch.setattr(units, "emulated", lambda *args: nullcontext(process))
    entries = [
        cases.Entry("sm_90", "16-bit", None, 64, True, config=StreamConfig(*x, 4, 1, shared=0))
        for x in costs
    ]
    keys, queries, both = entries
    found = units.orders_of_sweeps(entries, ["grad_query", "grad_key"])
    assert found == {"grad_query": [queries, both, keys], "grad_key": [keys, queries, both]}
    tf32 = [dataclasses.replace(x, kind="tf32") for x in entries]
    assert units.orders_of_sweeps(tf32, ["maps"]) == {"maps": tf32}


def test_a_kernel_that_does_not_run_leaves_the_others_of_its_call_what_they_cost(monkeypatch):
    """Statistics cost what they do without what the forward pass saved, or nothing is known."""
    ran = []

    def run(entry, variant, call):
        names = {name: entry.config.of_kernel(name) for name in sizes}
        ran.append((variant.name, names))
        if variant.map and names["grad_query_full"].queries == 64:
            raise RuntimeError("out of resource")
        counts = Counts(instructions=4)
        return [({"maps_kernel": counts}, None), (defaultdict(lambda: counts), None)]

    config = StreamConfig(64, 32, warps=4, stages=2, shared=0)
    entry = cases.Entry("sm_90", "16-bit", None, 64, True, config=config)
    sizes = {case.kernel for case in cases.cases(entry, cases.VALUES)}
    monkeypatch.setattr(units, "run", run)
    found = units._costs(entry)
    assert set(found) == sizes - {"grad_query_full"} | {"grad_query", "grad_key"}
    assert set(found.values()) == {1.0}
    monkeypatch.setattr(units, "SMALL", config)  # so that the call with all options never runs
    found = units._costs(entry)
    assert found["statistics"] == found["map_max"] == math.inf
    assert found["grad_query"] == 1.0
