"""The Triton kernels against the float64 oracle: on a GPU, or interpreted on the CPU.

The interpreter needs ``TRITON_INTERPRET=1`` from the start of its process; ``make test`` runs this
file in one of its own.
"""

import dataclasses
from unittest import mock

import pytest
import torch

import vstar_kernels as vk
from tests.attention import not_finite
from tests.attention.kernel_lines import watched
from tests.pairwise import pairwise
from vstar_kernels import testing
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.call import Call, Wanted, check_call, make_call
from vstar_kernels.attention.triton import columns as columns_backend
from vstar_kernels.attention.triton import frames as frames_backend
from vstar_kernels.testing import assert_as_exact_as_eager, eager, inputs, largest_error

if backend.unavailable():
    pytest.skip("; ".join(backend.unavailable()), allow_module_level=True)

from benchmarks.codegen.calls import forget_saved
from vstar_kernels.attention.triton import (
    configs,
    devices,
    maps,
    plan,
    primitives,
    stream,
    stream_backward,
    tile,
    tile_backward,
)
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig

DEVICE = "cpu" if backend.interpreted() else "cuda:0"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def fresh_plans():
    """Some tests replace configurations, which plans remember."""
    yield
    backend._forward_plan.cache_clear()
    backend._backward_plan.cache_clear()


def tar(query, key, value, bias=None, **options):
    """The kernels' result; query, key and value may lie in any way on their device."""
    query, key, value = (x.to(DEVICE) for x in (query, key, value))
    if bias is not None and isinstance(bias.stat, torch.Tensor):
        bias = dataclasses.replace(bias, stat=bias.stat.to(DEVICE))
    return vk.tar_attention(query, key, value, bias, backend="triton", **options)


def check(query, key, value, bias=None, **options):
    """In float32 as exact as PyTorch; in 16 bits at most twice the eager formula's error."""
    out = tar(query, key, value, bias, **options).cpu()
    assert_as_exact_as_eager(out, query.cpu(), key.cpu(), value.cpu(), bias, **options)


# ---- calls like earlier ones ----


OPERATIONS = {
    "tar": (vk.tar_attention, (vk.GaussianBias(1.0),), backend),
    "frames": (
        vk.frame_attention,
        (vk.Layout(vk.Frames(4, 5)), vk.FrameRule.tar(1.0)),
        frames_backend,
    ),
    "columns": (vk.column_attention, (torch.rand(20, 2, device=DEVICE),), columns_backend),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_repeated_call_has_the_plan_of_the_first(name, monkeypatch):
    """TF32 is a setting, by which the plan is another."""
    attend, given, module = OPERATIONS[name]
    keys, plans = [], module._forward_plan

    def check(tolerance=2e-3):
        qkv = [x.to(DEVICE) for x in inputs(1, 20, 2, 8)]
        found = attend(*qkv, *given, backend="triton")
        exact = attend(*qkv, *given, backend="reference")
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_forward_plan", lambda *key: keys.append(key[0]) or plans(*key))
        for _ in range(4):
            check()
        patch.setattr(plan, "ieee_products", lambda dtype: False)
        check(tolerance=2e-2)  # TF32 keeps ten bits of its operands
    assert keys[3] is keys[2]
    assert keys[0] == keys[3]
    assert [key.ieee for key in keys] == [True] * 4 + [False]


# ---- options ----


def heads_outermost(x):
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def frames_outermost(x):
    """As (batch · frames, space, channels) lies in memory: no permute copy before attention."""
    return x.transpose(1, -3).contiguous().transpose(1, -3)


def with_gaps(x):
    """Every row is followed by three elements of NaN, so that no stride is even."""
    return torch.nn.functional.pad(x, (0, 3), value=NAN)[..., :-3]


def one_batch_element(x):
    """Expanded: stride 0."""
    return x[:1].expand_as(x)


BIASES = {
    "none": lambda n, h, **o: None,
    "gaussian": lambda n, h, **o: vk.GaussianBias(1.5, **o),
    "toeplitz": lambda n, h, **o: vk.ToeplitzBias(torch.rand(n), **o),
    "toeplitz by head": lambda n, h, **o: vk.ToeplitzBias(torch.rand(h, n + 3), **o),
    "signed": lambda n, h, **o: vk.ToeplitzBias(torch.rand(2 * n + 5), signed=True, **o),
    "signed by head": lambda n, h, **o: vk.ToeplitzBias(torch.rand(h, 2 * n - 1), signed=True, **o),
    "dense": lambda n, h, **o: vk.DenseBias(torch.rand(n, n).mT, **o),
    "dense by head": lambda n, h, **o: vk.DenseBias(torch.rand(h, n, n).bfloat16(), **o),
}
OPTIONS = {
    "dtype": DTYPES,
    "frames": [1, 13, 16, 31, 64, 70, 128, 130],
    "head_dim": [8, 16, 40, 64, 72, 160],
    "bias": list(BIASES),
    "stat": ["row_max", "map_max", "none", "tensor"],
    "clamp_negative": [False, True],
    "strength": [1.3, -0.7],
    "scale": [None, 0.3, -0.2],
    "layout": [lambda x: x, heads_outermost, frames_outermost, with_gaps, one_batch_element],
    "five": [False, True],
    "int64": [(), ("_largest_offset",), ("_largest_offset", "_largest_frame_offset")],
}


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda c: f"{c['frames']}-{c['bias']}")
def test_options(case, monkeypatch):
    for name in case["int64"]:
        monkeypatch.setattr(plan, name, lambda key: 2**31)
    frames = case["frames"]
    # The interpreter's time is in the sequences of long videos: two of them do.
    batch, heads = (3, 3) if frames < 64 else (1, 2)
    if case["five"]:
        heads -= 1
    shape = (batch, *[2] * case["five"], frames, heads)
    q, k, v = (case["layout"](x) for x in inputs(*shape, case["head_dim"], dtype=case["dtype"]))
    torch.manual_seed(1)
    stat = case["stat"]
    if stat == "tensor":  # with both signs, and its dimensions in another order
        stat = torch.randn(*shape[::-1]).permute(*reversed(range(len(shape))))
    bias = BIASES[case["bias"]](
        frames, heads, stat=stat, strength=case["strength"], clamp_negative=case["clamp_negative"]
    )
    check(q, k, v, bias, scale=case["scale"])


