"""Every shipped configuration against the float64 oracle: on a GPU, or on an emulated one.

The other tests cut small problems into small blocks, whatever is shipped. Here each line of the
files of configurations that is the GPU's computes the calls that ``benchmarks.codegen`` compiles it
for, through the public functions: but for pairs of options, which the other tests have, and for a
stream's gradients of the output alone, which have what the forward pass saved. A program of a tile
has at least two of them.

    EMULATED_GPU=sm_90 python -m pytest -m shipped tests/attention/test_shipped.py -k 16-bit
"""

import functools

import pytest
import torch

from vstar_kernels.attention import triton as backend
from vstar_kernels.testing import EPS, eager, eager_columns, eager_frames

if backend.unavailable():
    pytest.skip("; ".join(backend.unavailable()), allow_module_level=True)

from benchmarks.codegen import calls, cases, column_cases, frame_cases
from vstar_kernels.attention.triton import configs, descriptors, devices, primitives

if primitives.INTERPRETED.value:
    pytest.skip("the interpreter has no configurations of its own", allow_module_level=True)

DEVICE = torch.device("cpu" if backend.interpreted() else "cuda:0")  # emulated, or a GPU's
HERE = devices.device_of(DEVICE)
LONG = 200  # frames of streams: some blocks of keys are beyond Δ's window
KERNELS = {  # of tar_attention, by family and whether backward
    ("tile", False): "tile_kernel",
    ("tile", True): "tile_backward_kernel",
    ("stream", False): "stream_kernel",
    ("stream", True): "grad_key_kernel",
}

pytestmark = [pytest.mark.gpu, pytest.mark.shipped, pytest.mark.usefixtures("poison")]


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


def results(call, attention, tensors):
    """What an attention makes of tensors, and with weights the gradients of its weighted sum."""
    leaves = {name: x.detach().requires_grad_(name in call.wanted) for name, x in tensors.items()}
    made = call.forward(attention, leaves)
    found = {f"result {i}": x.detach() for i, x in enumerate(made)}
    return found | (call.gradients(leaves, made) if call.weights else {})


def check(kind, call, formula):
    """Asserts that the kernels err as little as their products do, in length and at worst.

    In IEEE float32, and of maps in 16 bits, whose weights are not rounded, the error is at most
    twice PyTorch's in float32, and 20 eps for the approximate exponentials of GPUs. In 16 bits it
    is at most an eps more: weights, and what comes of them, are rounded once for each product. In
    TF32 it is 2 eps of float16, which has as many digits, as there they are cut off. Of all that a
    single element may err by three times as much.
    """
    kernels = functools.partial(call.attention, backend="triton")
    found = results(call, kernels, {name: x.to(DEVICE) for name, x in call.tensors.items()})
    exact = results(call, formula, {name: x.double() for name, x in call.tensors.items()})
    plain = results(call, formula, {name: x.float() for name, x in call.tensors.items()})
    query = call.tensors["query"]
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        is_map = name.startswith("result") and truth.shape != query.shape
        expected = torch.float32 if is_map else call.tensors.get(name, query).dtype
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


# ---- tar_attention ----


TAR = [
    x
    for entry in of_this_gpu(cases.entries())
    for x in with_head_sizes(entry, calls.tar_variants(entry))
]


@pytest.mark.parametrize(("entry", "variant", "head_dim"), TAR, ids=identify)
def test_tar(entry, variant, head_dim, asked, launched):
    frames = (entry.frames or LONG) - (not variant.even)
    batch, heads = 1, 2
    if entry.family == "tile":
        sequences = 2 * entry.config.programs * entry.config.sequences + 1
        # Programs share out a batch element's sequences where their maps are added up.
        batch, heads = (1, sequences) if variant.map else (-(-sequences // 3) | 1, 3)
    torch.manual_seed(0)
    call = calls.tar(entry, variant, head_dim, batch=batch, frames=frames, heads=heads)
    with calls.circumstances(entry, variant):
        check(entry.kind, call, eager)
    direction = "_backward" if entry.backward else ""
    assert (f"{entry.family}{direction}", entry.config) in asked
    (one,) = [x for x in launched if x.kernel.__name__ == KERNELS[entry.family, entry.backward]]
    if variant.name == calls.POINTERS:
        assert not isinstance(one, descriptors.DescribedLaunch)


# ---- column_attention ----


COLUMNS = [
    x
    for entry in of_this_gpu(column_cases.entries())
    for x in with_head_sizes(entry, calls.column_variants(entry))
]


@pytest.mark.parametrize(("entry", "variant", "head_dim"), COLUMNS, ids=identify)
def test_columns(entry, variant, head_dim, asked):
    torch.manual_seed(0)
    call = calls.of_columns(entry, variant, head_dim, batch=2, queries=133, heads=3)
    with calls.circumstances(entry, variant):
        check(entry.kind, call, eager_columns)
    assert (entry.table, entry.config) in asked


# ---- frame_attention ----

SIZES = {"frames": 5, "tokens": 60, "text": 40, "lengths": [210]}
OF_FRAMES = [
    x
    for entry in of_this_gpu(frame_cases.entries())
    if not entry.table.startswith("grad_key")  # one call computes both gradients
    for x in with_head_sizes(entry, frame_cases.VARIANTS[entry.table])
]


@pytest.mark.parametrize(("entry", "variant", "head_dim"), OF_FRAMES, ids=identify)
def test_frames(entry, variant, head_dim, asked, launched):
    torch.manual_seed(0)
    call = calls.of_frames(entry, variant, head_dim, **SIZES)
    with calls.circumstances(entry, variant):
        check(entry.kind, call, eager_frames)
    assert (entry.table, entry.config) in asked
    if entry.backward:
        assert entry.table.replace("query", "key") in [table for table, _ in asked]
    else:
        revisits = entry.table.startswith("revisit")
        assert revisits == ("revisit" in [x.constants.get("WAY") for x in launched])
