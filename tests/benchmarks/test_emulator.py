"""benchmarks.emulator: what it computes, and what it refuses.

That whole kernels are right on it is tested by tests/attention/test_emulated.py.
"""

import os
import shutil
import struct
import sys

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.emulator import arithmetic, ptx
from benchmarks.emulator.block import Block
from benchmarks.emulator.driver import EmulatedGPU, Program
from benchmarks.emulator.matrices import order_of_a, order_of_b, order_of_c, places_in_shared
from benchmarks.emulator.memory import FaultError, Memory, Moment
from benchmarks.emulator.ptx import PTXError
from benchmarks.emulator.transfers import TensorMap, box_places, swizzled
from tests.helpers import run_python

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd0, [kernel_param_0];
	ld.param.b64 %rd1, [kernel_param_1];
	mov.u32 %r0, %tid.x;
	shl.b32 %r1, %r0, 2;
	mad.wide.u32 %rd2, %r0, 4, %rd0;
	mad.wide.u32 %rd3, %r0, 4, %rd1;
	mov.b32 %r2, global_smem;
	add.s32 %r3, %r2, %r1;
	.loc	1 7 3                           // here.py:7:3
"""


def aligned(numbers):
    """The same at a multiple of 128 bytes, as torch allocates."""
    behind = np.empty(len(numbers) + 32, np.uint32)
    start = -behind.ctypes.data % 128 // 4
    found = behind[start : start + len(numbers)]
    found[:] = numbers
    return found


def run(body, given=(), *, threads=64, grid=1, shared=1024, length=None, add=None):
    """Runs a body that reads ``given`` and writes as many numbers; returns these."""
    given = aligned(np.asarray(given, np.uint32) if len(given) else np.arange(threads))
    out = aligned(np.full(length or threads, 0xDEAD))
    memory = Memory()
    for name, x in (("given", given), ("out", out)):
        memory.add(name, x.ctypes.data, x.nbytes)
    program = Program(ptx.read(f"{HEAD}{body}\n\tret;\n}}"))
    parameters = struct.pack("QQ", given.ctypes.data, out.ctypes.data)
    program.run(grid, threads, shared, parameters, memory, add)
    return out


LOAD, STORE = "ld.global.b32 %r9, [%rd2];", "st.global.b32 [%rd3], %r10;"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r10, %r9, -3;", lambda x: x - 3),
        ("mul.lo.s32 %r10, %r9, %r9;", lambda x: x * x),
        ("div.s32 %r10, %r9, 4;", lambda x: np.trunc(x / 4).astype(np.int32)),
        ("rem.s32 %r10, %r9, 4;", lambda x: np.fmod(x, 4).astype(np.int32)),
        ("shr.s32 %r10, %r9, 40;", lambda x: x >> 31),
        ("shr.u32 %r10, %r9, 40;", lambda x: 0 * x),
        ("shl.b32 %r10, %r9, 33;", lambda x: 0 * x),
        ("bfe.s32 %r10, %r9, 1, 3;", lambda x: (x << 28) >> 29),
        ("ld.global.s8 %rs1, [%rd2]; cvt.s32.s16 %r10, %rs1;", lambda x: x.astype(np.int8)),
        ("ld.global.s32 %rd5, [%rd2]; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r10, %rd5;",
         lambda x: x >> 31),
        ("max.s32 %r10, %r9, 0;", lambda x: np.maximum(x, 0)),
        ("prmt.b32 %r10, %r9, 0, 0x4440U;", lambda x: x & 0xFF),
        ("shfl.sync.bfly.b32 %r10, %r9, 5, 31, -1;", lambda x: x[np.arange(64) ^ 5]),
        ("redux.sync.max.s32 %r10, %r9, -1;", lambda x: x.reshape(2, 32).max(1).repeat(32)),
        ("setp.lt.s32 %p1, %r9, 0; selp.b32 %r10, 7, %r9, %p1;", lambda x: np.where(x < 0, 7, x)),
        ("mov.b32 %r10, 1; setp.lt.s32 %p1, %r9, 0; @%p1 mov.b32 %r10, 2;", lambda x: 1 + (x < 0)),
    ],
)  # fmt: skip
def test_integers(instruction, expected):
    given = np.arange(64, dtype=np.int32) - 20
    found = run(f"{LOAD} {instruction} {STORE}", given.view(np.uint32))
    np.testing.assert_array_equal(found.view(np.int32), expected(given))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %r10, %r9, %r9, 0f3F800000;", lambda x: x * x + 1),
        ("ex2.approx.ftz.f32 %r10, %r9;", np.exp2),
        ("max.f32 %r10, %r9, 0f3F800000;", lambda x: np.fmax(x, np.float32(1))),
        ("max.NaN.f32 %r10, %r9, 0f3F800000;", lambda x: np.maximum(x, np.float32(1))),
        ("max.f32 %r10, %r9, %r9, 0f3F800000;", lambda x: np.fmax(x, np.float32(1))),
        ("cvt.rzi.f32.f32 %r10, %r9;", np.trunc),
        ("mov.b64 %rd5, {%r9, %r9}; add.f32x2 %rd6, %rd5, %rd5; mov.b64 {%r11, %r10}, %rd6;",
         lambda x: x + x),
    ],
)  # fmt: skip
def test_float32(instruction, expected):
    given = np.linspace(-3, 3, 64, dtype=np.float32)
    given[5] = np.nan
    found = run(f"{LOAD} {instruction} {STORE}", given.view(np.uint32)).view(np.float32)
    np.testing.assert_allclose(found, expected(given), rtol=1e-6)


@pytest.mark.parametrize(
    ("instruction", "exact", "largest"),
    [
        ("ex2.approx.ftz.f32 %r10, %r9;", np.exp2, 2**-22),
        ("lg2.approx.f32 %r10, %r9;", np.log2, 2**-22),
        ("sqrt.approx.ftz.f32 %r10, %r9;", np.sqrt, 2**-23),
        ("rcp.approx.ftz.f32 %r10, %r9;", np.reciprocal, 1),
        ("mov.b32 %r11, 0f40400000; div.full.f32 %r10, %r9, %r11;", lambda x: x / 3, 2),
        ("mov.b32 %r11, 0f40A00000; div.rn.f32 %r10, %r9, %r11;", lambda x: x / 5, 0.5),
    ],
)
def test_approximations_err_as_much_as_they_may(instruction, exact, largest):
    """Largest errors of 1 and more are units in the last place, less are of the result."""
    given = np.linspace(2, 5, 512, dtype=np.float32)
    found = run(f"{LOAD} {instruction} {STORE}", given.view(np.uint32), threads=512)
    truth = exact(given.astype(np.float64))
    unit = truth if largest < 0.1 else np.spacing(truth.astype(np.float32)).astype(np.float64)
    error = np.abs((found.view(np.float32) - truth) / unit).max()
    assert 0.7 * largest <= error <= largest


def test_a_logarithm_near_0_errs_by_its_absolute_error():
    given = 1 + np.linspace(1e-4, 1e-3, 512, dtype=np.float32)
    found = run(f"{LOAD} lg2.approx.f32 %r10, %r9; {STORE}", given.view(np.uint32), threads=512)
    error = np.abs(found.view(np.float32) - np.log2(given.astype(np.float64))).max()
    assert 0.7 * 2**-22 <= error <= 2**-22


@pytest.mark.parametrize(
    ("instruction", "given", "expected"),
    [
        ("ex2.approx.ftz.f32 %r10, %r9;", [0, 1, -3, 127, -126, -np.inf, np.inf, np.nan, 200, -140],
         [1, 2, 0.125, 2.0**127, 2.0**-126, 0, np.inf, np.nan, np.inf, 0]),
        ("lg2.approx.ftz.f32 %r10, %r9;", [1, 4, 0, np.inf, -1, np.nan],
         [0, 2, -np.inf, np.inf, np.nan, np.nan]),
        ("rcp.approx.ftz.f32 %r10, %r9;", [4, 0, np.inf, -np.inf], [0.25, np.inf, 0, -0.0]),
    ],
)  # fmt: skip
def test_approximations_that_are_exact(instruction, given, expected):
    given, expected = (np.array(x, np.float32) for x in (given, expected))
    every_lane = np.resize(given, 32)
    found = run(f"{LOAD} {instruction} {STORE}", every_lane.view(np.uint32), threads=32)
    np.testing.assert_array_equal(found.view(np.float32), np.resize(expected, 32))


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    import torch

    x = torch.randn(10000)
    x[:4] = torch.tensor([float("inf"), -float("inf"), 3e38, 1e-40])
    bits = arithmetic.bfloat16(x.numpy())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), x.bfloat16().view(torch.int16))


def test_threads_that_part_meet_again():
    body = f"""{LOAD}
	mov.b32 %r10, 0;
	setp.lt.s32 %p1, %r0, 40;
	@%p1 bra $other;