# ---- configurations: how a problem is cut must not matter ----


def cut(case):
    """A test's name."""
    sizes = "-".join(str(x) for x in vars(case["config"]).values() if isinstance(x, int))
    return f"{sizes}-{case['form']}-{case['stat']}"


TILES = [
    TileConfig(queries=16, sequences=1, warps=1, stages=2),
    TileConfig(queries=16, sequences=4, warps=4, stages=2),
    TileConfig(queries=32, sequences=1, warps=2, programs=2),
    TileConfig(queries=32, sequences=2, warps=2, stages=2, programs=3),
    TileConfig(queries=64, sequences=1, warps=4, stages=2),
    TileConfig(queries=64, sequences=1, warps=8, hoists=False, programs=2),
]
STREAMS = [
    StreamConfig(queries=16, keys=32, warps=1, stages=1, shared=0),
    StreamConfig(queries=64, keys=16, warps=4, stages=2, shared=0),
    StreamConfig(queries=32, keys=64, warps=4, stages=3, shared=0),
]


CUTS = {"form": ["gaussian", "toeplitz", "dense by head"], "stat": ["row_max", "map_max"]}


@pytest.mark.parametrize("case", pairwise(CUTS | {"config": TILES}), ids=cut)
def test_tiles(case, monkeypatch):
    """Blocks of rows, several sequences at a time and their remainder, programs with many tiles."""
    config = case["config"]
    monkeypatch.setattr(configs, "tile", lambda *args: config)
    frames = config.queries if config.sequences > 1 else 64
    # Their number is odd where several are in a tile.
    batch, heads = (3, 3) if config.sequences > 1 else (1, 2)
    for n in (frames, frames - 5):
        q, k, v = inputs(batch, n, heads, 40)
        check(q, k, v, BIASES[case["form"]](n, heads, stat=case["stat"]))


@pytest.mark.parametrize(
    ("programs", "form", "map_heads"),
    [
        (1, "gaussian", None),
        (7, "dense by head", None),
        (7, "gaussian", False),
        (7, "dense by head", False),  # a map's programs have each one head's sequences
        (7, "gaussian", True),
        (1000, "dense by head", True),
    ],
)
def test_programs_share_out_the_tiles(programs, form, map_heads, monkeypatch):
    """Every sequence is some program's, whatever the heads, of the map or of Δ, are shared by."""
    config = TileConfig(queries=16, sequences=2, warps=1, stages=2, programs=programs)
    monkeypatch.setattr(configs, "tile", lambda *args: config)
    tensors = inputs(3, 3, 5, 3, 16)  # whose ranges fill no whole number of tiles
    bias = BIASES[form](5, 3)
    if map_heads is None:
        check(*tensors, bias)
        return
    options = {"return_map": True, "map_heads": map_heads}
    expected = vk.reference.tar_attention(*(x.double() for x in tensors), bias, **options)
    for made, exact in zip(tar(*tensors, bias, **options), expected, strict=True):
        assert largest_error(made.cpu(), exact) <= 1e-5


@pytest.mark.parametrize(
    ("programs", "form", "options"),
    [
        (1, "gaussian", {}),
        (7, "dense by head", {}),  # Δ's gradient: a program has one head's sequences, one at a time
        (7, "gaussian", {"return_map": True}),
        (1000, "dense by head", {"return_map": True, "map_heads": True}),
    ],
)
def test_programs_share_out_the_gradients(programs, form, options, monkeypatch):
    config = TileConfig(queries=16, sequences=2, warps=1, stages=2, programs=programs)
    monkeypatch.setattr(configs, "tile_backward", lambda *args: config)
    tensors, bias = inputs(3, 3, 5, 3, 16), BIASES[form](5, 3)
    shapes = [(3, 3, 5, 3, 16), (3, *((3,) if options.get("map_heads") else ()), 5, 5)]
    weights = [torch.randn(shape, dtype=torch.double) for shape in shapes]
    _, found = gradients(tar, tensors, bias, weights, **options)
    exact = [x.detach().double() for x in tensors]
    _, expected = gradients(vk.reference.tar_attention, exact, bias, weights, **options)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # That of a table in 16 bits may be rounded to the number beside the expected one.
        rounding = 0.0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
        assert largest_error(gradient.cpu(), expected[name]) <= 1e-4 + rounding, name


