"""Launching a kernel on a GPU waits for nothing, so that it can be captured in a CUDA graph.

No GPU is needed: see :mod:`tests.attention.stub_gpu`. On one, ``test_triton_gpu.py`` captures
graphs.
"""

import itertools
import os
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.call import Options, Wanted, check_call
from vstar_kernels.attention.columns.call import ColumnWanted
from vstar_kernels.attention.columns.call import check_call as check_columns
from vstar_kernels.attention.frames.call import FrameWanted
from vstar_kernels.attention.frames.call import check_call as check_frames

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.attention.stub_gpu import OnGpu, StubGpu, WaitedError
from vstar_kernels.attention.triton import devices, launches, plan, tile

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
    ),
    pytest.mark.usefixtures("one_thread"),
]
GAUSSIAN = vk.GaussianBias(1.0)
LAYOUT = vk.Layout(vk.Frames(4, 8), vk.Text(5))


@pytest.fixture
def gpu():
    with StubGpu().installed() as stub:
        yield stub


def on_gpu(*shape):
    return OnGpu(torch.randn(shape))


def tar(frames=16, bias=GAUSSIAN, **options):
    def make():
        given = bias(frames) if callable(bias) else bias
        return check_call(*(on_gpu(2, frames, 3, 40) for _ in range(3)), given, **options)

    return dispatch.TAR_ATTENTION, make, Wanted(callable(bias), False)


def frames(rule, lengths=False, **options):
    def make():
        tensors = [on_gpu(2, LAYOUT.tokens, 3, 40) for _ in range(3)]
        exist = OnGpu(torch.tensor([30, 37], dtype=torch.int32)) if lengths else None
        return check_frames(*tensors, LAYOUT, rule, key_lengths=exist, **options)

    return dispatch.FRAME_ATTENTION, make, FrameWanted(False, False, False)


def columns(keys=77, value=True):
    def make():
        query, key = on_gpu(2, 96, 3, 40), on_gpu(2, keys, 3, 40)
        given = on_gpu(2, keys, 3, 40) if value else None
        return check_columns(query, key, given, OnGpu(torch.rand(2, keys, 4)))

    return dispatch.COLUMN_ATTENTION, make, ColumnWanted(True, True, value, False)


CALLS = {
    "tar, a tile": tar(),
    "tar, a stream": tar(frames=300),
    "tar, the map": tar(return_map=True),
    "tar, sums of a long map": tar(frames=300, return_map=True, map_block=50),
    "tar, a trained table": tar(bias=lambda n: vk.ToeplitzBias(OnGpu(torch.rand(n)))),
    "tar, a matrix, map_max": tar(
        frames=300, bias=lambda n: vk.DenseBias(OnGpu(torch.rand(3, n, n)), stat="map_max")
    ),
    "frames, TAR": frames(vk.FrameRule.tar(1.0)),
    "frames, TAR by row_max, the map": frames(
        vk.FrameRule.tar(1.0, stat="row_max"), return_map=True, map_heads=True
    ),
    "frames, a window, lengths": frames(vk.FrameRule.window(1), lengths=True),
    "columns, few keys": columns(),
    "columns, many keys": columns(keys=300),
    "columns, the maps alone": columns(value=False),
}


def with_gradients(name, gpu):
    """Returns what runs a call and its gradients, and returns the kernels that it launched."""
    operation, make, wanted = CALLS[name]
    call = make()

    def run():
        gpu.launched.clear()
        out, mean_map, saved = operation.run(operation.choose(call, "triton"), call, save=True)
        there = None if operation is dispatch.COLUMN_ATTENTION else out
        grad_out = torch.ones_like(out) if out.numel() else None
        grad_map = None if mean_map is None else torch.ones_like(mean_map)
        operation.run_backward("triton", call, there, saved, grad_out, grad_map, wanted)
        return list(gpu.launched)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_a_call_and_its_gradients_wait_for_nothing(name, gpu):
    run = with_gradients(name, gpu)
    first = run()  # makes its plans, and puts their tables on the GPU
    gpu.copies = False
    assert run() == first
    assert len(first) >= 2


@pytest.mark.parametrize("name", CALLS)
def test_a_prepared_call_launches_the_same(name, gpu):
    operation, make, _ = CALLS[name]
    operation.run("triton", make())
    first = list(gpu.launched)
    run = operation.backends["triton"].prepare(make())
    gpu.launched.clear()
    run(make())
    assert gpu.launched == first