$loop:
	add.s32 %r10, %r10, 1;
	setp.lt.s32 %p2, %r10, %r9;
	@%p2 bra $loop;
	bra.uni $end;
$other:
	mov.b32 %r10, 5;
$end:
	add.s32 %r10, %r10, 100;
	{STORE}"""
    thread = np.arange(64)
    np.testing.assert_array_equal(run(body), 100 + np.where(thread < 40, 5, thread))


# ---- what a GPU would fail at, or compute wrongly by chance ----

OTHER_WARP = f"""{LOAD}
	xor.b32 %r4, %r1, 128;
	add.s32 %r4, %r4, %r2;
	st.shared.b32 [%r3], %r9;
	{{barrier}}
	ld.shared.b32 %r10, [%r4];
	{STORE}"""


def test_warps_meet_at_a_barrier():
    found = run(OTHER_WARP.format(barrier="bar.sync 0;"))
    np.testing.assert_array_equal(found, np.arange(64) ^ 32)
    with pytest.raises(FaultError, match=r"reads what another warp writes .* here.py:7:3, ld.shar"):
        run(OTHER_WARP.format(barrier=""))


def test_a_part_of_the_threads_may_come_to_a_barrier_later():
    body = f"""setp.lt.s32 %p1, %r0, 32;
	mov.b32 %r9, 1;
	@%p1 bra $far;
