"""The C++ kernels against the oracle, on each instruction set that can execute here."""

import pytest
import torch

import vstar_kernels as vk
from tests.attention.columns import cases
from tests.helpers import on_threads
from tests.pairwise import pairwise, some
from vstar_kernels.attention import native
from vstar_kernels.attention.columns import cpu, reference
from vstar_kernels.attention.columns.call import ColumnWanted, check_call
from vstar_kernels.testing import assert_columns, assert_gradients

pytestmark = pytest.mark.usefixtures("one_thread", "poison")
NAN = float("nan")


def attend(*arguments, **options):
    return vk.column_attention(*arguments, backend="cpu", **options)


def inputs(queries=37, keys=19, heads=3, dim=16, count=4, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n, heads, dim) for n in (queries, keys, keys)]
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return (*tensors, torch.randn(keys, count, generator=generator))


@pytest.mark.parametrize(
    ("case", "isa_in_turn"),
    [(case, i) for i, case in enumerate(pairwise(cases.OPTIONS))],
    indirect=["isa_in_turn"],
    ids=lambda x: cases.identify(x) if isinstance(x, dict) else str(x),
)
@pytest.mark.usefixtures("isa_in_turn")
def test_options(case):
    arguments, options = cases.make(case)
    assert_columns(attend(*arguments, **options), *arguments, **options)


GRADIENT_OPTIONS = {
    **cases.OPTIONS,
    "queries": [1, 37, 70],
    "keys": [1, 16, 77, 130],
    "head_dim": [8, 40, 64],
    "wanted": ["query", "key", "value", "query key", "query key value"],
}


@pytest.mark.parametrize(
    ("case", "isa_in_turn"),
    [(case, i) for i, case in enumerate(some(GRADIENT_OPTIONS, 28))],
    indirect=["isa_in_turn"],
    ids=lambda x: cases.identify(x) if isinstance(x, dict) else str(x),
)
@pytest.mark.usefixtures("isa_in_turn")
def test_gradients(case):
    arguments, options = cases.make(case)
    wanted = case["wanted"].split()
    if not case["value"]:
        wanted = [x for x in wanted if x != "value"] or ["query"]
    calls = cases.Gradients(arguments, options, wanted)
    # A query that sees one key, or equal ones, has no gradient: what is left is rounding.
    assert_gradients(calls.by(cpu), calls.autograd, vanishing=1e-5)


@pytest.mark.parametrize("head_dim", [1, 7, 72, 168])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_head_dims(head_dim, dtype, isa):
    tensors = inputs(dim=head_dim, dtype=dtype)
    assert_columns(attend(*tensors), *tensors)
    calls = cases.Gradients(tensors, {}, ("query", "key", "value"))
    assert_gradients(calls.by(cpu), calls.autograd)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_many_queries(dtype):
    """Several blocks of queries, several parts of them, and their sums."""
    tensors = inputs(queries=600, keys=77, heads=1, dim=24, dtype=dtype)
    tensors = [*(x[:1] for x in tensors[:3]), tensors[3]]
    assert_columns(attend(*tensors), *tensors)
    for wanted in (["query"], ["key", "value"]):
        calls = cases.Gradients(tensors, {}, wanted)
        assert_gradients(calls.by(cpu), calls.autograd)


@pytest.mark.parametrize("count", [1, 3, 5, 80])
@pytest.mark.parametrize("zeros", [0.0, 0.97, 1.0])
def test_sparse_and_dense_columns(count, zeros, isa):
    """Columns with few entries, in which some may have none, are multiplied in another way."""
    q, k, v, _ = inputs()
    generator = torch.Generator().manual_seed(1)
    for shape in ((19, count), (2, 19, count)):
        kept = torch.rand(shape, generator=generator) >= zeros
        columns = torch.randn(shape, generator=generator) * kept
        assert_columns(attend(q, k, v, columns), q, k, v, columns)
    assert not attend(q, k, None, torch.zeros(19, count)).any()


@pytest.mark.parametrize("place", ["query", "key", "columns"])
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_not_finite_is_where_the_formula_has_it(place, zeros, isa):
    """Also in a column of zeros, which zero times NaN is not."""
    q, k, _, columns = inputs()
    columns[:, 0] = 0
    if zeros:
        columns[1:] = 0
    {"query": q[1, 5, 2], "key": k[1, 5, 2], "columns": columns[5]}[place][1] = NAN
    found, expected = attend(q, k, None, columns), reference.column_attention(q, k, None, columns)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("value", [1e37, -3.4e38, 1e-30])