def test_what_a_tile_is_unfit_for_is_streamed(monkeypatch):
    monkeypatch.setattr(configs, "tile", lambda *args: TileConfig(16, 1, 1, unfit=("map", "delta")))
    monkeypatch.setattr(configs, "stream", lambda *args: SMALL)
    for form in ("none", "gaussian", "dense"):
        for map_block in (0, 1):
            key = plan_key((1, 16, 1, 16), bias=BIASES[form](16, 1), map_block=map_block)
            tiled = isinstance(backend._forward_plan(key), tile.TilePlan)
            assert tiled == (form != "dense" and not map_block), (form, map_block)
            backward = tile_backward.plan_tile(key, configs.tile())
            assert (backward is not None) == tiled, (form, map_block)


def test_what_is_tried_of_no_tile_is_streamed(monkeypatch):
    key = plan_key((1, 16, 1, 16), bias=vk.GaussianBias(1.0, stat="map_max"))
    for family in (tile, tile_backward):
        assert family.plan_tile(key, TileConfig(16, 1, 1)) is not None
    monkeypatch.setattr(plan, "_largest_offset", lambda key: 2**31)
    for family in (tile, tile_backward):
        assert family.plan_tile(key, TileConfig(16, 1, 1)) is None


@pytest.mark.parametrize("name", ["map_max", "wide"])
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_rare_is_streamed_where_a_tile_is_unfit_for_it(name, asked, monkeypatch):
    config = TileConfig(16, 1, 1, unfit=(name,))
    bias = vk.GaussianBias(1.0, stat="map_max" if asked and name == "map_max" else "row_max")
    if asked and name == "wide":
        monkeypatch.setattr(plan, "_largest_offset", lambda key: 2**31)
    key = plan_key((1, 16, 1, 16), bias=bias)
    for family in (tile, tile_backward):
        assert (family.plan_tile(key, config) is None) == asked


@pytest.mark.parametrize("case", pairwise(CUTS | {"config": STREAMS}), ids=cut)
def test_streams(case, monkeypatch):
    monkeypatch.setattr(configs, "tile", lambda *args: None)
    monkeypatch.setattr(configs, "stream", lambda *args: case["config"])
    for n in (1, 33, 128):
        q, k, v = inputs(1, n, 1, 24)
        check(q, k, v, BIASES[case["form"]](n, 1, stat=case["stat"]))


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, 8.0, 50.0, 1e6])
def test_window(sigma, monkeypatch):
    """Windows that end within, at and beyond blocks of keys and the sequence."""
    small = StreamConfig(queries=32, keys=16, warps=4, stages=1, shared=0)
    monkeypatch.setattr(configs, "tile", lambda *args: None)
    monkeypatch.setattr(configs, "stream", lambda *args: small)
    q, k, v = inputs(1, 75, 1, 16)
    check(q, k, v, vk.GaussianBias(sigma))
    check(q, k, v, vk.GaussianBias(sigma, strength=100.0))


# ---- maps and gradients ----

GRADIENT_OPTIONS = {
    "dtype": DTYPES,
    "frames": [13, 16, 32, 40],
    "head_dim": [16, 40],
    "bias": list(BIASES),
    "stat": ["row_max", "map_max", "none", "tensor"],
    "clamp_negative": [False, True],
    "detach_stat": [False, True],
    "scale": [0.3, -0.2],
    "layout": [lambda x: x, frames_outermost, with_gaps],
    "map_block": [0, 1, 4],
    "map_heads": [False, True],
    "five": [False, True],
    "streamed": [False, True],
    "saved": [False, True],
}
SMALL = StreamConfig(queries=32, keys=16, warps=4, stages=2, shared=0)


@pytest.fixture
def streamed(monkeypatch):
    """The kernels for long sequences, with blocks that short ones fill."""
    monkeypatch.setattr(configs, "tile", lambda *args: None)
    monkeypatch.setattr(configs, "tile_backward", lambda *args: None)
    monkeypatch.setattr(configs, "stream", lambda *args: SMALL)
    monkeypatch.setattr(configs, "stream_backward", lambda *args: SMALL)


@pytest.fixture(params=["tile", "stream"])
def frames(request):
    """So many that all keys are in one tile, or that they stream in two blocks."""
    if request.param == "stream":
        request.getfixturevalue("streamed")
    return {"tile": 13, "stream": 20}[request.param]


def leaves(tensors, bias):
    """The tensors that have gradients."""
    found = dict(zip(("query", "key", "value"), tensors, strict=True))
    if bias is not None:
        if bias.entries is not None:
            found["delta"] = bias.entries
        if isinstance(bias.stat, torch.Tensor) and not bias.detach_stat:
            found["stat"] = bias.stat
    return found


def gradients(attention, tensors, bias, weights, **options):
    """Of a weighted sum of the output and, if there is one, the map."""
    found = leaves(tensors, bias)
    for tensor in found.values():
        tensor.requires_grad_()
    result = attention(*tensors, bias, **options)
    results = result if isinstance(result, tuple) else (result,)
    loss = sum((r.double() * w.to(r.device)).sum() for r, w in zip(results, weights, strict=False))
    made = torch.autograd.grad(loss, list(found.values()))
    return results, dict(zip(found, made, strict=True))