$back:
	{OTHER_WARP.replace(LOAD, "").format(barrier="bar.sync 0;")}
	ret;
$far:
	mov.b32 %r9, 2;
	bra.uni $back;"""
    np.testing.assert_array_equal(run(body), np.where(np.arange(64) < 32, 1, 2))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 %r10, [%r3]; st.shared.b32 [%r2+128], %r0;",
         "writes what another warp reads without a barrier"),
        ("st.global.b32 [%rd1], %r0;", "store different numbers"),
        ("setp.lt.s32 %p1, %r0, 32; @%p1 bar.sync 0;", "a part of the threads waits"),
        ("ld.global.b32 %r9, [%rd2+4];", "loads at 0x.*where no tensor is"),
        ("ld.global.v4.b32 {%r9,%r10,%r11,%r12}, [%rd2];", "no multiple"),
        ("ld.shared.b32 %r9, [%r3+1024];", "of shared memory at byte 1024, which has 1024"),
        ("mov.b64 %rd4, 64; ld.global.b32 %r9, [%rd4];", "where no tensor is"),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 4;", "there is no mbarrier"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;"
         "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;"
         "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;",
         "waits forever: 0 arrivals are missing, and 64 of 64 bytes"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(FaultError, match=message):
        run(body)


def test_a_barrier_of_a_warp_is_none_of_all():
    body = """setp.lt.s32 %p1, %r0, 32;
	@%p1 bra $first;
	st.shared.b32 [%r2], 7;
	bar.warp.sync -1;
	ret;
