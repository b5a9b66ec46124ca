"""frame_attention itself: its arguments, its choice, and what it is equal to, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.frames import reference

R = vk.FrameRule
LAYOUT = vk.Layout(vk.Text(2), vk.Frames(3, 4), vk.Text(1))
BACKENDS = [
    name for name, module in dispatch.FRAME_ATTENTION.backends.items() if not module.unavailable()
]


def inputs(tokens=LAYOUT.tokens, heads=4, key_heads=2, dim=16, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, h, dim) for h in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator) for s in shapes]


@pytest.fixture(params=BACKENDS)
def attend(request):
    """frame_attention on each backend that runs here; what one cannot take is skipped."""

    def run(query, key, value, layout, rule=None, **options):
        module = dispatch.FRAME_ATTENTION.backends[request.param]
        call = dispatch.check_frame_call(query, key, value, layout, rule, **options)
        if reasons := module.why_not(call):
            pytest.skip(f"{request.param}: {'; '.join(reasons)}")
        return vk.frame_attention(query, key, value, layout, rule, **options, backend=request.param)

    return run


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def sdpa(q, k, v, **options):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return out.transpose(1, 2).float()


# ---- identities ----


@pytest.mark.parametrize("stat", ["frame_max", "row_max", "none"])
@pytest.mark.parametrize("clamp", [False, True])
def test_one_token_a_frame_is_tar_attention(attend, stat, clamp):
    q, k, v = inputs(9, key_heads=4)
    expected = vk.tar_attention(
        q, k, v, vk.GaussianBias(1.3, strength=0.8, clamp_negative=clamp,
        stat="none" if stat == "none" else "row_max"), return_map=True, backend="reference",
    )  # fmt: skip
    rule = R.tar(1.3, 0.8, stat, clamp)
    out, mean_map = attend(q, k, v, vk.Layout(vk.Frames(9, 1)), rule, return_map=True)
    close(out, expected[0])
    close(mean_map, F.pad(expected[1], (0, 1)))


@pytest.mark.parametrize("stat", ["frame_max", "row_max"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_repeated_tokens_are_tar_attention_on_the_frames(attend, stat, tokens):
    q, k, v = inputs(7, key_heads=4)
    expected, expected_map = vk.tar_attention(
        q, k, v, vk.GaussianBias(1.0), return_map=True, backend="reference"
    )
    repeated = [x.repeat_interleave(tokens, 1) for x in (q, k, v)]
    layout = vk.Layout(vk.Frames(7, tokens))
    out, mean_map = attend(*repeated, layout, R.tar(1.0, stat=stat), return_map=True)
    close(out, expected.repeat_interleave(tokens, 1))
    close(mean_map[..., :-1], expected_map)


@pytest.mark.parametrize("rule", [None, R(), R.tar(1.0, 0.0), R.window(2), R.attenuate(1.0, 0)])
def test_what_changes_nothing_is_sdpa(attend, rule):
    q, k, v = inputs()
    close(attend(q, k, v, LAYOUT, rule), sdpa(q, k, v))


def test_a_negative_or_given_scale(attend):
    q, k, v = inputs()
    for scale in (0.3, -0.2):
        close(attend(q, k, v, LAYOUT, scale=scale), sdpa(q, k, v, scale=scale))


@pytest.mark.parametrize(
    "rule", [R.tar(1.0), R.tar(1.0, stat="row_max"), R.window(1, sink=1), R.attenuate(0.5, 2)]
)
def test_the_order_of_frames_does_not_matter(attend, rule):
    """Frames, with their coordinates, may lie in any order."""
    q, k, v = inputs(5 * 6)
    order = [3, 0, 4, 2, 1]
    moved = [x.unflatten(1, (5, 6))[:, order].flatten(1, 2) for x in (q, k, v)]
    shuffled = vk.Layout(*(vk.Frames(1, 6, first=frame) for frame in order))
    out, mean_map = attend(q, k, v, vk.Layout(vk.Frames(5, 6)), rule, return_map=True)
    other, other_map = attend(*moved, shuffled, rule, return_map=True)
    close(other, out.unflatten(1, (5, 6))[:, order].flatten(1, 2))
    close(other_map, mean_map[:, order][:, :, [*order, 5]])


@pytest.mark.parametrize("w", [0, 1, 2])
def test_windows_are_sdpa_on_the_keys_that_they_keep(attend, w):
    layout = vk.Layout(vk.Text(3), vk.Frames(5, 6), vk.Text(4))
    q, k, v = inputs(layout.tokens)
    out = attend(q, k, v, layout, R.window(w))
    close(out[:, :3], sdpa(q[:, :3], k, v))
    for f in range(5):
        first, last = max(0, f - w), min(4, f + w)
        kept = [0, 1, 2, *range(3 + 6 * first, 3 + 6 * (last + 1)), 33, 34, 35, 36]
        rows = slice(3 + 6 * f, 9 + 6 * f)
        close(out[:, rows], sdpa(q[:, rows], k[:, kept], v[:, kept]))


def test_key_lengths_are_sdpa_on_the_keys_that_exist(attend):
    q, k, v = inputs()
    lengths = torch.tensor([5, 13], dtype=torch.int32)
    out = attend(q, k, v, LAYOUT, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        close(out[one], sdpa(q[one], k[one, :length], v[one, :length]))


def test_key_lengths_of_any_strides(attend):
    lengths = torch.tensor([[9, 1], [4, 2]], dtype=torch.int32)[:, 0]
    close(
        attend(*inputs(), LAYOUT, R.tar(1.0), key_lengths=lengths),
        attend(*inputs(), LAYOUT, R.tar(1.0), key_lengths=lengths.clone()),
    )
    same = torch.tensor(4, dtype=torch.int32).expand(2)
    close(
        attend(*inputs(), LAYOUT, key_lengths=same),
        attend(*inputs(), LAYOUT, key_lengths=same.clone()),
    )
    q, k, v = inputs()

    def one(*tensors):  # a batch of one, whose length vmap expands
        return attend(*(x[None] for x in tensors), LAYOUT, key_lengths=lengths[:1])[0]

    close(torch.func.vmap(one)(q, k, v), attend(q, k, v, LAYOUT, key_lengths=same + 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_results_do_not_depend_on_default_types_and_devices(attend, dtype, device):
    """No call, whatever was the default at the first one for a σ, whose constants are kept."""
    q, k, v = inputs()
    rule = R.tar(0.71 + dtype.itemsize / 64 + len(device) / 256)  # of this test
    expected = reference.frame_attention(q, k, v, LAYOUT, rule, return_map=True)
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        found = attend(q, k, v, LAYOUT, rule, return_map=True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for result in (found, attend(q, k, v, LAYOUT, rule, return_map=True)):
        for x, wanted in zip(result, expected, strict=True):
            assert (x.dtype, x.device) == (torch.float32, q.device)
            close(x, wanted)


def test_no_gradient_of_a_table_comes_from_the_meta_device():
    meta = [x.to("meta") for x in inputs()]
    with pytest.raises(ValueError, match=r"on the meta device, where the table of FrameRule\.bias"):
        vk.frame_attention(*meta, LAYOUT, R.bias(torch.ones(3, 3, requires_grad=True)))
    with torch.no_grad():
        out = vk.frame_attention(*meta, LAYOUT, R.bias(torch.ones(3, 3, requires_grad=True)))
    assert out.is_meta


def test_nan_in_a_trained_table_is_no_mask(attend):
    """A bias whose training has failed shows in the output."""
    table = torch.zeros(3, 3).index_fill_(0, torch.tensor(1), math.nan).requires_grad_()
    with torch.no_grad():
        out = attend(*inputs(), LAYOUT, R.bias(table))
    of_frame = torch.zeros(15, dtype=torch.bool)
    of_frame[6:10] = True  # after 2 of text and a frame of 4
    assert out[:, of_frame].isnan().all()
    assert out[:, ~of_frame].isfinite().all()


FAR = {
    "alone": R(),
    "a band": R.band(2),
    "row_max": R.tar(1.0, 0.8, stat="row_max"),
    "frame_max": R.tar(1.0, 0.8),
}


@pytest.mark.parametrize("lengths", [None, [28, 20]])
@pytest.mark.parametrize("name", FAR)
def test_rows_far_below_lose_nothing(attend, name, lengths):
    """As those of padding, which all frames are hidden from by −10⁹."""
    layout = vk.Layout(vk.Frames(4, 7))
    table = -torch.tensor([[0, 1, 2, 3], [3, 1, 0, 1], [0, 0, 0, 0], [2, 1, 0, math.inf]]).double()
    far = table - torch.tensor([[0.0], [1e6], [2.5e38], [1e4]], dtype=torch.float64)
    gradient_weight, map_weight = torch.randn(2, 28, 4, 16), torch.randn(2, 4, 5)
    options = {"key_lengths": lengths and torch.tensor(lengths, dtype=torch.int32)}

    def results(table):
        tensors = [x.requires_grad_() for x in inputs(28)]
        rule = R.bias(table) + FAR[name]
        out, mean_map = attend(*tensors, layout, rule, **options, return_map=True)
        loss = (out * gradient_weight).sum() + (mean_map * map_weight).sum()
        return out, mean_map, *torch.autograd.grad(loss, tensors)

    for found, expected in zip(results(far), results(table), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", [R(), R.band(2)], ids=["alone", "a band"])
def test_rows_of_which_only_what_is_far_below_is_left_lose_nothing(attend, rule):
    """The frame that has no bias of −10⁹ is beyond the keys' lengths."""
    layout = vk.Layout(vk.Frames(4, 7))
    far = torch.full((4, 4), -1e9)
    far[:, 3] = 0
    options = {"key_lengths": torch.tensor([21, 8], dtype=torch.int32), "return_map": True}
    found = attend(*inputs(28), layout, R.bias(far) + rule, **options)
    expected = attend(*inputs(28), layout, rule, **options)
    for x, y in zip(found, expected, strict=True):
        close(x, y)


