"""Every shipped configuration against the float64 oracle: on a GPU, or on an emulated one.

The other tests cut small problems into small blocks, whatever is shipped. Here each line of the
files of configurations that is the GPU's computes the calls that ``benchmarks.codegen`` compiles it
for, through the public functions: but for pairs of options, which the other tests have, and for a
stream's gradients of the output alone, which have what the forward pass saved. A program of a tile
has at least two of them.

    EMULATED_GPU=sm_90 python -m pytest -m shipped tests/attention/test_shipped.py -k 16-bit
"""

import dataclasses
import functools

import pytest
import torch

import vstar_kernels as vk
from tests.attention.conftest import forget_saved
from vstar_kernels.attention import triton as backend
from vstar_kernels.testing import EPS, eager, eager_columns, eager_frames

if backend.unavailable():
    pytest.skip("; ".join(backend.unavailable()), allow_module_level=True)

from benchmarks.codegen import cases, column_cases, frame_cases
from vstar_kernels.attention.triton import (
    columns,
    configs,
    descriptors,
    devices,
    frames,
    plan,
    primitives,
)

if primitives.INTERPRETED.value:
    pytest.skip("the interpreter has no configurations of its own", allow_module_level=True)

DEVICE = torch.device("cpu" if backend.interpreted() else "cuda:0")  # emulated, or a GPU's
HERE = devices.device_of(DEVICE)
LONG = 200  # frames of streams: some blocks of keys are beyond Δ's window
POINTERS = "gaussian, by pointers"
KERNELS = {  # of tar_attention, by family and whether backward
    ("tile", False): "tile_kernel",
    ("tile", True): "tile_backward_kernel",
    ("stream", False): "stream_kernel",
    ("stream", True): "grad_key_kernel",
}

pytestmark = [pytest.mark.gpu, pytest.mark.shipped, pytest.mark.usefixtures("poison")]


@pytest.fixture(autouse=True)
def fresh_plans():
    """Some are made as the tests here want them, and plans are remembered."""
    forget_plans()
    yield
    forget_plans()


def forget_plans():
    for module in (backend, columns, frames):
        module._forward_plan.cache_clear()
        module._backward_plan.cache_clear()


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """So that few sequences, rows or heads give each program several tiles."""
    monkeypatch.setattr(devices, "device_of", lambda device: HERE._replace(processors=1))


@pytest.fixture
def asked(monkeypatch):
    """The configurations that calls have asked for, with the names of their tables."""
    found = []

    def recorded(name, look_up, *key):
        config = look_up(*key)
        table = key[-1] if name in ("frames", "columns") else name
        found.append((table, config))
        return config

    for name in ("tile", "stream", "tile_backward", "stream_backward", "frames", "columns"):
        look_up = functools.partial(recorded, name, getattr(configs, name))
        monkeypatch.setattr(configs, name, look_up)
    return found


def of_this_gpu(entries):
    """Those lines that are the GPU's, the commonest kind of products first."""
    found = [x for x in entries if x.architecture == HERE.architecture]
    return sorted(found, key=lambda x: configs.KINDS.index(x.kind))


def identify(x):
    """Names a line, a variant of a call, or a head size."""
    if isinstance(x, int):
        return str(x)
    if not isinstance(x, cases.Key):
        return x.name.replace(" ", "_").replace("'", "")
    family = getattr(x, "table", "gradients" if x.backward else "forward")
    of_frames = "" if x.frames is None else f"{x.frames}x"
    return f"{x.family}-{family}-{x.kind}-{of_frames}{x.width}"


def with_head_sizes(entry, variants):
    """The calls of a line: the first has a model's head size, the last fills the width in part."""
    sizes = [entry.width] * len(variants)
    if variants:
        sizes[0] = column_cases.PARTIAL.get(entry.width, entry.width)
    if len(variants) > 1:
        sizes[-1] = cases.PARTIAL.get(entry.width, entry.width)
    return [(entry, *x) for x in zip(variants, sizes, strict=True)]