def assert_gradients(found, compute):
    """Asserts that gradients err at most twice as much as PyTorch's, and are not biased by it.

    ``compute`` is as :func:`testing.assert_gradients` takes it, whose bounds hold too in float32
    and float16 where the kernels are interpreted. In bfloat16 they do not: the interpreter
    truncates where GPUs round to nearest, so every gradient comes out about 0.5 % too short. What
    the approximate exponentials of GPUs cost has not been measured against them: the 20 eps here
    leave room for it.
    """
    found = {name: gradient.cpu() for name, gradient in found.items()}
    if primitives.INTERPRETED.value and found["query"].dtype != torch.bfloat16:
        testing.assert_gradients(found, compute)
    exact, plain = compute(torch.Tensor.double), compute(lambda x: x)
    for name, gradient in found.items():
        assert_gradient(name, gradient.double(), exact[name].double(), plain[name].double())


def assert_gradient(name, gradient, expected, plain):
    size = expected.norm()
    error, allowed = (gradient - expected).norm(), 2 * (plain - expected).norm()
    eps = torch.finfo(torch.float32).eps
    assert error <= allowed + 20 * eps * size, (name, error, allowed)
    if size > 1e-3:
        cosine = (gradient * expected).sum() / (gradient.norm() * size)
        assert cosine > 0.999, (name, cosine)
        bias = ((gradient - expected) * expected.sign()).mean()
        assert bias.abs() <= error / expected.numel() ** 0.5 + eps, (name, bias)