def test_a_row_without_keys_is_zero(attend):
    q, k, v = inputs()
    lengths = torch.tensor([0, LAYOUT.tokens], dtype=torch.int32)
    out, mean_map = attend(q, k, v, LAYOUT, R.tar(1.0), key_lengths=lengths, return_map=True)
    assert not out[0].any()
    assert not mean_map[0].any()
    close(mean_map[1].sum(-1), torch.ones(3))
    layout = vk.Layout(vk.Frames(3, 4))
    nothing = torch.full((3, 3), -math.inf)
    nothing[1] = 0
    out = attend(*(x[:, :12] for x in (q, k, v)), layout, R.bias(nothing))
    assert not out[:, :4].any()
    assert not out[:, 8:].any()
    assert out[:, 4:8].all()


def test_rows_of_the_map_sum_to_one_and_its_heads_average(attend):
    q, k, v = inputs()
    rule = R.tar(1.0) + R.window(1)
    _, mean_map = attend(q, k, v, LAYOUT, rule, return_map=True)
    _, by_head = attend(q, k, v, LAYOUT, rule, return_map=True, map_heads=True)
    assert mean_map.shape == (2, 3, 4)
    assert by_head.shape == (2, 4, 3, 4)
    close(mean_map.sum(-1), torch.ones(2, 3))
    close(by_head.mean(1), mean_map)
    assert not mean_map[:, 0, 2].any()