def test_large_values(value, isa):
    """No sum on the way to a mean of values overflows."""
    q, k, v, columns = inputs(keys=200)
    out, _ = attend(q, k, torch.full_like(v, value), columns)
    torch.testing.assert_close(out, torch.full_like(q, value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_weights_beyond_the_exponentials_range(size, isa):
    q, k, v, columns = inputs()
    assert_columns(attend(q, size * k, v, columns), q, size * k, v, columns)


@pytest.mark.parametrize("queries", [1, 100, 700])
def test_bits_do_not_depend_on_threads(queries):
    tensors = inputs(queries, 77, 2, 40)
    tensors = [*(x[:1] for x in tensors[:3]), tensors[3]]
    results = []
    for threads in (1, 2, 5):
        with on_threads(threads):
            gradients = [
                x
                for wanted in (["query"], ["query", "key", "value"])
                for x in cases.Gradients(tensors, {}, wanted).by(cpu).values()
            ]
            results.append([*attend(*tensors), *gradients])
    for others in results[1:]:
        for x, y in zip(others, results[0], strict=True):
            assert torch.equal(x, y)


def test_bits_do_not_depend_on_what_else_is_asked_for(isa):
    q, k, v, columns = inputs()
    out, maps = attend(q, k, v, columns)
    assert torch.equal(attend(q, k, None, columns), maps)
    alone = torch.full_like(q, NAN)
    scale = q.shape[-1] ** -0.5
    torch.ops.vstar_kernels.cpu_columns_forward(alone, None, q, k, v, columns[None], scale)
    assert torch.equal(alone, out)
    every = cases.Gradients((q, k, v, columns), {}, ("query", "key", "value")).by(cpu)
    for name in every:
        one = cases.Gradients((q, k, v, columns), {}, (name,)).by(cpu)
        assert torch.equal(one[name], every[name])


def test_one_result_may_have_no_gradient(isa):
    call = check_call(*inputs())
    wanted = ColumnWanted(True, True, True, False)
    for grad_out, grad_maps in (
        (torch.ones_like(call.query), None), (None, torch.ones(call.map_shape)),
    ):  # fmt: skip
        found = cpu.backward(call, None, (), grad_out, grad_maps, wanted)
        expected = reference.backward(call, None, (), grad_out, grad_maps, wanted)
        for x, y in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_gradients_of_any_strides():
    """A sum's gradient is one number; another's is transposed."""
    q, k, v, columns = inputs()
    q.requires_grad_()
    for reduce in (
        lambda out, maps: out.sum() + maps.sum(),
        lambda out, maps: (out.mT * torch.arange(3.0)).sum() + (maps.mT.flatten()[::3]).sum(),
    ):
        (found,) = torch.autograd.grad(reduce(*attend(q, k, v, columns)), q)
        (expected,) = torch.autograd.grad(reduce(*reference.column_attention(q, k, v, columns)), q)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- what is refused ----


def test_refused():
    q, k, v, columns = inputs()
    reasons = vk.backends.why_not_columns(q.double(), k.double(), v.double(), columns)["cpu"]
    assert reasons == ["takes torch.float32, torch.bfloat16, torch.float16, query is torch.float64"]
    turned = k.mT.contiguous().mT
    for tensors in ((q, turned, v), (q, k, turned)):
        (reason,) = vk.backends.why_not_columns(*tensors, columns)["cpu"]
        assert "takes contiguous head_dim" in reason
    assert vk.backends.why_not_columns(q, k, None, columns)["cpu"] == []
    columns.requires_grad_()
    with pytest.raises(ValueError, match="computes no gradient of columns"):
        attend(q, k, v, columns)
    with torch.no_grad():
        attend(q, k, v, columns)
    wanted = ColumnWanted(True, False, False, True)
    with pytest.raises(NotImplementedError, match="gradient of its columns"):
        cpu.backward(check_call(q, k, v, columns), None, (), q, None, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.zeros(1, 18, 4)}, "columns must be"),
        ({"columns": torch.zeros(3, 19, 4)}, "columns must be"),
        ({"columns": torch.zeros(1, 19, 8)[..., ::2]}, "columns must be a contiguous"),
        ({"key": torch.zeros(2, 19, 2, 16)}, "query's heads"),
        ({"key": torch.zeros(2, 0, 3, 16), "value": torch.zeros(2, 0, 3, 16)}, "and keys"),
        ({"value": torch.zeros(2, 18, 3, 16)}, "value must have key's shape"),
        ({"value": None}, "out goes with value"),
        ({"maps": torch.zeros(2, 37, 3)}, "maps must be"),
        ({"out": torch.zeros(2, 37, 3, 8)}, "out must have query's shape"),
    ],
)
def test_the_operator_stays_inside_its_tensors(change, message):
    query, key, value, columns = inputs()
    given = {
        "out": torch.empty_like(query), "maps": torch.empty(2, 37, 4), "query": query, "key": key,
        "value": value, "columns": columns[None],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vstar_kernels.cpu_columns_forward(*(given | change).values(), 1.0)
