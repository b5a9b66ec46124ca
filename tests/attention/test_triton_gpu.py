"""The Triton kernels on a real GPU: shapes, grids and tensors that the interpreter cannot take."""

import functools
import json
from pathlib import Path

import pytest
import torch

import vstar_kernels as vk
from benchmarks.check import sample
from vstar_kernels.testing import assert_as_exact_as_eager, assert_columns, inputs

ROOT = Path(__file__).parents[2]
GAUSSIAN = vk.GaussianBias(1.0)
SAMPLES = 24

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def run(query, key, value, bias=GAUSSIAN, **options):
    return vk.tar_attention(query, key, value, bias, backend="triton", **options)


def on_gpu(*shape, dtype=torch.float32, seed=0):
    return tuple(x.cuda() for x in inputs(*shape, dtype=dtype, seed=seed))


def made_on_gpu(*shape, dtype=torch.bfloat16, seed=0):
    """Large inputs, which the CPU would take long to draw."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    return tuple(torch.randn(shape, **options) for _ in range(3))


def assert_right(*tensors, **options):
    *tensors, bias = tensors
    assert_as_exact_as_eager(*(x.cpu() for x in tensors), bias, **options)


def assert_samples(out, query, key, value, bias=GAUSSIAN):
    """The first and last of the batch and some between them."""
    assert_right(*sample(SAMPLES, out, query, key, value), bias)


def need_memory(size):
    """``size`` in bytes."""
    free = torch.cuda.mem_get_info()[0]
    if free < size:
        pytest.skip(f"takes {size / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def model_sizes():
    """Every (frames, heads, head_dim) of the models' workloads."""
    table = json.loads((ROOT / "benchmarks/workloads.json").read_text())
    return sorted(
        {
            (frames, level["heads"], level["head_dim"])
            for model in table["models"].values()
            for level in model["levels"]
            for frames in (*table["frames"], model["native_frames"])
        }
    )


def biases(frames, heads):
    generator = torch.Generator().manual_seed(1)
    return [
        None,
        vk.GaussianBias(0.0),
        vk.GaussianBias(3.0, strength=-2.0, stat="map_max"),
        vk.GaussianBias(8.0, stat="none", strength=0.5),
        vk.ToeplitzBias(torch.rand(frames, generator=generator), clamp_negative=True),
        vk.ToeplitzBias(torch.rand(heads, frames, generator=generator), stat="map_max"),
        vk.ToeplitzBias(torch.rand(2 * frames - 1, generator=generator), signed=True),
        vk.DenseBias(torch.rand(frames, frames, generator=generator)),
        vk.DenseBias(torch.rand(heads, frames, frames, generator=generator), stat="map_max"),
    ]


@pytest.mark.parametrize(("frames", "heads", "head_dim"), model_sizes())
def test_the_models_shapes(frames, heads, head_dim):
    tensors = made_on_gpu(1024, frames, heads, head_dim)
    assert_samples(run(*tensors), *tensors)


# Each kernel takes seconds to compile, so not every length comes with every type.
@pytest.mark.parametrize(
    ("frames", "dtype"),
    [
        *((frames, torch.bfloat16) for frames in (1, 16, 33, 128, 129, 1024)),
        *((frames, torch.float32) for frames in (15, 64, 300)),
        *((frames, torch.float16) for frames in (17, 100, 200)),
    ],
)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 160, 256])
def test_head_sizes_and_lengths(frames, head_dim, dtype):
    tensors = on_gpu(2, frames, 3, head_dim, dtype=dtype)
    assert_right(run(*tensors), *tensors, GAUSSIAN)


@pytest.mark.parametrize("frames", [16, 27, 64, 128, 200])
@pytest.mark.parametrize("index", range(9))
def test_small_options(frames, index):
    tensors = on_gpu(3, frames, 2, 40, dtype=torch.bfloat16)
    bias = biases(frames, 2)[index]
    assert_right(run(*tensors, bias=bias), *tensors, bias)


