"""column_attention itself: its arguments, its choice, what it is equal to, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.columns import reference

BACKENDS = [
    name for name, module in dispatch.COLUMN_ATTENTION.backends.items() if not module.unavailable()
]


def inputs(queries=37, keys=16, heads=3, dim=16, count=4, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (queries, keys, keys)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    return (*tensors, torch.randn(keys, count, generator=generator))


@pytest.fixture(params=BACKENDS)
def attend(request):
    """column_attention on each backend that runs here; what one cannot take is skipped."""

    def run(query, key, value, columns, **options):
        module = dispatch.COLUMN_ATTENTION.backends[request.param]
        call = dispatch.check_column_call(query, key, value, columns, **options)
        if reasons := module.why_not(call):
            pytest.skip(f"{request.param}: {'; '.join(reasons)}")
        return vk.column_attention(query, key, value, columns, **options, backend=request.param)

    return run


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


# ---- identities ----


def test_the_output_is_sdpa(attend):
    q, k, v, columns = inputs()
    close(attend(q, k, v, columns)[0], sdpa(q, k, v))
    close(attend(q, k, v, columns, scale=-0.3)[0], sdpa(q, k, v, scale=-0.3))


def test_maps_of_all_keys_add_up_to_one(attend):
    q, k, v, _ = inputs()
    out, maps = attend(q, k, v, torch.eye(16))
    assert (maps >= 0).all()
    close(maps.sum(-1), torch.ones(2, 37))
    assert torch.equal(attend(q, k, None, torch.eye(16)), maps)
    assert out.shape == q.shape


def test_columns_of_ones_have_maps_of_one_and_no_gradient(attend):
    q, k, *_ = inputs()
    q.requires_grad_()
    maps = attend(q, k, None, torch.ones(16, 3))
    close(maps, torch.ones(2, 37, 3))
    (gradient,) = torch.autograd.grad(maps, q, torch.randn(maps.shape))
    assert gradient.abs().max() < 1e-6


def test_it_is_sdpa_with_more_values(attend):
    """Forward and backward, of V' = [V | G], whose last columns are averaged over the heads."""
    q, k, v, columns = inputs()
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(q.shape, generator=generator)
    grad_maps = torch.randn(2, 37, 4, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    spread = columns[:, None].expand(2, 16, 3, 4)
    both = sdpa(q, k, torch.cat([v, spread], -1))
    expected = (both[..., :16], both[..., 16:].mean(2))
    gradients = torch.autograd.grad(expected, leaves, (grad_out, grad_maps))
    found = attend(q, k, v, columns)
    for x, y in zip(found, expected, strict=True):
        close(x, y)
    for x, y in zip(torch.autograd.grad(found, leaves, (grad_out, grad_maps)), gradients,
                    strict=True):  # fmt: skip
        close(x, y)


def test_the_words_of_columns_are_means_of_their_keys(attend):
    q, k, *_ = inputs()
    each = attend(q, k, None, torch.eye(16))
    columns = torch.zeros(16, 2)
    columns[3, 0], columns[7:9, 1] = 1, 0.5
    close(attend(q, k, None, columns), torch.stack([each[..., 3], each[..., 7:9].mean(-1)], -1))


def test_columns_by_sequence(attend):
    q, k, *_ = inputs()
    columns = torch.randn(2, 16, 4)
    maps = attend(q, k, None, columns)
    for b in range(2):
        one = slice(b, b + 1)
        close(maps[one], attend(q[one], k[one], None, columns[b]))


def test_an_expanded_text_is_that_of_every_frame(attend):
    q, k, v, columns = inputs()
    text = [x[:1].expand_as(x) for x in (k, v)]
    found = attend(q, *text, columns)
    for x, y in zip(found, attend(q, *(x.clone() for x in text), columns), strict=True):
        close(x, y)
    k, v = k[:1].clone().requires_grad_(), v[:1].clone().requires_grad_()
    q.requires_grad_()
    out, maps = attend(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), columns)
    found = torch.autograd.grad(out.square().sum() + maps.square().sum(), (q, k, v))
    out, maps = reference.column_attention(
        q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), columns
    )
    expected = torch.autograd.grad(out.square().sum() + maps.square().sum(), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize("name", ["query", "key", "value", "columns"])
def test_what_is_not_finite_is_where_the_formula_has_it(attend, name):
    """A NaN in a query stays in its row, one in the text in its sequence and head."""
    tensors = dict(zip(("query", "key", "value", "columns"), inputs(), strict=True))
    clean = attend(*tensors.values())
    place = (5, 2) if name == "columns" else (1, 5, 2, 3)
    tensors[name][place] = math.nan
    found = attend(*tensors.values())
    expected = reference.column_attention(*tensors.values())
    for x, y, z in zip(found, expected, clean, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x[~x.isnan()], z[~x.isnan()])


def test_outputs_are_laid_as_torch_lays_them(attend):
    q, k, v, columns = inputs()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert attend(q, k, v, columns)[0].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}])
