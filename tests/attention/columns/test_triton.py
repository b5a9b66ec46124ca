"""The Triton kernels of column_attention: on a GPU, or interpreted on the CPU.

The interpreter needs ``TRITON_INTERPRET=1`` from the start of its process; ``make test`` runs this
file so.
"""

import dataclasses

import pytest
import torch

import vstar_kernels as vk
from tests.attention.columns import cases
from tests.attention.kernel_lines import watched
from tests.pairwise import some
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.columns.call import ColumnWanted, check_call
from vstar_kernels.testing import assert_columns, assert_gradients

if backend.unavailable():
    pytest.skip("; ".join(backend.unavailable()), allow_module_level=True)

from vstar_kernels.attention.triton import (
    columns,
    columns_backward,
    columns_forward,
    columns_plan,
    configs,
    devices,
    log_sums,
    plan,
    primitives,
)
from vstar_kernels.attention.triton.configs import ColumnsConfig

DEVICE = "cpu" if backend.interpreted() else "cuda:0"
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("poison")


SMALL = ColumnsConfig(rows=32, keys=64, warps=4, stages=1, shared=0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Few rows a program, and plans that are made anew."""
    monkeypatch.setattr(configs, "columns", lambda *key: small(key[-1]))
    yield
    columns._forward_plan.cache_clear()
    columns._backward_plan.cache_clear()


def small(table):
    is_tile = table.endswith(("_80", "_128"))
    return dataclasses.replace(SMALL, keys=0) if is_tile else SMALL


@pytest.fixture
def processors(monkeypatch):
    """Has kernels planned for a device with so many processors, on which programs share work."""

    def choose(count):
        found = devices.device_of(torch.device(DEVICE))._replace(processors=count)
        monkeypatch.setattr(devices, "device_of", lambda device: found)

    return choose


def on_device(x):
    """A tensor on the kernels' device, laid as it was; anything else as it is."""
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def run(*arguments, **options):
    """The kernels' result, on the CPU."""
    found = vk.column_attention(*map(on_device, arguments), **options, backend="triton")
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


TINY = cases.OPTIONS | {
    "queries": [1, 5, 37],
    "keys": [1, 16, 64, 77, 100, 128, 130, 226, 600],
    "count": [1, 4],
    "heads": [1, 3],
    "head_dim": [16, 40],
    "processors": [1, 100],
    "int64": [False, True],
}


@pytest.mark.parametrize("case", some(TINY, 24), ids=cases.identify)
def test_options(case, monkeypatch, processors):
    processors(case["processors"])
    if case["int64"]:
        monkeypatch.setattr(plan, "INT32_MAX", -1)
    arguments, options = cases.make(case)
    assert_columns(run(*arguments, **options), *arguments, **options)


# ---- gradients ----

WANTED = [("query",), ("key", "value"), ("query", "key"), ("query", "value")]
GRADIENTS = TINY | {
    "queries": [1, 5, 70],
    "keys": [16, 77, 128, 130],
    "wanted": WANTED,
    "save": [True, False],
    "dtype": [torch.float32, torch.float16],  # the interpreter truncates to bfloat16
}


class OnDevice:
    """The kernels with calls and gradients that are on the CPU."""

    @staticmethod
    def forward(call, *, save):
        return columns.forward(moved(call), save=save)

    @staticmethod
    def backward(call, out, saved, grad_out, grad_map, wanted):
        given = map(on_device, (grad_out, grad_map))
        found = columns.backward(moved(call), out, saved, *given, wanted)
        return found._make(None if x is None else x.cpu() for x in found)


def moved(call):
    """The call on the kernels' device."""
    tensors = {name: on_device(x) for name, x in call.tensors().items()}
    return dataclasses.replace(call, **tensors)


@pytest.mark.parametrize("case", some(GRADIENTS, 12), ids=cases.identify)
def test_gradients(case, processors):
    processors(case["processors"])
    arguments, options = cases.make(case)
    wanted = [x for x in case["wanted"] if case["value"] or x != "value"]
    made = cases.Gradients(arguments, options, wanted)
    half = case["dtype"] == torch.float16
    compute = made.eager if half else made.autograd
    # Of rows that see nearly one key the gradients of logits are zero, but for rounding.
    assert_gradients(
        made.by(OnDevice, save=case["save"]), compute, vanishing=1e-2 if half else 1e-4
    )


@pytest.mark.parametrize("keys", [77, 130])
def test_gradients_of_one_result(keys):
    """The other has none, as where only the maps are in a loss, or only the output."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 9, 2, 16), *torch.randn(2, 2, keys, 2, 16)
    call = check_call(*map(on_device, (query, key, value, torch.rand(keys, 3))))
    wanted = ColumnWanted(query=True, key=True, value=True, columns=False)
    grads = [on_device(torch.randn(2, 9, 2, 16)), on_device(torch.randn(2, 9, 3))]
    lse = columns.forward(call, save=True).saved
    both = columns.backward(call, None, lse, *grads, wanted)
    of_out = columns.backward(call, None, lse, grads[0], None, wanted)
    of_maps = columns.backward(call, None, lse, None, grads[1], wanted)
    for total, one, other in zip(both[:3], of_out, of_maps, strict=False):
        torch.testing.assert_close(one + other, total, rtol=1e-4, atol=1e-5)
    assert not of_maps.value.any()


def test_through_the_operation():
    """Autograd reaches the kernels, and keeps a number for each row beside their inputs."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (40, 77, 77))
    weights, kept, found = torch.rand(77, 2, device=DEVICE), [], []
    query.requires_grad_()

    def pack(x):
        if x.data_ptr() not in [given.data_ptr() for given in (query, key, value, weights)]:
            kept.append(tuple(x.shape))
        return x

    text = [x.expand(3, -1, -1, -1) for x in (key, value)]
    for name in ("triton", "reference"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, maps = vk.column_attention(
                query.expand(3, -1, -1, -1), *text, weights, backend=name
            )
        if name == "triton":
            assert kept == [(3, 2, 40)]
        loss = out.transpose(1, 3).square().sum() + 20 * maps.square().sum()
        found += torch.autograd.grad(loss, query)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# ---- what kernels must not do ----


@pytest.mark.parametrize("keys", [77, 130])
def test_a_nan_stays_in_its_row(keys):
    """In all that the row gives, whatever columns there are; other rows keep their bits."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 40, 2, 16), *torch.randn(2, 1, keys, 2, 16)
    weights = torch.zeros(keys, 3)
    weights[5, 0], weights[keys - 1, 1] = 1, 1
    clean = run(query, key, value, weights)
    query[0, 33, 1] = NAN
    found = run(query, key, value, weights)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[0, :33], y[0, :33])
        assert torch.equal(x[0, 34:], y[0, 34:])
    assert found[0][0, 33, 1].isnan().all()
    assert found[1][0, 33].isnan().all()
    nothing = run(query, key, None, torch.zeros(keys, 1))
    assert nothing.isnan().sum() == nothing[0, 33].isnan().sum() == 1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("keys", [77, 130])
def test_logits_of_any_size(keys, sign):
    """A key that no query sees, −∞, and logits far beyond what an exponential holds.

    Beside keys of very negative logits, what is padded would weigh more than any number.
    """
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 3, 1, 16), *torch.randn(2, 1, keys, 1, 16)
    query = 20 * query.abs() + 20
    key = key.abs() * sign
    key[0, 3, 0, 0] = -torch.inf
    weights = torch.eye(keys)[:, [0, 75, keys - 1]]
    call = check_call(*map(on_device, (query, key, value, weights)), scale=1.0)
    found = columns.forward(call, save=True)
    grads = [on_device(torch.randn_like(x)) for x in found[:2]]
    wanted = ColumnWanted(query=True, key=False, value=False, columns=False)
    query.requires_grad_()
    out, maps = vk.column_attention(query, key, value, weights, scale=1.0, backend="reference")
    torch.testing.assert_close(found.out.cpu(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean_map.cpu(), maps, rtol=1e-4, atol=1e-4)
    assert out.isfinite().all()
    key[0, 3, 0, 0] = -1000.0  # a key of −∞ has no finite gradient
    call = check_call(*map(on_device, (query.detach(), key, value, weights)), scale=1.0)
    gradient = columns.backward(call, None, (), *grads, wanted).query
    out, maps = vk.column_attention(query, key, value, weights, scale=1.0, backend="reference")
    (expected,) = torch.autograd.grad((out, maps), query, [x.cpu() for x in grads])
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_programs_that_share_work_are_the_same_every_time(processors):
    processors(100)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 40, 3, 16), *torch.randn(2, 1, 77, 3, 16)
    results = []
    for _ in range(2):
        leaves = [on_device(x).clone().requires_grad_() for x in (query, key, value)]
        found = vk.column_attention(*leaves, on_device(torch.eye(77)[:, :2]), backend="triton")
        results.append([*found, *torch.autograd.grad([x.sum() for x in found], leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_nothing_to_compute():
    query, key = torch.zeros(0, 4, 2, 16, device=DEVICE), torch.zeros(0, 3, 2, 16, device=DEVICE)
    query.requires_grad_()
    out, maps = vk.column_attention(query, key, key, torch.ones(3, 2, device=DEVICE))
    assert (out.shape, maps.shape) == ((0, 4, 2, 16), (0, 4, 2))
    (found,) = torch.autograd.grad(out.sum() + maps.sum(), query)
    assert found.shape == query.shape


def test_reasons_name_what_is_missing(monkeypatch):
    x, weights = torch.zeros(1, 77, 1, 16, device=DEVICE), torch.ones(77, 2, device=DEVICE)

    def why_not(**changed):
        given = {"query": x, "key": x, "value": x, "columns": weights}
        return columns.why_not(check_call(**{**given, **changed}))

    assert why_not() == []
    assert why_not(value=None) == []
    double = {name: x.double() for name in ("query", "key", "value")}
    assert why_not(**double)[0].startswith("takes torch.float32")
    trained = weights.clone().requires_grad_()
    assert why_not(columns=trained) == ["computes no gradient of columns, which requires one"]
    with torch.no_grad():
        assert not why_not(columns=trained)
    monkeypatch.setattr(backend, "MAX_ROWS", 76)
    assert why_not() == ["takes up to 76 rows of head_dim, the call has 77"]


# ---- how work is shared out ----


def test_heads_are_shared_out_where_programs_are_few():
    def shares(processors, programs, heads):
        x = torch.zeros(1, 1, 1, 16)
        key = columns_plan.forward_key(check_call(x, x, x, torch.ones(1, 1)), x)
        device = key.device._replace(processors=processors)
        return key._replace(device=device).shares(programs, heads)

    assert shares(132, 264, 5) == (1, 5)
    assert shares(132, 263, 5) == (2, 3)  # and not 3 and 2, of which one would be idle
    assert shares(132, 100, 20) == (3, 7)
    assert shares(132, 1, 20) == (20, 1)
    assert shares(1, 7, 20) == (1, 20)


def test_keys_are_in_two_parts_or_stream(monkeypatch):
    asked = []

    def find(keys, tiles=True):
        asked.clear()
        monkeypatch.setattr(
            configs, "columns", lambda *k: (asked.append(k[-1]), small(k[-1]) if tiles else None)[1]
        )
        x = torch.zeros(1, keys, 1, 16)
        key = columns_plan.forward_key(check_call(x, x, x, torch.ones(keys, 1)), x)
        return key.config("forward").keys, key.key_parts

    assert find(1) == (0, (16, 0))
    assert find(77) == (0, (64, 16))
    assert asked == ["forward_80"]
    assert find(120) == (0, (128, 0))
    assert asked == ["forward_128"]
    assert find(129)[0] == SMALL.keys
    assert asked == ["forward_stream"]


def test_where_there_is_no_tile_few_keys_stream(monkeypatch):
    monkeypatch.setattr(configs, "columns", lambda *k: SMALL if small(k[-1]) is SMALL else None)
    torch.manual_seed(0)
    tensors = [torch.randn(1, n, 2, 16) for n in (9, 13, 13)]
    arguments = (*tensors, torch.rand(13, 2))
    assert_columns(run(*arguments), *arguments)
    made = cases.Gradients(arguments, {}, ["query"])
    assert_gradients(made.by(OnDevice), made.autograd)


@pytest.mark.skipif(not primitives.INTERPRETED.value, reason="compiled, no line can be watched")
def test_every_line_of_the_kernels_runs(processors):
    """No statement is left to chance; a new one needs a case here and among the options."""
    processors(4)
    torch.manual_seed(0)
    with watched(columns_forward, columns_backward, log_sums) as not_run:
        for keys in (77, 13, 130):
            tensors = [torch.randn(1, n, 2, 40, requires_grad=True) for n in (3, keys, keys)]
            one_hot = torch.eye(keys)[:, :1]
            found = vk.column_attention(*tensors, one_hot, scale=-0.1, backend="triton")
            torch.autograd.grad([x.sum() for x in found], tensors)
            maps = vk.column_attention(*tensors[:2], None, one_hot, backend="triton")
            torch.autograd.grad(maps.sum(), tensors[0])
    assert not not_run()