@pytest.mark.parametrize(
    "case",
    pairwise(GRADIENT_OPTIONS),
    ids=lambda c: f"{c['frames']}-{c['bias']}-{'stream' if c['streamed'] else 'tile'}",
)
def test_gradients(case, request, monkeypatch):
    if case["streamed"]:
        request.getfixturevalue("streamed")
    if not case["saved"]:
        forget_saved(monkeypatch.setattr)
    frames, heads, block = case["frames"], 2, case["map_block"]
    # As many sequences either way: they take the interpreter its time.
    rows = (1, 2, frames, heads) if case["five"] else (2, frames, heads)
    shape = (*rows, case["head_dim"])
    tensors = [case["layout"](x) for x in inputs(*shape, dtype=case["dtype"])]
    torch.manual_seed(1)
    stat = torch.randn(rows) if case["stat"] == "tensor" else case["stat"]
    weight = {name: case[name] for name in ("clamp_negative", "detach_stat")}
    bias = BIASES[case["bias"]](frames, heads, stat=stat, strength=0.8, **weight)
    options = {"scale": case["scale"]}
    weights = [torch.randn(shape)]
    if block:
        options |= {"return_map": True, "map_block": block, "map_heads": case["map_heads"]}
        by_head = (heads,) if case["map_heads"] else ()
        weights.append(torch.randn(rows[0], *by_head, -(-frames // block), -(-frames // block)))

    reference = vk.reference.tar_attention
    plain_attention = eager if case["dtype"] != torch.float32 else reference

    def compute(change):
        changed = [change(x.detach()) for x in tensors]
        attention = reference if changed[0].dtype == torch.double else plain_attention
        return gradients(attention, changed, bias, weights, **options)[1]

    results, found = gradients(tar, [x.detach() for x in tensors], bias, weights, **options)
    if block:
        doubled = [x.double() for x in tensors]
        expected_results, _ = gradients(reference, doubled, bias, weights, **options)
        largest = expected_results[1].abs().max()
        tolerance = 1e-5 if case["dtype"] == torch.float32 else 1e-2
        assert largest_error(results[1].cpu(), expected_results[1]) <= tolerance * largest
    assert_gradients(found, compute)


@pytest.mark.parametrize("head_dim", [100, 128, 200])
def test_gradients_of_large_heads_by_kernels_with_their_own_blocks(monkeypatch, streamed, head_dim):
    overrides = {
        name: StreamConfig(queries, keys, warps=4, stages=1, shared=0)
        for name, queries, keys in (
            ("statistics", 16, 32),
            ("grad_key_full", 32, 64),
            ("grad_delta", 64, 16),
            ("maps", 64, 32),
        )
    }
    mixed = StreamConfig(queries=16, keys=16, warps=4, stages=1, shared=0, overrides=overrides)
    monkeypatch.setattr(configs, "stream_backward", lambda *args: mixed)
    tensors, weights = inputs(1, 40, 1, head_dim), [torch.randn(1, 40, 1, head_dim)]
    weights.append(torch.randn(1, 40, 40))
    bias = vk.ToeplitzBias(torch.rand(40), stat="map_max")

    def run(attention, change=lambda x: x):
        copies = [change(x).detach().clone() for x in tensors]
        return gradients(attention, copies, bias, weights, return_map=True)[1]

    found = run(tar)
    assert {"query", "key", "value", "delta"} <= found.keys()
    assert_gradients(found, lambda change: run(vk.reference.tar_attention, change))


SAVED = {
    "form": ["none", "gaussian", "dense by head"],
    "stat": ["row_max", "map_max", "none", "tensor"],
    "with_map": [False, True],
}


@pytest.mark.parametrize("case", pairwise(SAVED), ids=lambda c: "-".join(map(str, c.values())))
def test_saved_statistics_spare_a_sweep(streamed, launched, case):
    """The gradients are those that are computed anew, without maxima and sums of exponentials."""
    form, stat, with_map = case.values()
    query, key, value = (x.to(DEVICE) for x in inputs(1, 20, 2, 16))
    torch.manual_seed(1)
    given = torch.randn(1, 20, 2, device=DEVICE) if stat == "tensor" else stat
    bias = BIASES[form](20, 2, stat=given, strength=0.8)
    call = check_call(query, key, value, bias, return_map=with_map)
    out, _, saved = backend.forward(call, save=True)
    assert len(saved) == (1 if bias is None else 2)
    grad_out = torch.randn(out.shape, device=DEVICE)
    grad_map = torch.randn(1, 20, 20, device=DEVICE) if with_map else None
    wanted = Wanted(call.delta is not None, call.stat is not None)
    rest = (grad_out, grad_map, wanted)

    def names():
        return [launch.kernel.__name__ for launch in launched]

    launched.clear()
    found = backend.backward(call, out, saved, *rest)
    sweeps = ["statistics_kernel", "grad_query_kernel", "grad_key_kernel"]
    assert names()[:3] == sweeps
    statistics = launched[0]
    assert statistics.constants["SAVED"]
    assert (statistics.needed.q, statistics.needed.k) == (with_map, with_map)  # only a map's QKᵀ

    launched.clear()
    anew = backend.backward(call, out, (), *rest)
    maxima = ["map_max_kernel"] if stat == "map_max" and bias is not None else []
    assert names()[: len(maxima) + 3] == [*maxima, *sweeps]
    assert not launched[len(maxima)].constants["SAVED"]

    def compute(change):
        changed_out, *others = (_on_cpu(x, change) for x in (out, *rest))
        return named(vk.reference.backward(_changed(call, change), changed_out, (), *others))

    for made in (found, anew):
        assert_gradients(named(made), compute)


def named(made):
    """Returns those of a backend's gradients that there are, by name."""
    return {name: x for name, x in made._asdict().items() if x is not None}


def test_tiles_save_nothing():
    call = check_call(*(x.to(DEVICE) for x in inputs(1, 16, 1, 64, dtype=torch.bfloat16)))
    assert backend.forward(call, save=True).saved == ()


def _changed(call, change):
    tensors = (call.query, call.key, call.value, call.delta, call.stat)
    return Call(*(_on_cpu(x, change) for x in tensors), call.options)


def _on_cpu(x, change):
    return change(x.cpu()) if isinstance(x, torch.Tensor) else x


def test_maps_and_gradients_are_the_same_every_time(frames):
    tensors = inputs(3, frames, 1, 16)
    values = torch.rand(frames)

    def run():
        copies = [x.clone() for x in tensors]
        weights = [torch.ones(()), torch.ones(())]
        bias = vk.ToeplitzBias(values.clone())
        results, found = gradients(tar, copies, bias, weights, return_map=True)
        return [*results, *found.values()]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not primitives.INTERPRETED.value, reason="compiled, no line can be watched")
def test_every_line_of_the_kernels_runs(monkeypatch):
    """No statement is left to chance; a new one needs a case here and among the options."""
    cases = [
        (13, "gaussian", "row_max"),
        (13, "signed", "map_max"),
        (13, "dense by head", "tensor"),
        (16, "toeplitz", "none"),
        (20, "gaussian", "row_max"),
        (33, "gaussian", "row_max"),
        (17, "toeplitz", "map_max"),
        (17, "dense by head", "tensor"),
        (17, "toeplitz", "none"),
    ]
    packed = TileConfig(queries=16, sequences=2, warps=1)
    by_rows = TileConfig(queries=16, sequences=1, warps=1)
    tiles = dict.fromkeys((13, 16), packed) | {20: by_rows}
    blocks = StreamConfig(queries=16, keys=16, warps=1, stages=1, shared=0)
    monkeypatch.setattr(configs, "tile", lambda *args: tiles.get(args[2]))
    monkeypatch.setattr(configs, "tile_backward", lambda *a: packed if a[2] <= 16 else None)
    for direction in ("", "_backward"):
        monkeypatch.setattr(configs, f"stream{direction}", lambda *args: blocks)
    with watched(maps, primitives, stream, stream_backward, tile, tile_backward) as not_run:
        for frames, form, stat in cases:
            if (frames, stat) == (20, "row_max"):
                monkeypatch.setattr(plan, "_largest_offset", lambda key: 2**31)
            tensors = inputs(1, frames, 1, 40)
            values = torch.randn(1, frames, 1) if stat == "tensor" else stat
            bias = BIASES[form](frames, 1, stat=values, clamp_negative=True)
            if frames in tiles:
                tar(*tensors, bias, scale=-0.1)
            gradients(tar, tensors, bias, [torch.ones(())] * 2, scale=-0.1, return_map=True)
            if frames not in tiles:
                with monkeypatch.context() as patch:
                    forget_saved(patch.setattr)
                    gradients(tar, tensors, bias, [torch.ones(())] * 2, scale=-0.1)
    assert not not_run()


# ---- single properties ----


def test_strength_zero_is_plain_attention(frames):
    q, k, v = inputs(2, frames, 2, 16)
    assert torch.equal(tar(q, k, v, vk.GaussianBias(1.0, strength=0.0)), tar(q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v))
    )
    torch.testing.assert_close(tar(q, k, v).cpu().double(), sdpa.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_matter(frames, dtype):
    """A sequence's result is the same bit for bit, whatever it is computed with."""
    q, k, v = inputs(3, frames, 3, 40, dtype=dtype)
    bias = vk.GaussianBias(1.0)
    together = tar(q, k, v, bias)
    for i in (0, 2):
        assert torch.equal(together[i : i + 1], tar(q[i : i + 1], k[i : i + 1], v[i : i + 1], bias))


def test_negative_row_maximum_turns_the_band_round():
    q, k, v = inputs(1, 20, 1, 16)
    q, k = q.abs(), -k.abs()
    for bias in (vk.GaussianBias(2.0), vk.GaussianBias(2.0, clamp_negative=True)):
        check(q, k, v, bias)


def test_ties_and_large_logits():
    q, k, v = inputs(2, 40, 2, 16)
    check(torch.ones_like(q), torch.ones_like(k), v, vk.GaussianBias(1.0))
    check(100 * q, k, v, vk.GaussianBias(1.0))
    check(1e-20 * q, k, v, vk.GaussianBias(1.0))
    check(q, k, v, vk.GaussianBias(1.0), scale=0.0)


def test_empty_batch():
    bias = vk.GaussianBias(1.0)
    for shape in ((0, 16, 2, 8), (2, 0, 16, 2, 8), (2, 4, 16, 0, 8)):
        q, k, v = inputs(*shape)
        assert tar(q, k, v, bias).shape == shape
        for options in ({"return_map": True}, {"return_map": True, "map_block": 3}):
            _, found = tar(q, k, v, bias, **options)
            _, expected = vk.tar_attention(q, k, v, bias, backend="reference", **options)
            torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("frames", [16, 130])
def test_a_given_output_is_written_wherever_it_lies(frames):
    q, k, v = (x.to(DEVICE) for x in inputs(2, frames, 2, 16))
    plain = tar(q, k, v, vk.GaussianBias(1.5))
    for layout in (heads_outermost, with_gaps):
        out = layout(torch.full_like(q, NAN))
        assert tar(q, k, v, vk.GaussianBias(1.5), out=out) is out
        assert torch.equal(out, plain)


def test_output_lies_as_empty_like_lays_it():
    q, k, v = (heads_outermost(x) for x in inputs(2, 13, 3, 8))
    assert tar(q, k, v).stride() == torch.empty_like(q.to(DEVICE)).stride()


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "takes torch.float32, torch.bfloat16, torch.float16"),
        ({"head_dim": 257}, "head_dim up to 256, query has 257"),
        ({"transposed": True}, "contiguous head_dim, query has stride 16"),
    ],
)
def test_reasons(options, message):
    q, k, v = inputs(1, 16, 1, options.get("head_dim", 8))
    q, k, v = (x.to(options.get("dtype", torch.float32)) for x in (q, k, v))
    if options.get("transposed"):
        q = q.mT.contiguous().mT.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(ValueError, match=message):
        tar(q, k, v)


