"""Frame rules over attention that returns its log-sum-exp: PyTorch's for CPUs, and stand-ins."""

import dataclasses
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.pairwise import pairwise
from vstar_kernels.attention.frames import composed, engines, reference
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.testing import assert_frames, largest_error

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINES = {engine.name: engine for engine in engines.ENGINES}
CPU = ENGINES["flash for CPUs"]
ATEN = ("cudnn", "flash", "efficient")
R = vk.FrameRule
VIDEO = vk.Layout(vk.Text(3), vk.Frames(6, 7), vk.Text(2))
# What the merge does not express; the other cases of all backends are its own.
BEYOND = ("row_max", "attenuate", "band", "radial", "tokens")
OPTIONS = cases.OPTIONS | {
    "rule": [x for x in cases.RULES if not any(y in x for y in BEYOND)],
    "tokens": [1, 7, 40],
}


def make_call(rule=None, layout=VIDEO, *, batch=2, dtype=torch.float32, **options):
    """A call on random tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, layout.tokens, heads, 16) for heads in (4, 2, 2)]
    inputs = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return check_call(*inputs, layout, rule, **options)


def with_inputs(call, change):
    """The call with changed query, key and value."""
    query, key, value = map(change, (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value)


def exactly(call):
    """The oracle's result for a call."""
    return reference.forward(with_inputs(call, torch.Tensor.double))


def ranges(rule, layout=VIDEO, **options):
    """What is computed: the ranges of queries, and of the keys that each attends to."""
    call = make_call(rule, layout, **options)
    return {
        (block.start, block.end): [(part.start, part.end) for part in block.parts]
        for block in composed.plan(call, call.keys)
    }


# ---- results ----


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=cases.identify)
def test_options(case, monkeypatch):
    monkeypatch.setattr(composed, "empty_like", lambda x: torch.full_like(x, cases.NAN))
    monkeypatch.setattr(composed, "MOST_PARTIAL_BYTES", 2**13)  # several pieces of a frame
    monkeypatch.setattr(composed, "FEWEST_ROWS", 5)
    arguments, options = cases.make(case)
    found = vk.frame_attention(*arguments, **options, backend="composed")
    if options["return_map"] and case["dtype"] != torch.float32:
        # In 16 bits the engine's exponentials are coarser: a weight is off by up to 1e-4 of itself.
        expected = exactly(check_call(*arguments, **options)).mean_map
        assert largest_error(found[1], expected) <= 1e-4
        found = found[0]
        del options["return_map"], options["map_heads"]
    assert_frames(found, *arguments, **options)


@pytest.mark.parametrize("name", OPTIONS["rule"])
def test_a_rule_errs_at_most_twice_as_much_as_its_engine_without(name):
    layout = vk.Layout(vk.Text(9), vk.Frames(5, 40))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = make_call(cases.RULES[name](layout, None, 4), layout, dtype=dtype)
        plain = make_call(None, layout, dtype=dtype)
        theirs = largest_error(composed.forward(plain).out, exactly(plain).out)
        error = largest_error(composed.forward(call).out, exactly(call).out)
        rounding = torch.finfo(dtype).eps * call.value.abs().max().item()  # of the merged output
        assert error <= 2 * theirs + rounding, f"{error:.3g} and {theirs:.3g} in {dtype}"


@pytest.mark.parametrize("name", OPTIONS["rule"])
def test_the_merge_is_exact(name):
    """In float64, by an engine in float64; tables and counts are float32."""
    call = make_call(cases.RULES[name](VIDEO, None, 4), dtype=torch.float64, return_map=True)
    found, expected = composed.forward_by(CPU, call), exactly(call)
    assert largest_error(found.out, expected.out) < 1e-6
    assert largest_error(found.mean_map, expected.mean_map) < 1e-6


def test_a_given_statistic_weighs_the_bias():
    stat = torch.randn(2, VIDEO.tokens, 4, generator=torch.Generator().manual_seed(1))
    for clamp in (False, True):
        call = make_call(R.tar(1.0, stat=stat, clamp_negative=clamp))
        assert largest_error(composed.forward(call).out, exactly(call).out) < 1e-5


