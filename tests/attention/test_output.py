"""``out=``: what is written there, what is refused, and what follows a call that has it."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vstar_kernels as vk
from vstar_kernels.attention import cpu
from vstar_kernels.testing import assert_as_exact_as_eager, inputs

BIAS = vk.GaussianBias(1.0)
Q, K, V = inputs(2, 6, 3, 8)
LAYOUTS = {
    "contiguous": torch.empty_like,
    "heads outermost": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "with gaps": lambda x: x.new_full((*x.shape[:-1], 11), float("nan"))[..., :8],
    "heads contiguous": lambda x: x.mT.contiguous().mT,
}


def attend(out, query=Q, **options):
    return vk.tar_attention(query, K, V, BIAS, out=out, **options)


@pytest.fixture
def expected():
    return vk.tar_attention(Q, K, V, BIAS)


@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 3, 8), (2, 4, 17, 3, 8), (0, 6, 3, 8)])
def test_kernels_write_what_they_return(isa, shape, dtype, layout):
    q, k, v = inputs(*shape, dtype=dtype)
    out = LAYOUTS[layout](q).fill_(float("nan"))
    found, mean_map = vk.tar_attention(q, k, v, BIAS, return_map=True, backend="cpu", out=out)
    plain, plain_map = vk.tar_attention(q, k, v, BIAS, return_map=True, backend="cpu")
    assert found is out
    assert torch.equal(out, plain)
    assert torch.equal(mean_map.nan_to_num(), plain_map.nan_to_num())
    if layout == "with gaps":
        assert out._base[..., 8:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_writes_anywhere(expected, layout):
    out = LAYOUTS[layout](Q).fill_(float("nan"))
    assert attend(out, backend="reference") is out
    assert_as_exact_as_eager(out, Q, K, V, BIAS)
    torch.testing.assert_close(out, expected)


def test_a_kernel_allocates_no_output_of_its_own(monkeypatch):
    monkeypatch.setattr("vstar_kernels.attention.call.empty_like", None)
    attend(torch.empty_like(Q), backend="cpu")


def test_under_autocast_the_output_is_of_its_type():
    with torch.autocast("cpu", torch.bfloat16):
        plain = vk.tar_attention(Q, K, V, BIAS)
        assert torch.equal(attend(torch.empty_like(plain)), plain)
        with pytest.raises(
            ValueError, match=r"the output's type torch\.bfloat16, got torch\.float32"
        ):
            attend(torch.empty_like(Q))


INTERLEAVED = torch.randn(2, 6, 2, 3, 8)  # two tensors, frame by frame: one is within the other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend(torch.empty(2, 5, 3, 8)), r"out must have query's shape .* got \(2, 5"),
        (lambda: attend(torch.empty_like(Q).half()), "out must have the output's type.*float16"),
        (lambda: attend(torch.empty_like(Q, device="meta")), "out must be on query's device cpu"),
        (lambda: attend(Q.to_sparse()), "out must be an ordinary .*sparse_coo"),
        (lambda: attend(Q), "out's memory, .* must not meet that of query"),
        (lambda: attend(K), "out's memory, .* must not meet that of key"),
        (lambda: attend(V), "out's memory, .* must not meet that of value"),
        (
            lambda: attend(INTERLEAVED[:, :, 0], INTERLEAVED[:, :, 1]),
            "out's memory, .* must not meet that of query",
        ),
        (lambda: attend(V, backend="reference"), "out's memory, .* must not meet that of value"),
        (lambda: attend(torch.empty(1, 6, 3, 8).expand(2, 6, 3, 8)), "a place of its own"),
        (
            lambda: attend(torch.empty(999).as_strided(Q.shape, (144, 23, 8, 1))),
            r"a place of its own, got .* strides \(144, 23, 8, 1\)",
        ),
        (
            lambda: attend(LAYOUTS["heads contiguous"](Q), backend="cpu"),
            "takes contiguous head_dim, out has stride 3 in it",
        ),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_call_that_is_refused_has_not_changed_out():
    """Autograd would otherwise take what it had kept of the tensor for written over."""
    out = LAYOUTS["heads contiguous"](Q)
    before = out._version
    with pytest.raises(ValueError, match="takes contiguous head_dim"):
        attend(out, backend="cpu")
    assert out._version == before


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_out_may_be_of_negated_numbers(expected, backend):
    """A view whose elements are stored with the other sign, as that of an imaginary part may be."""
    stored = torch.full_like(Q, float("nan"))
    out = torch._neg_view(stored)
    assert attend(out, backend=backend) is out
    torch.testing.assert_close(stored, -expected)


def test_a_wrong_kind():
    with pytest.raises(TypeError, match=r"out must be a torch\.Tensor or None, got bool"):
        attend(True)


def test_a_statistic_and_a_table_are_not_written_over():
    whole = torch.zeros(2, 6, 3, 9)
    out, stat = whole[..., :8], whole[..., 8]
    with pytest.raises(ValueError, match="must not meet that of stat"):
        vk.tar_attention(Q, K, V, vk.GaussianBias(1.0, stat=stat), out=out)
    with pytest.raises(ValueError, match="must not meet that of delta"):
        vk.tar_attention(Q, K, V, vk.ToeplitzBias(whole.flatten()[:6]), out=out)


# ---- gradients ----


def test_where_a_gradient_is_wanted_it_is_refused(expected):
    query = Q.clone().requires_grad_()
    out = torch.empty_like(Q)
    with pytest.raises(ValueError, match="out= has no gradient, and query requires one"):
        attend(out, query)
    with pytest.raises(ValueError, match="out= has no gradient, and out requires one"):
        attend(torch.empty_like(Q).requires_grad_())
    table = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match="out= has no gradient, and delta requires one"):
        vk.tar_attention(Q, K, V, vk.ToeplitzBias(table), out=out)
    with torch.no_grad():
        assert torch.equal(attend(out, query), expected)
        assert not out.requires_grad


def test_autograd_notices_that_what_it_kept_is_written_over():
    weight, out = torch.ones_like(Q).requires_grad_(), torch.ones_like(Q)
    product = (weight * out).sum()
    attend(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(expected):
    with torch.inference_mode():
        own = attend(torch.empty_like(Q))
        assert torch.equal(own, expected)
        assert torch.equal(attend(torch.zeros_like(Q)), expected)
    with pytest.raises(ValueError, match="out is an inference tensor"):
        attend(own)


def test_forward_mode_is_refused():
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="out= has no forward-mode derivative"),
    ):
        attend(torch.empty_like(Q), forward_ad.make_dual(Q, torch.ones_like(Q)))


# ---- what follows a call ----


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_compiled_without_a_break(expected, backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, out):
        return attend(out, query, backend=backend) + 1

    out = torch.full_like(Q, float("nan"))
    torch.testing.assert_close(step(Q, out), expected + 1)
    torch.testing.assert_close(out, expected)


def test_a_graph_holds_the_operation_and_a_copy(expected):
    graph = make_fx(lambda query, out: attend(out, query))(Q, torch.empty_like(Q))
    found = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert found[0] == "vstar_kernels.attention.default"
    assert "aten.copy_.default" in found
    out = torch.empty_like(Q)
    graph(Q, out)
    assert torch.equal(out, expected)


def test_a_mode_sees_one_operation(expected):
    class Names(TorchDispatchMode):
        """Keeps what is called."""

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    seen, out = [], torch.empty_like(Q)
    with Names():
        attend(out)
    assert seen == ["vstar_kernels.attention.default", "aten.copy_.default"]
    assert torch.equal(out, expected)


def test_mapped_over(expected):
    queries, outs = torch.stack([Q, 2 * Q]), torch.empty(2, *Q.shape)
    torch.func.vmap(attend)(outs, queries)
    torch.testing.assert_close(outs[0], expected)
    torch.testing.assert_close(outs[1], vk.tar_attention(2 * Q, K, V, BIAS))
    with pytest.raises(RuntimeError, match="vmap: inplace"):  # as torch says of its own operations
        torch.func.vmap(lambda query: attend(torch.empty_like(Q), query))(queries)


def test_a_gradient_of_torch_func_is_refused():
    def loss(query):
        return attend(torch.empty_like(Q), query).sum()

    with pytest.raises(ValueError, match="out= has no gradient, and query requires one"):
        torch.func.grad(loss)(Q)


def test_meta_tensors():
    meta = Q.to("meta")
    out = torch.empty_like(meta)
    assert vk.tar_attention(meta, meta, meta, BIAS, out=out) is out


def test_another_class_of_tensor_is_copied_to(monkeypatch, expected):
    class Watched(torch.Tensor):
        """One that a backend may not write behind the back of."""

    seen = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda call, **_: seen.append(call.out) or forward(call))
    out = torch.empty_like(Q).as_subclass(Watched)
    assert attend(out) is out
    assert seen == [None]
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