$first:
	bar.warp.sync -1;
	ld.shared.b32 %r10, [%r2];"""
    with pytest.raises(FaultError, match="another warp"):
        run(body)


def test_what_nobody_has_written_is_nan():
    body = f"setp.lt.s32 %p1, %r0, 32; @%p1 mov.b32 %r10, 7; {STORE}"
    np.testing.assert_array_equal(run(body), np.where(np.arange(64) < 32, 7, 0xFFFFFFFF))


def test_programs_of_a_launch_share_nothing():
    apart = "mov.u32 %r4, %ctaid.x; mad.wide.u32 %rd4, %r4, 256, %rd3; st.global.b32 [%rd4], %r0;"
    np.testing.assert_array_equal(run(apart, grid=2, length=128), np.arange(128) % 64)
    with pytest.raises(FaultError, match="writes what another program writes"):
        run(apart.replace("256", "128"), grid=2, length=128)
    reads = "setp.eq.s32 %p1, %r4, 1; @%p1 ld.global.b32 %r5, [%rd3];"
    with pytest.raises(FaultError, match="reads what another program writes"):
        run(f"{apart} {reads}", grid=2, length=128)


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_arrives_when_it_is_waited_for(waits):
    wait = "cp.async.wait_group 0;" if waits else ""
    body = f"""cp.async.ca.shared.global [%r3], [%rd2], 0x4, %r5;
	cp.async.commit_group; {wait} ld.shared.b32 %r10, [%r3]; {STORE}"""
    found = run(f"mov.b32 %r5, 4; {body}")
    np.testing.assert_array_equal(found, np.arange(64) if waits else 0xFFFFFFFF)
    if waits:  # none of the source is read
        np.testing.assert_array_equal(run(f"mov.b32 %r5, 0; {body}"), 0)


@pytest.mark.parametrize(
    "instruction",
    ["shfl.sync.idx.b32 %r10, %r9, 0, 31, -1;", "redux.sync.add.s32 %r10, %r9, -1;",
     "elect.sync %r10|%p2, -1;"],
)  # fmt: skip
@pytest.mark.parametrize("threads", [32, 40])
def test_a_warp_exchanges_numbers_whole(instruction, threads):
    body = f"{LOAD} setp.lt.s32 %p1, %r0, {threads}; @%p1 {instruction} {STORE}"
    if threads == 32:
        run(body)
        return
    with pytest.raises(FaultError, match="a part of a warp does what all of it must"):
        run(body)


@pytest.mark.parametrize(
    "instruction",
    ["atom.global.add.f32 %r9, [%rd2], %r9;", "bar.sync 1, 32;", "mul.hi.u32 %r9, %r9, %r9;",
     "add.sat.f32 %r9, %r9, %r9;", "mad.hi.u32 %r9, %r9, %r9, %r9;",
     "cvt.rz.bf16x2.f32 %r9, %r9, %r9;", "fma.rn.bf16x2 %r9, %r9, %r9, %r9;",
     "bfe.s32 %r9, %r9, 8, 0;", "bfe.u32 %r9, %r9, 24, 16;", "redux.sync.and.b32 %r9, %r9, -1;",
     "mbarrier.test_wait.shared.b64 %p1, [%r2], 0;", "shfl.sync.up.b32 %r9, %r9, 1, 0, -1;",
     "shfl.sync.idx.b32 %r9, %r9, 1, 31, 15;", "elect.sync %r9|%p1, 15;",
     "cvt.rn.f16.f64 %rs1, %rd5;", "cvt.rmi.f64.f64 %rd5, %rd5;", "cvt.rn.bf16.s32 %rs1, %r9;",
     "cvt.f64.f16 %rd5, %rs1;", "rcp.approx.ftz.f64 %rd5, %rd5;",
     "max.s16x2 %r9, %r9, %r9;", "setp.lt.bf16 %p1, %rs1, %rs2;",
     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r4,%r5,%r6,%r7}, %rd4, %rd5, 0, 1, 1;",
     "mov.u32 %r9, %clock;"],
)  # fmt: skip
def test_what_is_not_emulated_is_named(instruction):
    with pytest.raises(PTXError, match=r"(is|are) not emulated"):
        run(instruction)


def test_text_that_is_no_kernel():
    with pytest.raises(PTXError, match=r"no \.entry"):
        ptx.read("hello")


# ---- matrices ----


def test_every_number_has_one_place():
    for depth in (8, 16):
        assert sorted(order_of_a(depth).ravel()) == list(range(16 * depth))
        assert sorted(order_of_b(depth).ravel()) == list(range(8 * depth))
    assert sorted(order_of_c(64).ravel()) == list(range(16 * 64))
    # PTX ISA, mma.m16n8k16: lane 5 is row 1, and has the columns 2 and 3 in its first register.
    assert order_of_a(16)[1, 2:4].tolist() == [10, 11]


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_descriptor_finds_what_a_tensor_map_has_put_there(swizzle, transposed):
    """Boxes are copied as wide as a swizzle's row; a matrix is 64 rows and 16 deep."""
    width = (swizzle or 16) // 2
    rows, columns = (16, 64) if transposed else (64, 64)  # as it lies, the columns contiguous
    lying = np.arange(rows * columns).reshape(rows, columns)
    shared = np.full(1 << 14, -1)
    for n, start in enumerate(range(0, columns, width)):
        box = lying[:, start : start + width]
        at = 1024 + n * rows * width * 2 + np.arange(box.size) * 2
        shared[swizzled(at, swizzle)] = box.ravel()
    # From one box to the next, and from eight rows to the next.
    box_bytes, eight = rows * width * 2, 8 * width * 2
    leading, stride = (eight, box_bytes) if transposed and not swizzle else (box_bytes, eight)
    kind = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    told = 1024 >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | kind << 62
    found = shared[places_in_shared(told, 64, 16, 2, transposed=transposed)]
    np.testing.assert_array_equal(found, lying.T if transposed else lying[:, :16])