def test_frames_that_a_head_does_not_see_do_not_count_for_its_statistic():
    table = cases.masked(cases.table(VIDEO, None, 4))
    table[2, 1] = -torch.inf  # no frame at all
    call = make_call(R.tar(1.0, 3.0) + R.bias(table), return_map=True)
    assert largest_error(composed.forward(call).out, exactly(call).out) < 1e-5
    assert largest_error(composed.forward(call).mean_map, exactly(call).mean_map) < 1e-5


def test_a_trained_table_may_be_a_transposed_view():
    table = cases.table(VIDEO, None).T.requires_grad_()
    with torch.no_grad():
        call = make_call(R.bias(table, stat="frame_max") + R.bias(table))
        assert largest_error(composed.forward(call).out, exactly(call).out) < 1e-5


def test_a_row_of_masked_heads_and_no_text_is_zero():
    table = torch.zeros(4, 2, 2)
    table[1, 0] = -torch.inf
    call = make_call(R.bias(table), vk.Layout(vk.Frames(2, 5)), return_map=True)
    out, frame_map, _ = composed.forward(call)
    assert out[:, :5, 1].count_nonzero() == 0
    assert largest_error(out, exactly(call).out) < 1e-5
    assert largest_error(frame_map, exactly(call).mean_map) < 1e-6


# ---- which calls are made of an engine ----


@pytest.mark.parametrize("lengths", [None, [28, 20]])
def test_a_large_bias_of_all_keys_of_a_row_changes_no_weight(lengths):
    """Beside it the logits would be rounded away. A length cuts off the one frame without it."""
    layout = vk.Layout(vk.Frames(4, 7))
    table = torch.zeros(4, 4)
    table[1], table[2], table[3, :3] = -1e9, 1e9, -1e9
    tensors = torch.randn(3, 2, 28, 2, 16)
    options = {
        "return_map": True,
        "key_lengths": lengths and torch.tensor(lengths, dtype=torch.int32),
    }
    found = vk.frame_attention(*tensors, layout, R.bias(table), **options, backend="composed")
    expected = vk.frame_attention(
        *tensors.double(), layout, R.bias(table), **options, backend="reference"
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)


def test_without_a_rule_there_is_one_call():
    assert ranges(None) == {(0, 47): [(0, 47)]}
    assert ranges(R.tar(1.0, strength=0.0)) == {(0, 47): [(0, 47)]}


def test_frames_with_the_same_constants_are_one_call():
    found = ranges(R.window(1))
    assert found[0, 3] == found[45, 47] == [(0, 47)]  # text attends to all
    assert found[3, 10] == [(0, 17), (45, 47)]
    assert found[17, 24] == [(0, 3), (10, 31), (45, 47)]
    causal = ranges(R.causal(2), vk.Layout(vk.Frames(6, 7)))
    assert causal == {(0, 14): [(0, 14)], (14, 28): [(0, 28)], (28, 42): [(0, 42)]}


def test_every_frame_is_one_call_where_its_log_sum_exp_is_wanted():
    frames = [(3 + 7 * i, 10 + 7 * i) for i in range(6)]
    text = [(0, 3), (45, 47)]
    for options in ({"rule": R.tar(1.0)}, {"rule": None, "return_map": True}):
        found = ranges(**options)
        assert found[3, 10] == sorted(frames + text)
        assert found[0, 3] == [(0, 47)]


def test_a_gaussian_ends_where_it_is_lost_in_rounding():
    long = vk.Layout(vk.Frames(40, 2))
    found = ranges(R.tar(1.0, stat="none"), long)
    assert found[0, 2] == [(2 * i, 2 * i + 2) for i in range(7)] + [(14, 80)]


@pytest.mark.parametrize("name", OPTIONS["rule"])
@pytest.mark.parametrize("return_map", [False, True])
def test_every_visible_pair_is_computed_once(name, return_map):
    call = make_call(cases.RULES[name](VIDEO, None, 4), return_map=return_map)
    counts = torch.zeros(47, 47)
    for (start, end), keys in ranges(cases.RULES[name](VIDEO, None, 4)).items():
        for low, high in keys:
            counts[start:end, low:high] += 1
    frames = torch.cat([torch.full((3,), -1), torch.arange(6).repeat_interleave(7), -torch.ones(2)])
    expected = torch.ones(47, 47)
    if call.offset is not None:
        shown = (call.offset > -torch.inf).reshape(-1, 6, 6).any(0)
        f, g = frames.long()[:, None], frames.long()
        expected = torch.where((f >= 0) & (g >= 0), shown[f, g].float(), expected)
    assert torch.equal(counts, expected)