def choose(entry, variant, monkeypatch):
    """Has products computed as the line says; returns the type of queries, keys and values."""
    monkeypatch.setattr(plan, "ieee_products", lambda dtype: entry.kind == "ieee")
    return variant.dtype(entry.kind)


def results(attention, tensors, weights, wanted):
    """What an attention makes of tensors, and with weights the gradients of its weighted sum."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    made = attention(**leaves)
    made = made if isinstance(made, tuple) else (made,)
    found = {f"result {i}": x.detach() for i, x in enumerate(made)}
    if weights:
        pairs = zip(made, weights, strict=True)
        loss = sum((x.double() * w.to(x.device)).sum() for x, w in pairs)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
        found |= dict(zip(wanted, gradients, strict=True))
    return found


def check(kind, attend, kernels, formula, tensors, weights=(), wanted=()):
    """Asserts that the kernels err as little as their products do, in length and at worst.

    ``attend`` calls either of the two. ``wanted`` are the tensors that require gradients, which
    there are of results with ``weights``.

    In IEEE float32, and of maps in 16 bits, whose weights are not rounded, the error is at most
    twice PyTorch's in float32, and 20 eps for the approximate exponentials of GPUs. In 16 bits it
    is at most an eps more: weights, and what comes of them, are rounded once for each product. In
    TF32 it is at most twice PyTorch's in float16, which has as many digits, and 2 eps for what is
    cut off and not rounded. Another key may then have a row's largest logit, and so the statistic's
    gradient: that bound is a wide one. Of all that a single element may err by three times as much.
    """
    wanted = tuple(wanted)
    kernels = functools.partial(kernels, backend="triton")

    def computed(function, change):
        changed = {name: change(x) for name, x in tensors.items()}
        return results(functools.partial(attend, function), changed, weights, wanted)

    found = computed(kernels, lambda x: x.to(DEVICE))
    exact = computed(formula, torch.Tensor.double)
    dtype = torch.float16 if kind == "tf32" else torch.float32
    plain = computed(formula, lambda x: x.to(dtype))
    query = tensors["query"]
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        is_map = name.startswith("result") and truth.shape != query.shape
        expected = torch.float32 if is_map else tensors.get(name, query).dtype
        assert (found[name].shape, found[name].dtype) == (truth.shape, expected), name
        error, plain_error = (x[name].cpu().double() - truth for x in (found, plain))
        if kind == "tf32":
            roundings = 2 * torch.finfo(torch.float16).eps
        elif kind == "ieee" or is_map:
            roundings = 20 * EPS
        else:
            roundings = torch.finfo(query.dtype).eps
        for size, times in ((torch.linalg.norm, 1), (lambda x: x.abs().max(), 3)):
            allowed = 2 * size(plain_error) + times * roundings * size(truth)
            assert size(error) <= allowed, f"{name}: {size(error):.3g}, allowed {allowed:.3g}"


def random(*shape, dtype):
    """Random numbers in a type, so that the oracle has the same."""
    return torch.randn(shape).to(dtype)


# ---- tar_attention ----


def variants(entry):
    """What a line computes for itself."""
    always = cases.ALWAYS[entry.family, entry.backward]
    rare = cases.rare(entry).values() if entry.family == "tile" else ()
    found = [x for x in (*always, *rare) if cases.launches(entry, x, entry.width)]
    described = entry.architecture in descriptors.ARCHITECTURES and entry.kind == "16-bit"
    if entry.family == "stream" and not entry.backward and described:
        found.append(dataclasses.replace(cases.GAUSSIAN, name=POINTERS))
    return found


TAR = [x for entry in of_this_gpu(cases.entries()) for x in with_head_sizes(entry, variants(entry))]


def tar_bias(variant, frames, heads):
    """The bias that a variant names, but for a statistic that is given."""
    options = {"clamp_negative": variant.clamp}
    if variant.stat != "tensor":
        options["stat"] = variant.stat
    if variant.form == "gaussian":
        return vk.GaussianBias(1.0, **options)
    assert variant.form == "dense"
    by_head = (heads,) * variant.per_head
    return vk.DenseBias(torch.rand(*by_head, frames, frames), **options)


def unaligned(x):
    """The same numbers, behind one more."""
    behind = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return behind.view(x.shape).copy_(x)


@pytest.mark.parametrize(("entry", "variant", "head_dim"), TAR, ids=identify)
def test_tar(entry, variant, head_dim, asked, launched, monkeypatch):
    dtype = choose(entry, variant, monkeypatch)
    if variant.wide:
        monkeypatch.setattr(plan, "_largest_offset", lambda key: 2**31)
    if entry.backward and entry.family == "stream" and variant.map:
        forget_saved(monkeypatch)
    frames = (entry.frames or LONG) - (not variant.even)
    batch, heads = 1, 2
    if entry.family == "tile":
        sequences = 2 * entry.config.programs * entry.config.sequences + 1
        # Programs share out a batch element's sequences where their maps are added up.
        batch, heads = (1, sequences) if variant.map else (-(-sequences // 3) | 1, 3)
    torch.manual_seed(0)
    shape = (batch, frames, heads, head_dim)
    tensors = {name: random(*shape, dtype=dtype) for name in ("query", "key", "value")}
    bias = tar_bias(variant, frames, heads)
    if variant.stat == "tensor":
        tensors["stat"] = torch.randn(batch, frames, heads)
    if variant.grad_delta:
        tensors["delta"] = bias.entries
    options = {"return_map": variant.map}
    if variant.negative:
        options["scale"] = -(head_dim**-0.5)
    weights = []
    if entry.backward:
        weights.append(random(*shape, dtype=dtype))
        if variant.map:
            weights.append(heads * torch.randn(batch, frames, frames))

    def attend(function, query, key, value, stat=None, delta=None):
        if variant.name == POINTERS:
            query, key, value = map(unaligned, (query, key, value))
        changed = {} if delta is None else {"delta": delta}
        changed |= {} if stat is None else {"stat": stat.float()}
        return function(query, key, value, dataclasses.replace(bias, **changed), **options)

    wanted = tensors if entry.backward else ()
    check(entry.kind, attend, vk.tar_attention, eager, tensors, weights, wanted)
    direction = "_backward" if entry.backward else ""
    assert (f"{entry.family}{direction}", entry.config) in asked
    (one,) = [x for x in launched if x.kernel.__name__ == KERNELS[entry.family, entry.backward]]
    if variant.name == POINTERS:
        assert not isinstance(one, descriptors.DescribedLaunch)


# ---- column_attention ----


def column_variants(entry):
    """What a line computes; those with heads of 64 far apart in memory, too."""
    far = not entry.backward and (entry.kind, entry.width) == ("16-bit", 64)
    return [*entry.variants, column_cases.WIDE] if far else entry.variants


COLUMNS = [
    x
    for entry in of_this_gpu(column_cases.entries())
    for x in with_head_sizes(entry, column_variants(entry))
]


@pytest.mark.parametrize(("entry", "variant", "head_dim"), COLUMNS, ids=identify)
def test_columns(entry, variant, head_dim, asked, monkeypatch):
    dtype = choose(entry, variant, monkeypatch)
    if variant.wide:
        monkeypatch.setattr(plan, "INT32_MAX", -1)
    keys = column_cases.KEYS.get(entry.table.rsplit("_", 1)[-1], 77)
    batch, heads, queries = 2, 3, 133
    torch.manual_seed(0)
    sizes = {"query": queries, "key": keys} | ({"value": keys} if variant.value else {})
    tensors = {
        name: random(batch, tokens, heads, head_dim, dtype=dtype) for name, tokens in sizes.items()
    }
    columns = torch.rand(keys, 4)
    scale = -(head_dim**-0.5) if variant.negative else None
    weights, wanted = [], ()
    if entry.backward:
        wanted = tensors if variant.wants_keys else ("query",)
        if variant.value:
            weights.append(random(batch, queries, heads, head_dim, dtype=dtype))
        weights.append(heads * torch.randn(batch, queries, columns.shape[1]))
    elif variant.save:
        wanted = ("query",)

    def attend(function, query, key, value=None):
        return function(query, key, value, columns.to(query.device), scale=scale)

    check(entry.kind, attend, vk.column_attention, eager_columns, tensors, weights, wanted)
    assert (entry.table, entry.config) in asked


# ---- frame_attention ----

FRAMES, TOKENS, TEXT = 5, 60, 40  # of one frame, and of text
OF_FRAMES = [
    x
    for entry in of_this_gpu(frame_cases.entries())
    if not entry.table.startswith("grad_key")  # one call computes both gradients
    for x in with_head_sizes(entry, frame_cases.VARIANTS[entry.table])
]


def frames_rule(variant, heads):
    """The rule whose tables a variant names, but for a statistic that is given."""
    rule, options = vk.FrameRule(), {"clamp_negative": variant.clamp, "stat": variant.stat}
    if variant.stat == "tensor":
        options["stat"] = "row_max"
    if "delta" in variant.tables and variant.per_head:
        rule += vk.FrameRule.bias(torch.rand(heads, FRAMES, FRAMES), **options)
    elif "delta" in variant.tables:
        rule += vk.FrameRule.tar(1.0, **options)
    if "offset" in variant.tables:
        rule += vk.FrameRule.window(3)
    if "factor" in variant.tables:
        rule += vk.FrameRule.attenuate(0.6, 2, metric="token")
    if "band" in variant.tables:
        rule += vk.FrameRule.band(40)
    return rule


@pytest.mark.parametrize(("entry", "variant", "head_dim"), OF_FRAMES, ids=identify)
def test_frames(entry, variant, head_dim, asked, launched, monkeypatch):
    dtype = choose(entry, variant, monkeypatch)
    if variant.wide:
        monkeypatch.setattr(plan, "INT32_MAX", -1)
    revisits = entry.table.startswith("revisit")
    monkeypatch.setattr(configs, "revisit_below", lambda *key: float("inf") if revisits else 0.0)
    runs = 5 if variant.interleaved else 1
    layout = vk.Layout(vk.Text(TEXT), *[vk.Frames(FRAMES, TOKENS // runs)] * runs)
    batch, heads = 1 + variant.lengths, 2
    torch.manual_seed(0)
    tensors = {
        name: random(batch, layout.tokens, count, head_dim, dtype=dtype)
        for name, count in (("query", heads), ("key", 1), ("value", 1))
    }
    if variant.clamp:  # some rows have nothing but negative logits
        tensors["key"] = tensors["key"].abs()
        tensors["query"][:, ::3] = -tensors["query"][:, ::3].abs()
    rule = frames_rule(variant, heads)
    if variant.stat == "tensor":
        tensors["stat"] = torch.randn(batch, layout.tokens, heads)
    lengths = torch.tensor([layout.tokens, 210], dtype=torch.int32) if variant.lengths else None
    options = {"scale": -(head_dim**-0.5) if variant.negative else None}
    options |= {"return_map": variant.map != "none", "map_heads": variant.map == "heads"}
    weights = []
    if entry.backward:
        weights.append(random(*tensors["query"].shape, dtype=dtype))
        if variant.map != "none":
            by_head = (heads,) * (variant.map == "heads")
            weights.append(FRAMES * torch.randn(batch, *by_head, FRAMES, FRAMES + 1))

    def attend(function, query, key, value, stat=None):
        changed = rule if stat is None else dataclasses.replace(rule, stat=stat.float())
        here = lengths if lengths is None else lengths.to(query.device)
        return function(query, key, value, layout, changed, key_lengths=here, **options)

    wanted = tensors if entry.backward or variant.save else ()
    check(entry.kind, attend, vk.frame_attention, eager_frames, tensors, weights, wanted)
    assert (entry.table, entry.config) in asked
    if entry.backward:
        assert entry.table.replace("query", "key") in [table for table, _ in asked]
    else:
        assert revisits == ("revisit" in [x.constants.get("WAY") for x in launched])