def test_a_box_is_zero_beyond_its_tensor():
    tensor = TensorMap(4096, (10, 3), (64,), (8, 4), 2, 0)
    source, there, order = box_places(tensor, [8, 1])
    assert there.reshape(4, 8).sum(1).tolist() == [2, 2, 0, 0]
    assert source[0] == 4096 + 64 + 16
    assert order[-1] == 62


# ---- kernels that lack something ----

BROKEN = """
import re, sys, tempfile
from pathlib import Path
import torch
import vstar_kernels as vk
from benchmarks.emulator import driver
from benchmarks.emulator.memory import FaultError

read = driver.ptx.read
lacks = re.compile(r"^.*\\b(?:" + sys.argv[1] + r")\\b.*$", re.MULTILINE)
driver.ptx.read = lambda text: read(lacks.sub("", text))
frames, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
gpu = driver.EmulatedGPU("{architecture}", processors=1)
torch.manual_seed(0)
query, key, value = torch.randn(3, 2, frames, 2, 64).to(dtype)
bias = vk.GaussianBias(1.5)
with tempfile.TemporaryDirectory() as folder, gpu.installed(Path(folder)):
    try:
        found = vk.tar_attention(query, key, value, bias, backend="triton")
    except FaultError as error:
        print("fault:", error)
    else:
        expected = vk.tar_attention(*(x.double() for x in (query, key, value)), bias)
        print("close" if torch.allclose(found.double(), expected, atol=2e-2) else "wrong")
"""


@pytest.mark.parametrize(
    ("architecture", "frames", "lacks", "found"),
    [
        ("sm_90", 64, "none of it", "close"),
        ("sm_80", 150, "bar.sync", "fault: reads what another warp"),
        ("sm_80", 64, "cp.async.wait_group", "wrong"),
        ("sm_90", 150, "bar.sync", "fault: "),
        ("sm_90", 150, "mbarrier.try_wait", "fault: an mbarrier ends before its copies"),
        ("sm_90", 150, "mbarrier.(?:try_wait|inval)", "fault: program 0 ends before its copies"),
        ("sm_90", 150, "wgmma.wait_group", "fault: reads %"),
        ("sm_100", 150, "tcgen05.commit", "fault: waits forever"),
    ],
)
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
)
def test_a_kernel_that_lacks_something_is_found_out(architecture, frames, lacks, found):
    code = BROKEN.replace("{architecture}", architecture)
    arguments = f"import sys; sys.argv[1:] = [{lacks!r}, '{frames}', 'bfloat16']\n"
    ran = run_python(arguments + code)
    assert ran.stdout.startswith(found), (ran.stdout, ran.stderr)


def test_threads_wait_for_the_rest_of_their_warp():
    """Those that come first do, wherever in the code the others are."""
    body = f"""{LOAD}
	bra.uni $start;
$meet:
	shfl.sync.bfly.b32 %r10, %r9, 1, 31, -1;
	bar.sync 0;
	{STORE}
	bra.uni $end;
$start:
	setp.lt.s32 %p1, %r0, 40;
	@%p1 bra $meet;
	add.s32 %r9, %r9, 100;
	bra.uni $meet;
$end:
	mov.b32 %r9, 0;"""
    thread = np.arange(64)
    given = np.where(thread < 40, thread, 100 + thread)
    np.testing.assert_array_equal(run(body), given[thread ^ 1])