def test_long_runs_are_computed_in_equal_pieces(monkeypatch):
    call = make_call(R.tar(1.0), vk.Layout(vk.Frames(2, 1000)))
    block, *_ = composed.plan(call, call.keys)
    assert list(composed._pieces(call, block)) == [(0, 1000)]
    monkeypatch.setattr(composed, "MOST_PARTIAL_BYTES", 2 * 2 * 4 * 16 * 4 * 400)
    assert list(composed._pieces(call, block)) == [(0, 333), (333, 666), (666, 1000)]
    monkeypatch.setattr(composed, "MOST_PARTIAL_BYTES", 1)
    assert len(list(composed._pieces(call, block))) == 1000 // composed.FEWEST_ROWS


# ---- what it cannot do ----


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (R.tar(1.0, stat="row_max"), "knows no single logits, the rule's statistic is 'row_max'"),
        (R.attenuate(0.5, 2), "weights whole frames of keys, the rule has a factor"),
        (R.band(2), "weights whole frames of keys, the rule has a band"),
    ],
)
def test_rules_that_act_on_single_logits(rule, reason):
    assert composed.why_not(make_call(rule)) == [reason]


def test_gradients():
    call = make_call(R.tar(1.0))
    call.key.requires_grad_()
    assert composed.why_not(call) == ["computes no gradients, and a tensor requires one"]
    with torch.no_grad():
        assert composed.why_not(call) == []
    table = torch.zeros(6, 6, requires_grad=True)
    assert composed.why_not(make_call(R.bias(table)))
    with pytest.raises(NotImplementedError, match="'composed' computes no gradients"):
        composed.backward(call, call.query, (), None, None, None)


def test_every_engine_says_why_it_cannot():
    reasons = composed.why_not(make_call(dtype=torch.float64))
    assert "flash for CPUs: takes torch.float32, torch.bfloat16, torch.float16, " in reasons[-1]
    assert [x.split(":")[0] for x in reasons] == list(ENGINES)
    assert reasons[1] == "cudnn: takes cuda tensors, query is on cpu"
    call = make_call()
    call.value = call.value.mT.contiguous().mT
    assert composed.why_not(call)[-1].endswith(
        "takes contiguous head_dim, value has stride 2 in it"
    )


def test_pytorch_s_switch_chooses_the_engine():
    call = make_call()
    assert composed.engine_for(call) is CPU
    with sdpa_kernel(SDPBackend.MATH):
        assert "flash for CPUs: torch.nn.attention.sdpa_kernel has switched it off" in (
            composed.why_not(call) + composed.unavailable()
        )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert composed.why_not(call) == composed.unavailable() == []


# ---- engines that this machine may not have ----


@pytest.mark.parametrize("name", ATEN)
@pytest.mark.parametrize("rule", ["none", "tar frame_max", "bias by head"])
def test_operators_for_gpus_get_what_they_take(name, rule):
    """Tensors without data go through their schemas and what PyTorch knows of their shapes."""
    rule = cases.RULES[rule](VIDEO, None, 4)
    call = make_call(rule, dtype=torch.bfloat16, return_map=True, map_heads=True)
    call = with_inputs(call, lambda x: x.to("meta"))
    out, frame_map, _ = composed.forward_by(ENGINES[name], call)
    assert (out.shape, out.dtype, out.device.type) == ((2, 47, 4, 16), torch.bfloat16, "meta")
    assert frame_map.shape == (2, 4, 6, 7)