def test_more_strength_keeps_to_the_own_frame(attend):
    q, k, v = inputs(40, seed=1)
    layout = vk.Layout(vk.Frames(5, 8))
    own = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        rule = R.tar(1.0, strength, clamp_negative=True)
        _, mean_map = attend(q, k, v, layout, rule, return_map=True)
        own.append(mean_map.diagonal(dim1=-2, dim2=-1).mean().item())
    assert own == sorted(own)
    assert own[-1] > own[0] + 0.05
    far = attend(q, k, v, layout, R.tar(0.0, 60.0, "none"))
    close(far, attend(q, k, v, layout, R.window(0)))


def test_a_sum_of_rules(attend):
    """A window and a bias are the bias with −inf outside of the window."""
    q, k, v = inputs()
    table = torch.randn(3, 3)
    near = (torch.arange(3)[:, None] - torch.arange(3)).abs() <= 1
    one = attend(q, k, v, LAYOUT, R.window(1) + R.bias(table))
    close(one, attend(q, k, v, LAYOUT, R.bias(table.masked_fill(~near, -math.inf))))


def test_text_is_left_alone(attend):
    """Its rows are plain attention, whatever the rule."""
    q, k, v = inputs()
    rule = R.tar(1.0) + R.window(0)
    out = attend(q, k, v, LAYOUT, rule)
    text = [0, 1, LAYOUT.tokens - 1]
    close(out[:, text], sdpa(q[:, text], k, v))


def test_outputs_are_laid_as_torch_lays_them(attend):
    q, k, v = inputs()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert attend(q, k, v, LAYOUT).stride() == torch.empty_like(q).stride()


def test_an_empty_batch(attend):
    q, k, v = (x[:0] for x in inputs())
    out, mean_map = attend(q, k, v, LAYOUT, R.tar(1.0), return_map=True)
    assert out.shape == q.shape
    assert mean_map.shape == (0, 3, 4)
    q.requires_grad_()
    attend(q, k, v, LAYOUT).sum().backward()
    assert q.grad.shape == q.shape


# ---- the identity rule ----