def test_a_barrier_is_of_whole_warps():
    body = "setp.lt.s32 %p1, %r0, 16; @%p1 bra $end; bar.sync 0; $end: mov.b32 %r9, 0;"
    with pytest.raises(FaultError, match="a part of a warp does what all of it must"):
        run(body.replace("; ", ";\n\t").replace("$end:", "\n$end:\n"))


@pytest.mark.parametrize("before", [0, 2, 14])
def test_a_tensor_lies_wherever_it_lies(before):
    """What is before its first number is not its own, whatever that is a multiple of."""
    numbers = np.arange(64, dtype=np.uint16)
    start = -numbers.ctypes.data % 16 + before
    place = numbers.ctypes.data + start
    memory = Memory()
    memory.add("numbers", place, 32)
    warps, now = np.zeros(1, np.int64), Moment(1, 1)
    aligned = place + -place % 4
    (found,) = memory.load(np.array([aligned]), 4, 1, warps, now)
    first = (aligned - numbers.ctypes.data) // 2
    assert found.view(np.uint16).tolist() == [first, first + 1]
    for beyond in (place - 2, place + 32):
        with pytest.raises(FaultError, match=r"where no tensor is|at byte -2"):
            memory.load(np.array([beyond]), 2, 1, warps, now)


@pytest.mark.parametrize("does", ["reads", "writes"])
def test_a_register_that_a_product_is_under_way_to(does):
    block = Block(0, 1, 32, 1024, Memory(), 1)
    register = ptx.Register("%r1", np.dtype("u4"))
    block.pending["%r1"] = "a wait"
    access = {
        "reads": lambda: block.read(register, "b32"),
        "writes": lambda: block.write(register, np.zeros(1, np.uint32), None),
    }[does]
    with pytest.raises(FaultError, match=f"{does} %r1 without a wait"):
        access()


LAUNCHES = """
import contextlib, os, tempfile
from pathlib import Path
import torch, triton
import triton.language as tl
from benchmarks.emulator.driver import EmulatedGPU

@triton.jit
def add(x, y, n, ATOMIC: tl.constexpr):
    i = tl.arange(0, 16)
    if ATOMIC:
        tl.atomic_add(y + i, tl.load(x + i))
    else:
        tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)

def told(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)

x, wide = torch.arange(16.0), torch.zeros(20)
with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as entered:
    enter = lambda: entered.enter_context(EmulatedGPU().installed(Path(folder)))
    os.environ["TRITON_INTERPRET"] = "1"
    told(enter)
    del os.environ["TRITON_INTERPRET"]
    enter()
    told(lambda: add[(1,)](x, wide[:10], 11, False))
    told(lambda: add[(1,)](x, wide[:10], 10, False))
    print(wide.tolist() == [*map(float, range(10)), *[0.0] * 10])
    for _ in range(2):
        told(lambda: add[(1,)](x, wide, 10, True))
    told(lambda: add[(2, 2)](x, wide, 10, False))
    told(enter)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="there is no C compiler"
)
def test_what_a_launch_is_refused_for(tmp_path):
    script = tmp_path / "launches.py"  # Triton reads the source of kernels from files
    script.write_text(LAUNCHES)
    ran = run_python(f"import runpy; runpy.run_path({str(script)!r})")
    lines = ran.stdout.splitlines()
    expected = [
        "RuntimeError kernels are emulated or interpreted",
        "FaultError stores at 0x",
        "True",
        "PTXError @%p1 atom.global",
        "PTXError @%p1 atom.global",
        "RuntimeError Triton Error [CUDA]: invalid value; the stub takes grids of one dimension",
        "RuntimeError this process has had an emulated GPU",
    ]
    assert len(lines) == len(expected), (ran.stdout, ran.stderr)
    for line, begins in zip(lines, expected, strict=True):
        assert line.startswith(begins), line


def test_an_architecture_that_is_not_emulated():
    with pytest.raises(ValueError, match="one of sm_80, sm_90, sm_100, got 'gfx942'"):
        EmulatedGPU("gfx942")