@pytest.mark.parametrize("name", ATEN)
@pytest.mark.parametrize("rows", [1, 31, 33])
def test_log_sum_exps_of_operators_for_gpus_have_one_shape(name, rows):
    query = torch.empty(2, 40, 4, 16, dtype=torch.bfloat16, device="meta")[:, :rows]
    key = torch.empty(2, 50, 4, 16, dtype=torch.bfloat16, device="meta")[:, 7:]
    out, lse = ENGINES[name].attend(query, key, key, 0.5, None)
    assert out.shape == query.shape
    assert (lse.shape, lse.dtype) == ((2, 4, rows), torch.float32)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes calls whose tensors have no data, but say that they are on a GPU; all is installed."""
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("torch's build for CUDA asks its driver for a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(engines, "_installed", lambda module: True)

    def make(head_dim=64, dtype=torch.bfloat16, **options):
        with FakeTensorMode():
            return with_inputs(
                make_call(**options),
                lambda x: torch.empty(*x.shape[:3], head_dim, dtype=dtype, device="cuda"),
            )

    return make


GPU = [name for name in ENGINES if ENGINES[name].device == "cuda"]


@pytest.mark.parametrize("name", GPU)
def test_what_engines_for_gpus_take(name, on_gpu, monkeypatch):
    engine = dataclasses.replace(ENGINES[name], predicate=None)
    assert engine.why_not(on_gpu()) == []
    assert engine.why_not(on_gpu(head_dim=20)) == ["takes head_dim in multiples of 8, query has 20"]
    assert engine.why_not(on_gpu(head_dim=264)) == ["takes head_dim up to 256, query has 264"]
    assert bool(engine.why_not(on_gpu(dtype=torch.float32))) == (name != "efficient")
    lengths = torch.tensor([47, 9], dtype=torch.int32)
    why = engine.why_not(on_gpu(key_lengths=lengths))
    refused = ["takes no key_lengths without waiting for the GPU to tell them"]
    assert why == ([] if "flash-attn" in name else refused)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (4, 5))
    assert "compute capability" in engine.why_not(on_gpu())[0]
    with sdpa_kernel(SDPBackend.MATH):
        assert engine.why_not(on_gpu()) == ["torch.nn.attention.sdpa_kernel has switched it off"]
    if engine.module:
        monkeypatch.setattr(engines, "_installed", lambda module: False)
        assert engine.why_not(on_gpu()) == [f"{engine.module} is not installed"]


@pytest.mark.parametrize("name", ATEN)
def test_pytorch_s_own_answer_counts(name, on_gpu):
    asked = []

    def predicate(parameters, debug):
        asked.append((parameters.query.shape, parameters.key.shape, parameters.enable_gqa))
        return False

    predicate.__name__ = ENGINES[name].predicate.__name__
    reasons = dataclasses.replace(ENGINES[name], predicate=predicate).why_not(on_gpu())
    assert reasons == [
        f"torch.backends.cuda.can_use_{name}_attention says no (with debug=True it says why)"
    ]
    assert asked == [((2, 4, 47, 64), (2, 2, 47, 64), True)]


def flash_attn_package(monkeypatch, module, of_no_key):
    """A stand-in for a flash-attn package, with its function's parameters."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, softmax_scale, num_splits, return_softmax_lse
    ):
        assert num_splits == 1
        assert return_softmax_lse
        q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = softmax_scale * (q @ k.mT)
        if cache_seqlens is not None:
            assert cache_seqlens.dtype == torch.int32
            missing = torch.arange(k.shape[2]) >= cache_seqlens[:, None]
            logits = logits.masked_fill(missing[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1)
        out = (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
        lse = lse.masked_fill(lse == -torch.inf, of_no_key)
        return (out, lse, None, None) if module == "flash_attn_interface" else (out, lse)

    package = types.ModuleType(module)
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, module, package)


@pytest.mark.parametrize(
    ("name", "of_no_key"), [("flash-attn 2", torch.inf), ("flash-attn 3", -torch.inf)]
)
@pytest.mark.parametrize("rule", ["none", "tar frame_max", "mask by head", "window"])
def test_lengths_that_only_the_device_knows(name, of_no_key, rule, monkeypatch):
    engine = ENGINES[name]
    flash_attn_package(monkeypatch, engine.module, of_no_key)
    lengths = torch.tensor([47, 20, 1, 0], dtype=torch.int32)
    rule = cases.RULES[rule](VIDEO, None, 4)
    call = make_call(rule, batch=4, key_lengths=lengths, return_map=True)
    monkeypatch.setattr(composed, "_by_length", lambda call: [(slice(None), 47, lengths)])
    found, expected = composed.forward_by(engine, call), exactly(call)
    assert largest_error(found.out, expected.out) < 1e-5
    assert largest_error(found.mean_map, expected.mean_map) < 1e-6