@pytest.mark.parametrize("frames", [16, 200])
@pytest.mark.parametrize("form", [vk.GaussianBias(2.0), vk.DenseBias(torch.rand(200, 200))])
def test_small_statistic_from_a_tensor(frames, form):
    tensors = on_gpu(3, frames, 2, 64)
    stat = torch.randn(3, frames, 2)
    if isinstance(form, vk.GaussianBias):
        on_cpu, bias = (vk.GaussianBias(2.0, stat=x) for x in (stat, stat.cuda()))
    else:
        matrix = form.matrix(200)[:frames, :frames]
        on_cpu, bias = (vk.DenseBias(matrix, stat=x) for x in (stat, stat.cuda()))
    assert_right(run(*tensors, bias=bias), *tensors, on_cpu)


@pytest.mark.parametrize("frames", [16, 300])
@pytest.mark.parametrize("form", ["symmetric", "signed", "dense"])
def test_small_delta_on_the_cpu_gets_its_gradient_there(frames, form):
    shape = {"symmetric": (frames,), "signed": (2, 2 * frames - 1), "dense": (frames, frames)}[form]
    delta = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    tensors, grad_out = inputs(3, frames, 2, 40), inputs(3, frames, 2, 40, seed=1)[0]

    def gradient(attention, delta, *others):
        *given, grad = others
        delta = delta.clone().requires_grad_()
        toeplitz = functools.partial(vk.ToeplitzBias, signed=form == "signed")
        bias = vk.DenseBias(delta) if form == "dense" else toeplitz(delta)
        return torch.autograd.grad(attention(*given, bias), delta, grad)[0]

    found = gradient(run, delta, *(x.cuda() for x in (*tensors, grad_out)))
    assert (found.device.type, found.dtype, found.shape) == ("cpu", delta.dtype, delta.shape)
    doubled = (x.double() for x in (delta, *tensors, grad_out))
    exact = gradient(vk.reference.tar_attention, *doubled)
    plain = gradient(vk.reference.tar_attention, delta, *tensors, grad_out)
    error, allowed = (found - exact).norm(), 2 * (plain - exact).norm()
    assert error <= allowed + 20 * torch.finfo(torch.float32).eps * exact.norm()


def test_negative_scale():
    tensors = on_gpu(4, 32, 2, 64)
    assert_right(run(*tensors, scale=-0.2), *tensors, GAUSSIAN, scale=-0.2)


@pytest.mark.parametrize("sequences", [65535, 65536, 131073])
def test_grids(sequences):
    tensors = made_on_gpu(sequences, 16, 1, 40)
    out = run(*tensors)
    assert out.isfinite().all()
    assert_samples(out, *tensors)


