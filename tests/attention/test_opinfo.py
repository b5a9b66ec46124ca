"""PyTorch's own samples for scaled_dot_product_attention, through the operations.

They have three queries and six keys. ``column_attention`` and ``frame_attention`` take them as
they are, a token of the samples being a frame; ``tar_attention`` takes as many keys as there are
queries. A mask is a bias of 0 and −∞. What none of the operations has is dropout.
"""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vstar_kernels as vk
from vstar_kernels.attention import native

pytest.importorskip("expecttest")  # which PyTorch's samples are made with
from torch.testing._internal.common_methods_invocations import (
    sample_inputs_scaled_dot_product_attention,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::vstar_kernels.SlowBackendWarning"),
    pytest.mark.usefixtures("one_thread"),
]
OPERATIONS = ("tar_attention", "frame_attention", "column_attention")


class Sample:
    """A sample as an operation takes it: heads beside the tokens, and its mask."""

    def __init__(
        self, query, key, value, *, attn_mask=None, is_causal=False, dropout_p=0.0, enable_gqa=False
    ):  # enable_gqa changes nothing: of each sample all tensors have as many heads
        # (…, heads, tokens, head_dim); without heads, one; without a batch, the others'.
        tensors = [x.unsqueeze(1) if key.ndim == 3 else x for x in (query, key, value)]
        batch = tensors[1].shape[0]
        self.tensors = [
            x.expand(batch, *x.shape[-3:]).transpose(1, 2).detach().clone() for x in tensors
        ]
        self.mask, self.dropout = attn_mask, dropout_p
        queries, keys = query.shape[-2], key.shape[-2]
        if is_causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            self.mask = torch.zeros(queries, keys).masked_fill(hidden, -math.inf)

    def square(self):
        """The same with as many keys as there are queries."""
        queries = self.tensors[0].shape[1]
        self.tensors = [x[:, :queries] for x in self.tensors]
        self.mask = None if self.mask is None else self.mask[:, :queries]

    def sdpa(self, query, key, value):
        """What PyTorch computes, in float64 and by the formula."""
        mask = None if self.mask is None else self.mask.double()
        given = [x.double().transpose(1, 2) for x in (query, key, value)]
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*given, attn_mask=mask).transpose(1, 2)

    @property
    def options(self):
        """What tells one sample from another, but for its numbers."""
        shapes = tuple(tuple(x.shape) for x in self.tensors)
        return shapes, None if self.mask is None else tuple(self.mask.flatten().tolist())


def attend(operation, sample):
    """The operation as a function of query, key and value; None where it has no such mask."""
    mask = sample.mask
    if operation == "tar_attention":
        bias = None if mask is None else vk.DenseBias(mask, stat="none")
        return lambda *tensors: vk.tar_attention(*tensors, bias)
    queries, keys = (x.shape[1] for x in sample.tensors[:2])
    if operation == "frame_attention":
        rule = vk.FrameRule() if mask is None else vk.FrameRule.bias(mask)
        layouts = vk.Layout(vk.Frames(queries, 1)), vk.Layout(vk.Frames(keys, 1))
        return lambda *tensors: vk.frame_attention(
            *tensors, layouts[0], rule, key_layout=layouts[1]
        )
    if mask is not None:
        return None
    columns = torch.eye(keys)[:, :1]
    return lambda *tensors: vk.column_attention(*tensors, columns)[0]


@pytest.fixture(scope="module")
def samples():
    """All of PyTorch's."""
    torch.manual_seed(0)
    made = sample_inputs_scaled_dot_product_attention(None, "cpu", torch.float32, False)
    return [Sample(x.input, *x.args, **x.kwargs) for x in made]


@pytest.fixture(params=OPERATIONS)
def cases(request, samples):
    """(sample, function) of each that an operation takes."""
    taken, refused = [], Counter()
    for sample in samples:
        if sample.dropout:
            refused["dropout"] += 1
            continue
        if request.param == "tar_attention":
            sample.square()
        function = attend(request.param, sample)
        if function is None:
            refused["masks"] += 1
        else:
            taken.append((sample, function))
    # Of 25: each of three shapes four times without dropout, twice of these causal, and a mask.
    assert refused["dropout"] == 12
    assert len(taken) == (6 if request.param == "column_attention" else 13)
    assert len(taken) + refused.total() == len(samples) == 25
    return taken


@pytest.fixture
def different(cases):
    """Those of the cases that differ by more than their numbers."""
    found = {sample.options: (sample, function) for sample, function in cases}
    assert len(found) >= 2
    return list(found.values())


def gradients(function, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return out, torch.autograd.grad(out.square().sum(), leaves)


def near(found, expected):
    """In float32; the samples' logits are in the hundreds."""
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_forward_and_gradients(cases):
    for sample, function in cases:
        found, expected = (gradients(f, sample.tensors) for f in (function, sample.sdpa))
        near(found, expected)


def test_forward_mode(cases):
    for sample, function in cases:
        tangents = tuple(torch.randn_like(x) for x in sample.tensors)
        with forward_ad.dual_level():
            pairs = zip(sample.tensors, tangents, strict=True)
            duals = [forward_ad.make_dual(x, tangent) for x, tangent in pairs]
            found = forward_ad.unpack_dual(function(*duals))
            expected = forward_ad.unpack_dual(sample.sdpa(*duals))
        near((found.primal, found.tangent), (expected.primal, expected.tangent))


def test_vmap(different):
    for sample, function in different:
        many = [torch.stack([x, x.flip(0), -x]) for x in sample.tensors]
        for dims in ((0, 0, 0), (0, None, None)):
            given = [x if d == 0 else x[1] for x, d in zip(many, dims, strict=True)]
            found, expected = (torch.vmap(f, dims)(*given) for f in (function, sample.sdpa))
            near(found, expected)


@torch._dynamo.config.patch(recompile_limit=64)
def test_compile(different):
    torch._dynamo.reset()
    for sample, function in different:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        found, expected = (gradients(f, sample.tensors) for f in (compiled, sample.sdpa))
        near(found, expected)


class Noted(TorchDispatchMode):
    """Notes the operators of ours that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vstar_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(bool(native.load().problems), reason="the reference is no operator")
def test_opcheck(different):
    """Of the very arguments that the operators are called with, forward and backward."""
    for sample, function in different[-1:]:
        with Noted() as noted:
            gradients(function, sample.tensors)
        (forward, given), (backward, also_given) = noted.calls
        given, also_given = (
            [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            for arguments in (given, also_given)
        )
        torch.library.opcheck(backward, also_given)  # it has no derivative
        torch.library.opcheck(forward, [*(x.requires_grad_() for x in given[:3]), *given[3:]])