def test_a_long_map_is_asked_for_in_blocks(monkeypatch):
    monkeypatch.setattr(backend, "MAX_MAP_FRAMES", 20)
    tensors = inputs(1, 21, 1, 8)
    tar(*tensors, return_map=True, map_block=2)
    with pytest.raises(ValueError, match="up to 20 frames, query has 21; map_block=k returns"):
        tar(*tensors, return_map=True)


# ---- launches without a tensor ----


def test_a_launch_without_a_tensor_that_it_writes_is_an_error():
    """It is not given another in its place: the kernel would overwrite the caller's data."""
    query, key, value = (x.to(DEVICE) for x in inputs(1, 16, 1, 16, dtype=torch.bfloat16))
    made = backend._forward_plan(plan_key(tuple(query.shape), query.dtype))
    before = query.clone()
    with pytest.raises(ValueError, match="tile_kernel needs out, none is given"):
        made.launch.on(q=query, k=key, v=value, stat=query)
    assert torch.equal(query, before)


# ---- plans ----


def plan_key(shape, dtype=torch.bfloat16, strides=None, bias=None, map_block=0, **changes):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    call = make_call(tensor, tensor, tensor, bias, 1.0, map_block)
    on_device = devices.device_of(torch.device(DEVICE))
    with mock.patch.object(devices, "device_of", return_value=on_device):
        made = plan.forward_key(call, tensor)
    if strides:
        made = made._replace(query=strides, key=strides, value=strides, out=strides)
    return made._replace(**changes)


def head_constants(key):
    """Of the one launch of a tile."""
    return backend._forward_plan(key).launch.constants["HEAD"]


def test_offsets_are_64_bits_where_the_tensors_need_them():
    frames, heads, head_dim = 16, 8, 40
    row = frames * heads * head_dim
    largest = 2**31 // row  # sequences of exactly 2³¹ − 1 elements and fewer fit
    for batch, expected in ((largest, "int32"), (largest + 1, "int64")):
        constants = head_constants(plan_key((batch, frames, heads, head_dim)))
        assert str(constants.OFFSET) == expected
        assert str(constants.FRAME_OFFSET) == "int32"