@pytest.mark.parametrize("frames", [16, 200])
def test_more_than_2_to_the_31_elements(frames):
    shape = (2**31 // (frames * 8 * 64) + 3, frames, 8, 64)
    need_memory(5 * 2 * torch.Size(shape).numel())
    query, key, value = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for x in (query, key, value):
        x.normal_()
    assert query.numel() > 2**31
    assert_samples(run(query, key, value), query, key, value)


@pytest.mark.parametrize("frames", [16, 64, 128, 300])
@pytest.mark.parametrize("stat", ["row_max", "map_max"])
@pytest.mark.parametrize("within", [False, True])
def test_64_bit_offsets_give_the_same_bits(frames, stat, within, monkeypatch):
    """Those of sequences in a large tensor, and ``within`` a sequence those of its frames too."""
    from vstar_kernels.attention import triton as backend
    from vstar_kernels.attention.triton import plan

    # The same kernels both times, whatever tiles leave to others.
    streams = within or stat == "map_max"
    monkeypatch.setattr(plan, "left_by_tile", lambda key, config: streams)
    bias = vk.GaussianBias(1.0, stat=stat)
    tensors = made_on_gpu(64, frames, 5, 72)
    backend._forward_plan.cache_clear()
    expected = run(*tensors, bias=bias)
    monkeypatch.setattr(plan, "_largest_offset", lambda key: 2**31)
    if within:
        monkeypatch.setattr(plan, "_largest_frame_offset", lambda key: 2**31)
    backend._forward_plan.cache_clear()
    out = run(*tensors, bias=bias)
    backend._forward_plan.cache_clear()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("frames", [16, 64, 128, 1024])
def test_250_repeats_give_the_same_bits(frames):
    tensors = made_on_gpu(max(2, 4096 // frames), frames, 8, 64)
    expected = run(*tensors)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(250):
        differ += (run(*tensors) != expected).any()
    assert differ.item() == 0


@pytest.mark.parametrize("stat", ["row_max", "map_max"])
@pytest.mark.parametrize("frames", [16, 64, 300])
def test_graph_replay_takes_new_inputs(frames, stat):
    bias = vk.GaussianBias(1.0, stat=stat)
    tensors = made_on_gpu(32, frames, 5, 64)
    run(*tensors, bias=bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*tensors, bias=bias)
    for old, new in zip(tensors, made_on_gpu(32, frames, 5, 64, seed=7), strict=True):
        old.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, run(*tensors, bias=bias))
    assert_samples(out, *tensors, bias)


@pytest.mark.parametrize("frames", [16, 24, 64, 128, 300])
def test_a_sequence_does_not_depend_on_its_neighbours(frames):
    tensors = made_on_gpu(37, frames, 3, 80)
    together = run(*tensors)
    alone = torch.cat([run(*(x[i : i + 1] for x in tensors)) for i in range(37)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("frames", [16, 70, 200])
def test_small_odd_strides(frames):
    wide = torch.randn(3, 4, frames + 3, 5, 77).cuda()
    query, key, value = (x[:, 1 : frames + 1, ::2, 5:45] for x in wide)
    assert query.stride(-2) % 8
    assert_right(run(query, key, value), query, key, value, GAUSSIAN)


@pytest.mark.parametrize("frames", [16, 200])
def test_small_transposed_and_expanded(frames):
    query = torch.randn(2, 3, 64, frames).cuda().permute(0, 3, 1, 2).contiguous()
    key = torch.randn(2, 3, frames, 64).cuda().transpose(1, 2)
    value = torch.randn(1, frames, 1, 64).cuda().expand(2, frames, 3, 64)
    assert_right(run(query, key, value), query, key, value, GAUSSIAN)


@pytest.mark.parametrize("frames", [16, 200])
def test_small_five_dimensions_through_strides(frames):
    # (batch · frames, space, channels), as spatial layers leave it.
    wide = torch.randn(3, 2 * frames, 6, 2 * 40).cuda().to(torch.float16)
    tensors = [x.unflatten(0, (2, frames)).transpose(1, 2).unflatten(-1, (2, 40)) for x in wide]
    out = run(*tensors)
    assert out.shape == (2, 6, frames, 2, 40)
    assert_right(out, *tensors, GAUSSIAN)


def test_nothing_is_written_beside_the_output():
    tensors = made_on_gpu(9, 20, 3, 40)
    torch.cuda.empty_cache()
    poisoned = torch.full((64 * 2**20,), float("nan"), device="cuda", dtype=torch.bfloat16)
    del poisoned  # what torch.empty hands out next
    out = run(*tensors)
    assert out.isfinite().all()
    assert_samples(out, *tensors)


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    tensors = [x.to("cuda:1") for x in inputs(8, 32, 2, 64)]
    assert torch.cuda.current_device() == 0
    out = run(*tensors)
    assert out.device == tensors[0].device
    assert_right(out, *tensors, GAUSSIAN)


@pytest.mark.parametrize("frames", [32, 300])
def test_the_switch_for_tf32(frames):
    tensors = on_gpu(64, frames, 4, 64)
    expected = vk.reference.tar_attention(*(x.double() for x in tensors), GAUSSIAN)
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (run(*tensors).double() - expected).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-5
    assert errors["highest"] * 8 < errors["high"] < 2e-2


def test_non_finite_inputs_stay_where_they_are():
    query, key, value = on_gpu(6, 32, 2, 64)
    clean = run(query, key, value)
    query[1, 3, 0, 5] = float("nan")
    value[4, 2, 1, 0] = float("nan")
    out = run(query, key, value)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[1, 3, 0] = True
    touched[4, :, 1] = True
    assert out[1, 3, 0].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])


def test_an_empty_batch():
    tensors = [torch.empty(0, 16, 2, 64, device="cuda") for _ in range(3)]
    assert run(*tensors).shape == (0, 16, 2, 64)


# ---- column_attention ----


def text_inputs(batch, queries, keys, heads, head_dim, *, dtype=torch.bfloat16, count=4, seed=0):
    """Query, a text that is the same for the batch, and columns of one key each, on the GPU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, heads, head_dim, generator=generator).to("cuda", dtype)

    text = [draw(1, keys).expand(batch, -1, -1, -1) for _ in range(2)]
    columns = torch.eye(keys)[:, torch.randint(keys, (count,), generator=generator)]
    return draw(batch, queries), *text, columns.cuda()


def columns_of(*tensors, **options):
    return vk.column_attention(*tensors, **options, backend="triton")


@pytest.mark.parametrize("keys", [1, 77, 120, 226, 512])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_columns(keys, head_dim, dtype):
    tensors = text_inputs(2, 133, keys, 3, head_dim, dtype=dtype)
    assert_columns([x.cpu() for x in columns_of(*tensors)], *(x.cpu() for x in tensors))
    maps = columns_of(*tensors[:2], None, tensors[3])
    torch.testing.assert_close(maps, columns_of(*tensors)[1], rtol=1e-5, atol=1e-6)


def column_gradients(attention, tensors, wanted):
    """The gradients of some of query, key and value, for random ones of the results."""
    *given, columns = tensors
    leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(given)]
    out, maps = attention(*leaves, columns)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in (out, maps)]
    grads[1] *= given[0].shape[2]
    return torch.autograd.grad((out, maps), [leaves[i] for i in wanted], grads)


@pytest.mark.parametrize("wanted", [(0,), (0, 1, 2)])
@pytest.mark.parametrize(("keys", "head_dim"), [(77, 64), (77, 40), (120, 72), (226, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_columns_gradients(keys, head_dim, dtype, wanted):
    tensors = text_inputs(2, 133, keys, 3, head_dim, dtype=dtype)
    found = column_gradients(columns_of, tensors, wanted)
    exact = [x.cpu().double() for x in tensors[:3]]
    expected = column_gradients(
        functools.partial(vk.column_attention, backend="reference"),
        [*exact, tensors[3].cpu()],
        wanted,
    )
    for one, other in zip(found, expected, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < 8 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize(("batch", "queries"), [(32, 2560), (32, 40), (1, 160)])
def test_columns_250_repeats_give_the_same_bits(batch, queries):
    """Where programs share the heads of a map, too."""
    tensors = text_inputs(batch, queries, 77, 20, 64)
    expected = columns_of(*tensors)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(250):
        found = columns_of(*tensors)
        differ += sum((x != y).any() for x, y in zip(found, expected, strict=True))
    assert differ.item() == 0


def test_columns_in_a_graph_take_new_inputs():
    tensors = text_inputs(16, 640, 77, 10, 64)
    columns_of(*tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = columns_of(*tensors)
    tensors[0].copy_(text_inputs(16, 640, 77, 10, 64, seed=3)[0])
    graph.replay()
    for one, other in zip(found, columns_of(*tensors), strict=True):
        assert torch.equal(one, other)


def test_columns_64_bit_offsets_give_the_same_bits(monkeypatch):
    from vstar_kernels.attention.triton import columns, plan

    tensors = text_inputs(16, 640, 77, 10, 64)
    expected = columns_of(*tensors)
    monkeypatch.setattr(plan, "INT32_MAX", 0)
    columns._forward_plan.cache_clear()
    found = columns_of(*tensors)
    columns._forward_plan.cache_clear()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# ---- frame_attention ----


@pytest.mark.parametrize("rule", ["frame_max", "row_max", "window"])
def test_frames_in_a_graph_take_new_inputs(rule):
    """Forward and backward: the first call puts the tables of the rule on the GPU."""
    layout = vk.Layout(vk.Frames(6, 40), vk.Text(16))
    rule = vk.FrameRule.window(1) if rule == "window" else vk.FrameRule.tar(1.0, stat=rule)
    made = [x.requires_grad_() for x in made_on_gpu(2, layout.tokens, 4, 64)]

    def both(query, key, value):
        out = vk.frame_attention(query, key, value, layout, rule, backend="triton")
        return out, *torch.autograd.grad(out, (query, key, value), out.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(*made)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(*made)
    with torch.no_grad():
        for old, new in zip(made, made_on_gpu(2, layout.tokens, 4, 64, seed=7), strict=True):
            old.copy_(new)
    graph.replay()
    for one, other in zip(found, both(*made), strict=True):
        torch.testing.assert_close(one, other)