@pytest.mark.parametrize(("offset", "described"), [(0, 4), (1, 0)])
def test_a_call_with_descriptors_waits_for_nothing(offset, described):
    """Of keys and values, two parts each; by pointers where they are not aligned to 16 bytes."""
    held = (torch.randn(offset + 72000).bfloat16()[offset:] for _ in range(3))
    tensors = [OnGpu(x.view(2, 300, 3, 40)) for x in held]
    with StubGpu((9, 0)).installed() as gpu:
        vk.tar_attention(*tensors, GAUSSIAN)
        gpu.copies = False
        vk.tar_attention(*tensors, GAUSSIAN)
        assert gpu.launched == ["stream_kernel"] * 2
        assert gpu.described == described


def test_the_public_functions_wait_for_nothing(gpu):
    query, key, value = (on_gpu(2, LAYOUT.tokens, 3, 40) for _ in range(3))
    weights = OnGpu(torch.rand(2, LAYOUT.tokens, 4))

    def run():
        gpu.launched.clear()
        vk.tar_attention(query, key, value, vk.GaussianBias(1.0))
        vk.frame_attention(query, key, value, LAYOUT, vk.FrameRule.tar(1.0))
        vk.column_attention(query, key, value, weights)
        return list(gpu.launched)

    first = run()
    gpu.copies = False
    assert run() == first
    assert len(first) >= 3


def test_a_table_on_the_cpu_stays_on_the_gpu_between_calls(gpu):
    """It is found by what it holds, of whatever tensor, so that a graph can be captured with it."""
    query, key, value = (on_gpu(2, 16, 3, 40) for _ in range(3))
    table = torch.rand(3, 16)

    def gradients(table):
        call = check_call(query, key, value, vk.ToeplitzBias(table))
        out, *_ = dispatch.TAR_ATTENTION.run("triton", call)
        dispatch.TAR_ATTENTION.run_backward(
            "triton", call, out, (), out, None, Wanted(False, False)
        )
        return out

    gradients(table)
    gpu.copies = False
    gradients(table)
    gradients(table.T.contiguous().T)
    gpu.launched.clear()
    with pytest.raises(WaitedError, match="copies between"):
        gradients(table + 1)
    assert gpu.launched == []


def test_numbers_that_change_in_place_are_copied_again(gpu):
    query, key, value = (on_gpu(2, 16, 3, 40) for _ in range(3))
    table = torch.zeros(16)
    for number in range(3):
        table.numpy()[:] = number  # which torch does not see
        found = devices.on_device(table, query.device)
        assert torch.equal(found.held, table)
    vk.tar_attention(query, key, value, vk.ToeplitzBias(table))


def test_a_large_table_is_copied_at_every_call(gpu, monkeypatch):
    """docs/operation.md says to put it on the GPU."""
    query, key, value = (on_gpu(2, 16, 3, 40) for _ in range(3))
    monkeypatch.setattr(devices, "KEPT_BYTES", 4 * 16 * 16)
    kept, copied = torch.rand(16, 16), torch.rand(3, 16, 16)
    for delta in (kept, copied):
        vk.tar_attention(query, key, value, vk.DenseBias(delta))
    gpu.copies = False
    vk.tar_attention(query, key, value, vk.DenseBias(kept))
    with pytest.raises(WaitedError, match="copies between"):
        vk.tar_attention(query, key, value, vk.DenseBias(copied))


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_noticed(name, gpu):
    tensor = on_gpu(3)
    gpu.copies = False
    with pytest.raises(WaitedError):
        WAITING[name](tensor)


# ---- compiled kernels that are kept ----


def a_launch(offset=0):
    """Launches a tile's kernel, on queries that begin so many elements past 16 bytes."""
    query = OnGpu(torch.randn(offset + 3840).bfloat16()[offset:].view(2, 16, 3, 40))
    key = value = OnGpu(torch.randn(2, 16, 3, 40).bfloat16())
    vk.tar_attention(query, key, value, GAUSSIAN)


def test_a_compiled_kernel_is_found_again_by_alignment(gpu):
    for offset in (0, 0, 1, 0, 2, 8):
        a_launch(offset)
    assert gpu.kernels == [0, 0, 1, 0, 1, 0]
    assert gpu.searched == 2