def test_identity_is_the_values():
    q, k, v = inputs()
    out, mean_map = vk.frame_attention(q, k, v, LAYOUT, R.identity(), return_map=True)
    assert torch.equal(out, v.repeat_interleave(2, dim=2))
    assert torch.equal(mean_map, F.pad(torch.eye(3), (0, 1)).expand(2, 3, 4))
    lengths = torch.tensor([4, 0], dtype=torch.int32)
    out, by_head = vk.frame_attention(
        q, k, v, LAYOUT, R.identity(), key_lengths=lengths, return_map=True, map_heads=True
    )
    assert torch.equal(out[0, :4], v[0, :4].repeat_interleave(2, dim=1))
    assert not out[0, 4:].any()
    assert not out[1].any()
    assert by_head[0, :, 0].tolist() == [[0.5, 0, 0, 0]] * 4
    assert by_head.sum() == 2
    v.requires_grad_()
    vk.frame_attention(q, k, v, LAYOUT, R.identity()).sum().backward()
    assert torch.equal(v.grad, torch.full_like(v, 2.0))


def test_identity_is_a_call_like_others():
    """Its backend's name is checked, and every backend says that nothing is against it."""
    with pytest.raises(ValueError, match="backend must be one of"):
        vk.frame_attention(*inputs(), LAYOUT, R.identity(), backend="cpuu")
    reasons = vk.backends.why_not_frames(*inputs(), LAYOUT, R.identity())
    assert reasons == {name: [] for name in dispatch.FRAME_ATTENTION.backends}
    with pytest.raises(ValueError, match="needs keys that are the queries' own"):
        vk.backends.why_not_frames(
            *inputs(), LAYOUT, R.identity(), key_layout=vk.Layout(vk.Frames(15, 1))
        )
    with pytest.raises(ValueError, match=r"identity\(\) has no tables"):
        reference.frame_attention(*inputs(), LAYOUT, R.identity())


def test_identity_needs_its_own_keys():
    q, k, v = inputs()
    other = vk.Layout(vk.Frames(3, 5))
    with pytest.raises(ValueError, match="keys that are the queries' own"):
        vk.frame_attention(q, k, v, LAYOUT, R.identity(), key_layout=other)


# ---- the choice of a backend ----


def test_every_backend_is_named():
    names = list(dispatch.FRAME_ATTENTION.backends)
    assert names[-1] == "reference"
    assert set(names) <= set(vk.backends.available())
    reasons = vk.backends.why_not_frames(*inputs(), LAYOUT, R.tar(1.0), return_map=True)
    assert list(reasons) == names
    assert reasons["reference"] == []


def test_an_explicit_choice_never_falls_back(monkeypatch):
    class Refuses:
        unavailable = staticmethod(list)

        @staticmethod
        def why_not(call):
            return [f"takes 1 frame, query has {call.frames}"]

    monkeypatch.setattr(
        dispatch.FRAME_ATTENTION, "backends", {"one": Refuses, "reference": reference}
    )
    with pytest.raises(ValueError) as error:
        vk.frame_attention(*inputs(), LAYOUT, R.tar(1.0), key_lengths=torch.tensor([3, 4]).int(),
                           backend="one")  # fmt: skip
    for part in [
        "backend 'one' cannot run this call", "takes 1 frame, query has 3", "query: (2, 15, 4, 16)",
        "key_lengths: (2,)", "3 of queries", "stat: frame_max",
    ]:  # fmt: skip
        assert part in str(error.value)
    dispatch._warn_once.cache_clear()
    with pytest.warns(vk.SlowBackendWarning, match="frame_attention runs on the slow.*\n.*1 frame"):
        vk.frame_attention(*inputs(), LAYOUT, R.tar(1.0))
    dispatch._warn_once.cache_clear()
    with pytest.raises(ValueError, match="backend must be one of 'one', 'reference' or None"):
        vk.frame_attention(*inputs(), LAYOUT, backend="cpuu")


# ---- bad arguments ----