def test_offsets_of_frames_are_64_bits_where_a_sequence_is_long():
    reach = 2**31 - 1 - 16  # of the last frame; its head_dim are 16
    for stride, expected in ((reach // 2, "int32"), (reach // 2 + 1, "int64")):
        key = plan_key((1, 3, 1, 16), strides=(1, 16, 16, 1))
        for name in ("query", "grad_value", "stat"):
            made = key._replace(**{name: (1, stride, 16, 1)})
            assert str(plan.head(made, block=16).FRAME_OFFSET) == expected
            left = expected == "int64"  # as the gate tries no tile of these
            assert (tile.plan_tile(made, TileConfig(16, 1, 1)) is None) == left


@pytest.mark.parametrize(
    ("form", "delta_shape"),
    [
        ("dense", (46341, 46341)),  # frames, as wide: one square root of 2³¹
        ("dense", (8, 16384, 16384)),
        ("symmetric", (2**17, 16384)),
        ("signed", (2**16 + 3, 2 * 16384 - 1)),
    ],
)
def test_offsets_are_64_bits_where_delta_needs_them(form, delta_shape):
    options = plan_key((1, 1, 1, 16)).options._replace(form=form)
    per_head = len(delta_shape) == 1 + (1 if form != "dense" else 2)
    frames = delta_shape[-1] // 2 + 1 if form == "signed" else delta_shape[-1]
    shape = (1, frames, delta_shape[0] if per_head else 1, 16)
    strides = torch.empty(delta_shape, device="meta").stride()
    closer = (*(stride - 1 for stride in strides[:-1]), 1)
    for delta, expected in ((strides, "int64"), (closer, "int32")):
        changes = {"options": options, "delta": delta, "delta_shape": delta_shape}
        key = plan_key(shape, strides=(1, 1, 1, 1), **changes)
        assert str(plan.head(key, block=16).OFFSET) == expected
        of_frames = expected if form == "dense" and not per_head else "int32"
        assert str(plan.head(key, block=16).FRAME_OFFSET) == of_frames


@pytest.mark.parametrize("form", ["matrix", "matrices", "tables"])
@pytest.mark.skipif(DEVICE != "cpu", reason="its memory is a file with holes")
def test_delta_is_read_beyond_32_bits(frames, form, tmp_path):
    sizes = {"matrix": (frames, frames), "matrices": (2, frames, frames), "tables": (2, frames)}
    strides = {"matrix": (2**28 + 4, 1), "matrices": (2**31, frames, 1), "tables": (2**31 + 1, 1)}
    path = tmp_path / "delta"
    with path.open("wb") as file:
        file.truncate(2**35)
    memory = torch.from_file(str(path), shared=True, size=2**33, dtype=torch.float32)
    delta = memory.as_strided(sizes[form], strides[form], 2**31)  # zeros are where 32 bits reach
    delta.copy_(torch.rand(sizes[form]))
    bias = vk.ToeplitzBias if form == "tables" else vk.DenseBias
    query, key, value = inputs(1, frames, 2, 16)
    found = vk.tar_attention(query, key, value, bias(delta), backend="triton")
    expected = vk.tar_attention(query, key, value, bias(delta.clone()), backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "unit"),
    [
        ((2, 16, 5, 64), torch.bfloat16, 8),
        ((2, 16, 5, 40), torch.bfloat16, 8),
        ((2, 16, 5, 40), torch.float32, 4),
        ((2, 16, 1, 36), torch.bfloat16, 4),
        ((2, 16, 3, 9), torch.float16, 1),
    ],
)
def test_units_tell_the_alignment_of_rows(shape, dtype, unit):
    attention = stream.make_plan(plan_key(shape, dtype)).attention
    assert unit == attention.constants["HEAD"].UNIT


def test_strides_of_single_elements_do_not_spoil_the_alignment():
    strides = (7, 3 * 64, 64, 1)
    assert head_constants(plan_key((1, 16, 3, 64), strides=strides)).UNIT == 8


@pytest.mark.parametrize(
    ("shape", "form", "with_map", "programs"),
    [
        ((65537, 16, 2, 64), "gaussian", False, 40),  # all that are resident
        ((3, 16, 5, 64), "gaussian", False, 8),  # two sequences each, and one
        ((65537, 16, 6, 64), "dense by head", False, 36),  # heads share out evenly
        ((2, 16, 64, 64), "dense by head", False, 64),  # one each at least
        ((4, 16, 30, 64), "gaussian", True, 40),  # a batch element's
        ((90, 16, 2, 64), "gaussian", True, 90),
    ],
)
def test_as_many_programs_as_the_gpu_holds_share_a_call(
    shape, form, with_map, programs, monkeypatch
):
    config = TileConfig(queries=16, sequences=2, warps=1, programs=4)
    monkeypatch.setattr(configs, "tile", lambda *args: config)
    gpu = devices.Device("sm_90", shared=2**18, processors=10)
    bias = BIASES[form](16, shape[2])
    key = plan_key(shape, bias=bias, map_block=int(with_map), device=gpu)
    assert backend._forward_plan(key).launch.programs == programs


def test_a_tile_too_large_for_the_gpu_is_streamed(monkeypatch):
    made = plan_key((1, 64, 1, 64))
    config = TileConfig(queries=64, sequences=1, warps=4, shared=100_000)
    monkeypatch.setattr(configs, "tile", lambda *args: config)
    small = backend._forward_plan(made._replace(device=made.device._replace(shared=99_999)))
    large = backend._forward_plan(made._replace(device=made.device._replace(shared=100_000)))
    assert small.attention.kernel is stream.stream_kernel
    assert large.launch.kernel is tile.tile_kernel


def test_tf32_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            made = stream.make_plan(plan_key((1, 16, 1, 64), torch.float32))
            assert expected == made.attention.constants["HEAD"].PRECISION
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_follows_the_setting_of_cuda_alone():
    """After that, torch.get_float32_matmul_precision raises."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        made = stream.make_plan(plan_key((1, 16, 1, 64), torch.float32))
        assert made.attention.constants["HEAD"].PRECISION == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_every_sweep_over_the_map_has_its_own_grid():
    overrides = {"grad_key": StreamConfig(queries=16, keys=64, warps=2, stages=1, shared=0)}
    config = StreamConfig(queries=32, keys=16, warps=4, stages=1, shared=0, overrides=overrides)
    made = stream_backward.plan_stream(plan_key((1, 128, 3, 64)), config)
    sweeps = (made.statistics, made.grad_query, made.grad_key)
    assert [sweep.programs for sweep in sweeps] == [12, 12, 6]
    sizes = [made.grad_key.constants[name] for name in ("QUERIES", "KEYS", "num_warps")]
    assert sizes == [16, 64, 2]


@pytest.mark.parametrize(
    ("bias", "map_block", "full"),
    [
        (None, 0, ""),
        (vk.GaussianBias(1.0), 0, ""),
        (vk.GaussianBias(1.0), 1, "_full"),
        (vk.DenseBias(torch.rand(128, 128)), 0, "_full"),
        (vk.ToeplitzBias(torch.rand(128)), 0, "_full"),
    ],
    ids=["none", "gaussian", "map", "dense", "toeplitz"],
)
def test_sweeps_that_read_a_map_s_gradient_or_a_delta_have_configurations_of_their_own(
    bias, map_block, full
):
    names = ("grad_query", "grad_key", "grad_query_full", "grad_key_full")
    sizes = {name: (16 << n, 128 >> n, 1 << n, n + 1) for n, name in enumerate(names)}
    overrides = {name: StreamConfig(*x, shared=0) for name, x in sizes.items()}
    config = StreamConfig(queries=32, keys=16, warps=4, stages=1, shared=0, overrides=overrides)
    key = plan_key((1, 128, 3, 64), bias=bias, map_block=map_block)
    made = stream_backward.plan_stream(key, config)
    constants = ("QUERIES", "KEYS", "num_warps", "STAGES")
    for name in ("grad_query", "grad_key"):
        found = getattr(made, name).constants
        assert tuple(found[x] for x in constants) == sizes[name + full]
    assert made.statistics.constants["STAGES"] == 1


@pytest.mark.parametrize(
    ("architecture", "dtype", "head_dim", "parts"),
    [
        ("sm_80", torch.float32, 256, (128, 128)),
        ("sm_90", torch.float32, 128, (64, 64)),
        ("sm_90", torch.float32, 160, (128, 32)),
        ("sm_90", torch.float32, 64, (64, 0)),
        ("sm_90", torch.bfloat16, 256, (256, 0)),
        ("gfx942", torch.float32, 256, (256, 0)),
    ],
)
def test_large_heads_are_halved_where_products_have_no_matrix_instructions(
    architecture, dtype, head_dim, parts
):
    made = plan_key((1, 600, 1, head_dim), dtype)
    options = made.options._replace(map_block=1)
    device = made.device._replace(architecture=architecture)
    made = made._replace(device=device, options=options)
    backward = stream_backward.make_plan(made)
    launches = [stream.make_plan(made).maps[0].launch]
    launches += [backward.statistics, backward.grad_query, backward.grad_key]
    constants = [launch.constants["HEAD"] for launch in launches]
    assert {(x.MAIN, x.REST) for x in constants} == {parts}


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_split_holds_a_head_and_little_more(head_dim):
    main, rest = configs.split(head_dim)
    assert main + rest >= head_dim
    for size in (main, rest):
        assert size == 0 or (size >= 16 and size & (size - 1) == 0)
    # Never more than a power of two would take, and for the sizes of real models no more than 16.
    assert main + rest <= max(16, 1 << (head_dim - 1).bit_length())
    if head_dim in (40, 64, 72, 80, 96, 128, 160):
        assert main + rest - head_dim <= 8


# ---- what is not finite, or huge ----


on_the_cpu = pytest.mark.skipif(not backend.interpreted(), reason="the tensors are on the CPU")


@on_the_cpu
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("map_max", [("query", NAN), ("key", NAN), ("value", INF)]),
        ("map_max clamped", [("query", INF)]),
        ("row_max", [("query", INF), ("value", NAN)]),
        ("tensor", [("stat", NAN)]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_not_finite_is_where_the_formula_has_it(frames, name, cases):
    not_finite.assert_as_the_reference("triton", frames, name, cases)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [100, 300])
def test_largest_values(frames, dtype):
    not_finite.assert_largest_values("triton", frames, dtype)


@on_the_cpu
@pytest.mark.parametrize("tiled", [False, True])
def test_infinite_keys_mask(tiled, frames, monkeypatch):
    if tiled:
        monkeypatch.setattr(configs, "tile_backward", lambda *args: TileConfig(64, 2, 4))
    not_finite.assert_infinite_keys_mask("triton", frames)


@on_the_cpu
def test_infinities_in_delta_mask_keys(frames):
    not_finite.assert_masks("triton", frames)


def test_masks_of_numbers_become_truth_values():
    """As Triton 3.9's interpreter wants them where a number's comparison is part of a mask."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from vstar_kernels.attention.triton.interpreter import _with_mask_at

    mask = TensorHandle(np.array([1, 0], dtype=np.int32), tl.int32)
    seen = _with_mask_at(1, lambda builder, pointers, mask, other: mask.data.tolist())
    assert seen(None, None, mask, other=0.0) == [True, False]
    assert mask.data.dtype == np.bool_