def test_a_compiled_kernel_is_found_again_on_its_device(gpu):
    for gpu.index in (0, 1, 0, 1):
        a_launch()
    assert gpu.kernels == [0, 1, 0, 1]
    assert gpu.searched == 2


@pytest.mark.parametrize(
    ("of_queries", "kernels"),
    # Of 16 bits beside float32 Triton would multiply in TF32 on sm_100: there are none.
    [(torch.bfloat16, [0, 1, 0]), (torch.float32, [0, 0, 0])],
)
def test_a_table_of_another_type_is_another_kernels(gpu, of_queries, kernels):
    query, key, value = (OnGpu(torch.zeros(2, 16, 3, 40, dtype=of_queries)) for _ in range(3))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        vk.tar_attention(query, key, value, vk.ToeplitzBias(OnGpu(torch.rand(16).to(dtype))))
    assert gpu.kernels == kernels


def test_a_kernel_for_debugging_is_another(gpu):
    a_launch()
    with mock.patch.object(triton.knobs.runtime, "debug", True):
        a_launch()
        assert gpu.searched == 2
    a_launch()
    assert gpu.kernels[0] == gpu.kernels[2] == 0
    assert gpu.searched == 2


def test_while_kernels_are_instrumented_triton_is_asked_at_every_launch(gpu):
    """As where a profiler begins with kernels that have been launched before."""
    a_launch()
    with mock.patch.object(triton.knobs.compilation, "instrumentation_mode", "default"):
        a_launch()
        a_launch()
    assert gpu.searched == 3
    a_launch()
    assert gpu.kernels == [0, 1, 1, 0]
    assert gpu.searched == 3


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_multiplies_and_adds_at_once(name, gpu, monkeypatch):
    """Whatever Triton's default is, which it warns of from 3.9 on."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with_gradients(name, gpu)()
    assert len(gpu.options) == len(gpu.compiled) >= 2
    assert all(options.enable_fp_fusion for options in gpu.options)


def test_hooks_see_every_launch(gpu):
    from vstar_kernels.attention.triton.tile import tile_kernel

    a_launch()
    seen = []
    chain = triton.knobs.runtime.launch_enter_hook

    def enter(metadata):
        seen.append(metadata.get()["name"])

    def before(*args, **kwargs):
        seen.append("before")

    chain.add(enter)
    try:
        a_launch()
        tile_kernel.add_pre_run_hook(before)
        a_launch()
    finally:
        chain.remove(enter)
        tile_kernel.pre_run_hooks.remove(before)
    a_launch()
    assert seen == ["tile_kernel", "before", "tile_kernel"]
    assert gpu.launched == ["tile_kernel"] * 4


def test_a_hook_that_names_the_compilers_passes_is_asked_at_every_launch(gpu):
    """Its answers, of which Triton makes the kernel's key, may be others at each."""

    class Hook:
        __hash__ = None  # which nothing needs

        def __init__(self, *answers):
            self.answers = list(answers)

        def __call__(self):
            return "key", self.answers.pop(0)

    hook = Hook("a", "b", "b")
    with mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", hook):
        for _ in range(3):
            a_launch()
    assert gpu.searched == 3
    if hook.answers:
        pytest.skip(f"Triton {triton.__version__} asks no such hook")
    assert gpu.kernels == [0, 1, 1]
    a_launch()
    a_launch()
    assert gpu.kernels[3:] == [2, 2]
    assert gpu.searched == 4