BAD = {
    "query must be .batch, tokens": lambda q, k, v: ((q[0], k, v, LAYOUT), {}),
    r"query must be float32.*got torch.int64": lambda q, k, v: ((q.long(), k, v, LAYOUT), {}),
    "got torch.float8_e4m3fn: scale fp8 tensors back": lambda q, k, v: (
        (q.to(torch.float8_e4m3fn), k, v, LAYOUT), {},
    ),
    r"batch 2 and head_dim 16, got shape \(1, 15": lambda q, k, v: ((q, k[:1], v, LAYOUT), {}),
    r"head_dim 16, got shape .*, 8\)": lambda q, k, v: ((q, k[..., :8], v, LAYOUT), {}),
    "must divide query's 4, got 3": lambda q, k, v: (
        (q, torch.zeros(2, 15, 3, 16), torch.zeros(2, 15, 3, 16), LAYOUT), {},
    ),
    "value must have key's shape": lambda q, k, v: ((q, k, v[:, :14], LAYOUT), {}),
    "key must have query's type torch.float32, got torch.bf": lambda q, k, v: (
        (q, k.bfloat16(), v, LAYOUT), {},
    ),
    "value must be on query's device cpu, got meta": lambda q, k, v: (
        (q, k, v.to("meta"), LAYOUT), {},
    ),
    r"query's 15 tokens, Layout\(Frames\(3, 4\)\) adds up to 12": lambda q, k, v: (
        (q, k, v, vk.Layout(vk.Frames(3, 4))), {},
    ),
    "key has 12 tokens and query 15: give key_layout": lambda q, k, v: (
        (q, k[:, :12], v[:, :12], LAYOUT), {},
    ),
    "key's 12 tokens, .* adds up to 15": lambda q, k, v: (
        (q, k[:, :12], v[:, :12], LAYOUT), {"key_layout": LAYOUT},
    ),
    r"shape \(batch,\), \(2,\), got \(1,\)": lambda q, k, v: (
        (q, k, v, LAYOUT), {"key_lengths": torch.tensor([3], dtype=torch.int32)},
    ),
    "key_lengths must be int32, got torch.int64": lambda q, k, v: (
        (q, k, v, LAYOUT), {"key_lengths": torch.tensor([3, 4])},
    ),
    "key_lengths must be an ordinary .strided. tensor": lambda q, k, v: (
        (q, k, v, LAYOUT), {"key_lengths": torch.tensor([3, 4]).int().to_sparse()},
    ),
    "key_lengths must be on query's device cpu, got meta": lambda q, k, v: (
        (q, k, v, LAYOUT), {"key_lengths": torch.zeros(2, dtype=torch.int32, device="meta")},
    ),
    "scale must be finite.*got nan": lambda q, k, v: ((q, k, v, LAYOUT), {"scale": math.nan}),
    "map_heads=True needs return_map": lambda q, k, v: ((q, k, v, LAYOUT), {"map_heads": True}),
    "for 2 frames of queries and 3 of keys": lambda q, k, v: (
        (q, k, v, LAYOUT, R.bias(torch.zeros(2, 3))), {},
    ),
    "has 3 heads, query has 4": lambda q, k, v: (
        (q, k, v, LAYOUT, R.bias(torch.ones(3, 3, 3), stat="row_max")), {},
    ),
    r"without head_dim, \(2, 15, 4\), got \(2, 15, 2\)": lambda q, k, v: (
        (q, k, v, LAYOUT, R.tar(1.0, stat=torch.zeros(2, 15, 2))), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments, options = BAD[message](*inputs())
    with pytest.raises(ValueError, match=message):
        vk.frame_attention(*arguments, **options)
    with pytest.raises(ValueError, match=message):
        vk.backends.why_not_frames(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": [1.0]}, "query must be a torch.Tensor, got list"),
        ({"layout": 15}, "layout must be a Layout, got int"),
        ({"key_layout": 15}, "key_layout must be a Layout or None, got int"),
        ({"rule": "tar"}, "rule must be a FrameRule or None, got str"),
        ({"key_lengths": [3, 4]}, "key_lengths must be a torch.Tensor or None, got list"),
        ({"scale": "1"}, "scale must be a number, got str"),
        ({"return_map": 1}, "return_map must be True or False, got int"),
    ],
)
def test_wrong_kinds(arguments, message):
    given = dict(zip(("query", "key", "value"), inputs(), strict=True)) | {"layout": LAYOUT}
    with pytest.raises(TypeError, match=message):
        vk.frame_attention(**{**given, **arguments})


# ---- memory ----


def test_the_reference_holds_no_map(monkeypatch):
    """No tensor of a call is as large as all pairs of tokens."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    monkeypatch.setattr(reference, "CHUNK", 2**14)
    layout = vk.Layout(vk.Frames(8, 64), vk.Text(3))
    q, k, v = inputs(layout.tokens, heads=2, dim=8, batch=1)
    call = dispatch.check_frame_call(
        q, k, v, layout, R.tar(1.0) + R.attenuate(0.5, 2) + R.band(9), return_map=True
    )
    with Watch():
        reference.forward(call)
    assert largest <= 2**15
    assert 2 * layout.tokens**2 > 2**18