def test_nothing_to_attend(attend, sizes):
    q, k, v, columns = inputs(**sizes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, maps = attend(q, k, v, columns)
    assert out.shape == q.shape
    assert maps.shape == (*q.shape[:2], 4)
    for x, y in zip(torch.autograd.grad((out.sum() + maps.sum()), leaves), leaves, strict=True):
        assert x.shape == y.shape
        assert not x.any()


# ---- the choice of a backend ----


def test_every_backend_is_named():
    names = list(dispatch.COLUMN_ATTENTION.backends)
    assert names[-1] == "reference"
    assert set(names) <= set(vk.backends.available())
    reasons = vk.backends.why_not_columns(*inputs())
    assert list(reasons) == names
    assert reasons["reference"] == []


def test_an_explicit_choice_never_falls_back(monkeypatch):
    class Refuses:
        unavailable = staticmethod(list)

        @staticmethod
        def why_not(call):
            return [f"takes 1 key, key has {call.keys}"]

    monkeypatch.setattr(
        dispatch.COLUMN_ATTENTION, "backends", {"one": Refuses, "reference": reference}
    )
    with pytest.raises(ValueError) as error:
        vk.column_attention(*inputs(), backend="one")
    for part in [
        "backend 'one' cannot run this call", "takes 1 key, key has 16", "query: (2, 37, 3, 16)",
        "columns: (2, 16, 4), strides (0, 4, 1)",
    ]:  # fmt: skip
        assert part in str(error.value)
    dispatch._warn_once.cache_clear()
    with pytest.warns(vk.SlowBackendWarning, match="column_attention runs on the slow.*\n.*1 key"):
        vk.column_attention(*inputs())
    dispatch._warn_once.cache_clear()
    with pytest.raises(ValueError, match="backend must be one of 'one', 'reference' or None"):
        vk.column_attention(*inputs(), backend="cpuu")


# ---- bad arguments ----

BAD = {
    "query must be .batch, queries": lambda q, k, v, g: ((q[0], k, v, g), {}),
    "query must be of a floating-point type.*got torch.int64": lambda q, k, v, g: (
        (q.long(), k, v, g), {},
    ),
    r"at least one head and one element of it, got \(2, 37, 3, 0\)": lambda q, k, v, g: (
        (q[..., :0], k[..., :0], v[..., :0], g), {},
    ),
    r"batch 2, heads 3 and head_dim 16, got shape \(1, 16, 3, 16\)": lambda q, k, v, g: (
        (q, k[:1], v, g), {},
    ),
    r"heads 3 and head_dim 16, got shape \(2, 16, 2, 16\)": lambda q, k, v, g: (
        (q, k[:, :, :2], v, g), {},
    ),
    r"head_dim 16, got shape \(2, 16, 3, 8\)": lambda q, k, v, g: ((q, k[..., :8], v, g), {}),
    r"at least one key, got shape \(2, 0, 3, 16\)": lambda q, k, v, g: (
        (q, k[:, :0], v[:, :0], g[:0]), {},
    ),
    r"key's shape \(2, 16, 3, 16\), got \(2, 15, 3, 16\)": lambda q, k, v, g: (
        (q, k, v[:, :15], g), {},
    ),
    "key must have query's type torch.float32, got torch.bf": lambda q, k, v, g: (
        (q, k.bfloat16(), v, g), {},
    ),
    "value must be on query's device cpu, got meta": lambda q, k, v, g: (
        (q, k, v.to("meta"), g), {},
    ),
    r"key's 16 keys and batch 2, got shape \(15, 4\)": lambda q, k, v, g: ((q, k, v, g[:15]), {}),
    r"key's 16 keys and batch 2, got shape \(3, 16, 4\)": lambda q, k, v, g: (
        (q, k, v, g.expand(3, -1, -1)), {},
    ),
    r"key's 16 keys and batch 2, got shape \(16,\)": lambda q, k, v, g: ((q, k, v, g[:, 0]), {}),
    r"at least one column, got shape \(16, 0\)": lambda q, k, v, g: ((q, k, v, g[:, :0]), {}),
    "columns must be torch.float32, got torch.float64": lambda q, k, v, g: (
        (q, k, v, g.double()), {},
    ),
    "columns must be on query's device cpu, got meta": lambda q, k, v, g: (
        (q, k, v, g.to("meta")), {},
    ),
    "columns must be an ordinary .strided. tensor": lambda q, k, v, g: (
        (q, k, v, g.to_sparse()), {},
    ),
    "scale must be finite.*got nan": lambda q, k, v, g: ((q, k, v, g), {"scale": math.nan}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments, options = BAD[message](*inputs())
    with pytest.raises(ValueError, match=message):
        vk.column_attention(*arguments, **options)
    with pytest.raises(ValueError, match=message):
        vk.backends.why_not_columns(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": [1.0]}, "query must be a torch.Tensor, got list"),
        ({"value": 0}, "value must be a torch.Tensor or None, got int"),
        ({"columns": [1, 2]}, "columns must be a torch.Tensor, got list"),
        ({"scale": "1"}, "scale must be a number, got str"),
        ({"backend": 1}, "backend must be one of .* got int"),
    ],
)
def test_wrong_kinds(arguments, message):
    names = ("query", "key", "value", "columns")
    with pytest.raises(TypeError, match=message):
        vk.column_attention(**{**dict(zip(names, inputs(), strict=True)), **arguments})