@triton.jit
def copy_kernel(t, size, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(t.out + i, tl.load(t.table + i, mask=i < size), mask=i < size)


class Copied(NamedTuple):
    table: Any
    out: Any
    other: Any = False


def test_a_launch_has_its_own_tables(gpu):
    """Of a single tensor besides, which is found again by its alignment like any other."""
    table, out = OnGpu(torch.randn(8).bfloat16()), OnGpu(torch.randn(16).bfloat16())
    tables = devices.DeviceTables({"table": table})
    launch = launches.Launch(copy_kernel, 1, Copied(True, True), (8,), {"block": 8}, tables)
    taken = []
    with mock.patch.object(launches.Launch, "_launch", autospec=True) as called:
        called.side_effect = lambda self, tensors: taken.append(tensors)
        launch.on(out=out, other=out)
    assert [id(x) for x in taken[0]] == [id(table), id(out), id(None)]
    for given in (out, out[1:], out, out[8:]):
        launch.on(out=given)
    assert gpu.kernels == [0, 1, 0, 0]
    assert gpu.searched == 2
    assert tables in devices.CAPTURED  # as the stub's graph reads them again
    with pytest.raises(ValueError, match="copy_kernel needs out, none is given"):
        launch.on(other=out)


@pytest.mark.parametrize("with_map", [False, True])
def test_every_launch_of_frames_keeps_its_tables_for_a_graph(gpu, with_map):
    operation, make, wanted = frames(vk.FrameRule.tar(1.0), return_map=with_map)
    call = make()
    out, mean_map, saved = operation.run("triton", call, save=True)
    assert len(devices.CAPTURED) == 1 + with_map
    grad_map = None if mean_map is None else torch.ones_like(mean_map)
    operation.run_backward("triton", call, out, saved, torch.ones_like(out), grad_map, wanted)
    assert len(devices.CAPTURED) == 3 + with_map


def test_where_triton_goes_by_more_it_is_asked_at_every_launch(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(3):
        a_launch()
    assert gpu.searched == 3
    assert gpu.kernels == [0, 0, 0]


@pytest.mark.parametrize(
    ("version", "searched"),
    [
        *((version, 1) for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0")),
        *((version, 3) for version in ("3.10.0", "4.3.6", "3.60.0")),
    ],
)
def test_a_triton_that_nobody_has_read_is_asked_at_every_launch(
    version, searched, gpu, monkeypatch
):
    found = launches._triton()._replace(version=version)
    monkeypatch.setattr(launches, "_triton", lambda: found)
    for _ in range(3):
        a_launch()
    assert gpu.searched == searched
    assert gpu.kernels == [0, 0, 0]


def tensors_otherwise():
    """Yields tensors that differ in all that Triton may ask of one."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.int32)
    for dtype, offset in itertools.product(dtypes, (0, 1, 2, 4, 8)):
        for size in (2**10, 2**20, 2**31):  # bytes, of which none is touched
            held = torch.empty(size // dtype.itemsize + offset, dtype=dtype)[offset:]
            yield held[:24]
            yield held[:24].view(2, 3, 4).mT


def answers(launch, tensors, backend):
    """Returns what a kernel is kept by and what Triton goes by, of each way one tensor may be."""
    from triton.runtime.jit import create_function_from_signature

    search = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    for name, given in tensors._asdict().items():
        for other in tensors_otherwise() if given is not None else ():
            changed = tensors._replace(**{name: other})
            _, specialization, _ = search(*launch.call_arguments(changed), **launch.keywords)
            yield launch._specialization(changed), specialization


@pytest.mark.parametrize("target", ["cuda", "hip"])
def test_of_tensors_triton_goes_by_nothing_else(target, gpu):
    """By Triton's own binder. On AMD it does, which is why nothing is kept there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    taken = []
    launch = launches.Launch._launch
    with mock.patch.object(launches.Launch, "_launch", autospec=True) as called:
        called.side_effect = lambda *given: (taken.append(given), launch(*given))
        a_launch()
    ((launch, given),) = taken
    tensors = launch.needed._make(x if x is None else torch.empty(24, dtype=x.dtype) for x in given)
    backend = make_backend(
        GPUTarget("cuda", 80, 32) if target == "cuda" else GPUTarget("hip", "gfx942", 64)
    )
    theirs = {}
    for kept_by, specialization in answers(launch, tensors, backend):
        theirs.setdefault(kept_by, set()).add(repr(specialization))
    assert len(theirs) > 20
    assert (max(map(len, theirs.values())) == 1) == (target == "cuda")


@pytest.mark.parametrize("frames", [16, 32, 33, 128])
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_the_maximum_of_a_large_map_streams_on_sm_100(architecture, frames):
    """Triton does not compile it for tiles there."""
    strides = (frames * 128, 128, 64, 1)
    device = devices.Device(architecture, shared=232448, processors=132)
    options = Options("gaussian", 1.0, 1.0, "map_max", False, False, 0.125, 0)
    shape = (8, frames, 2, 64)
    key = plan.PlanKey(device, torch.bfloat16, False, shape, options, *[strides] * 4)
    has_tile = tile.make_plan(key) is not None
    assert has_tile == (architecture == "sm_90" or frames <= 32)
