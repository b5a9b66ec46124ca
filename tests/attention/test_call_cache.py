"""Calls like earlier ones are computed as those were, and nothing else is taken for one."""

import gc
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vstar_kernels as vk
from vstar_kernels.attention import call_cache, cpu, dispatch, temporal
from vstar_kernels.attention.columns import operation as columns_operation
from vstar_kernels.attention.frames import operation as frames_operation

BIAS = vk.GaussianBias(1.0)
LAYOUT = vk.Layout(vk.Frames(4, 3))
RULE = vk.FrameRule.tar(1.0) + vk.FrameRule.window(2)
COLUMNS = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))


def tensors(*shape, count=3, **options):
    return [torch.randn(shape or (2, 12, 2, 8), **options) for _ in range(count)]


def tar(*given, **options):
    return vk.tar_attention(*given, BIAS, **options)


def dense(query, key, value, delta, stat, **options):
    return vk.tar_attention(query, key, value, vk.DenseBias(delta, stat=stat), **options)


def frames(*given, **options):
    return vk.frame_attention(*given, LAYOUT, RULE, **options)


def with_lengths(*given, **options):
    *qkv, lengths = given
    return vk.frame_attention(*qkv, LAYOUT, RULE, key_lengths=lengths, **options)


def maps_alone(query, key, columns, **options):
    return vk.column_attention(query, key, None, columns, **options)


CALLS = {
    "tar": (tar, lambda: tensors()),
    "tar, the maps of heads": (
        lambda *given, **options: tar(*given, return_map=True, map_heads=True, **options),
        lambda: tensors(),
    ),
    "tar, a matrix and a statistic": (
        dense,
        lambda: [*tensors(), torch.rand(2, 12, 12), torch.rand(2, 12, 2)],
    ),
    "tar, no bias": (vk.tar_attention, lambda: tensors()),
    "tar, strength 0": (
        lambda *given, **options: vk.tar_attention(
            *given[:3], vk.ToeplitzBias(given[3], strength=0.0), **options
        ),
        lambda: [*tensors(), torch.rand(12)],
    ),
    "frames": (frames, lambda: tensors()),
    "frames, the map": (
        lambda *given, **options: frames(*given, return_map=True, **options),
        lambda: tensors(),
    ),
    "frames, lengths": (
        with_lengths,
        lambda: [*tensors(), torch.randint(1, 13, (2,), dtype=torch.int32)],
    ),
    "columns": (
        vk.column_attention,
        lambda: [*tensors(), torch.rand(12, 3)],
    ),
    "columns, the maps alone": (maps_alone, lambda: [*tensors(count=2), torch.rand(2, 12, 3)]),
}


def twice(attend, *given, **options):
    """Calls are remembered when they come again."""
    attend(*given, **options)
    return attend(*given, **options)


@pytest.fixture
def unchecked(monkeypatch):
    """A function after which a call that is no repeat is an error."""

    def refuse(*arguments, **options):
        raise AssertionError("this call is checked")

    def now():
        for module in (temporal, frames_operation, columns_operation):
            monkeypatch.setattr(module, "check_call", refuse)

    return now


def results(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_computes_its_own_tensors(name, unchecked):
    attend, make = CALLS[name]
    twice(attend, *make())
    others = [make() for _ in range(3)]
    expected = [results(attend(*given, backend="reference")) for given in others]
    unchecked()
    for given, exact in zip(others, expected, strict=True):
        torch.testing.assert_close(results(attend(*given)), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_what_changes_in_place_is_read_again(name):
    attend, make = CALLS[name]
    given = make()
    twice(attend, *given)
    for tensor in given:
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    found, exact = attend(*given), attend(*given, backend="reference")
    torch.testing.assert_close(results(found), results(exact), rtol=1e-4, atol=1e-5)


OTHERS = {
    "type": lambda x: x.double(),
    "strides": lambda x: x.mT.contiguous().mT,
    "layout": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads": lambda x: x[:, :, :1].clone(),
    "frames": lambda x: x[:, :8].clone(),
    "device": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.requires_grad_(),
    "kind": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "sparse": lambda x: x.to_sparse(),
    "opaque": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "negated": lambda x: torch._neg_view(x),
    "a list": lambda x: x.tolist(),
    "none": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize(
    "attend",
    [tar, frames, lambda *x: vk.column_attention(*x, COLUMNS)],
    ids=["tar", "frames", "columns"],
)
def test_other_tensors_are_no_repeat(attend, place, other, unchecked):
    given = tensors()
    if attend not in (tar, frames) and place == 2 and other == "none":
        pytest.skip("is a call")
    twice(attend, *given)
    unchecked()
    attend(*(x.clone() for x in given))
    given[place] = OTHERS[other](given[place])
    with pytest.raises(AssertionError, match="this call is checked"):
        attend(*given)


LATER = vk.Layout(vk.Frames(4, 3, first=2))
CHANGES = {  # of one argument of a call: before, and after
    "tar": [
        ({"scale": 0.5}, {"scale": 2.0}),
        ({}, {"return_map": True}),
        ({"return_map": True}, {"return_map": True, "map_heads": True}),
        ({"return_map": True}, {"return_map": True, "map_block": 5}),
    ],
    "frames": [
        ({"layout": LAYOUT}, {"layout": vk.Layout(vk.Frames(3, 4))}),
        ({"rule": RULE}, {"rule": vk.FrameRule.window(1)}),
        ({"rule": RULE}, {"rule": None}),
        ({"rule": vk.FrameRule.window(1)}, {"key_layout": LATER, "rule": vk.FrameRule.window(1)}),
        ({"scale": 0.5}, {"scale": 2.0}),
        ({}, {"return_map": True}),
        ({"return_map": True}, {"return_map": True, "map_heads": True}),
        ({}, {"key_lengths": torch.tensor([3, 9], dtype=torch.int32)}),
    ],
    "columns": [({"scale": 0.5}, {"scale": 2.0})],
}


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [
        (name, *pair)
        for name, pairs in CHANGES.items()
        for pair in (*pairs, *(x[::-1] for x in pairs))
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x) or "usual",
)
def test_other_arguments_are_no_repeat(operation, before, after):
    given = tensors()

    def attend(layout=LAYOUT, rule=RULE, **options):
        if operation == "frames":
            return vk.frame_attention(*given, layout, rule, **options)
        if operation == "columns":
            return vk.column_attention(*given, COLUMNS, **options)
        return tar(*given, **options)

    twice(attend, **before)
    found, exact = attend(**after), attend(**after, backend="reference")
    torch.testing.assert_close(results(found), results(exact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attend", [tar, frames, lambda *x, **o: vk.column_attention(*x, COLUMNS, **o)]
)
def test_another_backend_is_no_repeat(attend):
    given = tensors()
    twice(attend, *given, backend="cpu")
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call"):
        attend(*given, backend="triton")


def test_the_maps_alone_are_no_repeat_of_an_output():
    query, key, value = tensors()
    _, maps = twice(vk.column_attention, query, key, value, COLUMNS)
    assert torch.equal(vk.column_attention(query, key, None, COLUMNS), maps)


class Number(float):
    __eq__ = float.__eq__  # and so without a hash


class Stepped(vk.FrameRule):
    """A rule that is another at each call."""

    window = 0

    def fixed_tables(self, layout, key_layout):
        self.__dict__["window"] = self.window + 1
        return vk.FrameRule.window(self.window).fixed_tables(layout, key_layout)


def test_arguments_of_other_types_are_used_as_they_are():
    given = tensors()
    for _ in range(3):
        expected = tar(*given, scale=0.5)
        assert torch.equal(tar(*given, scale=Number(0.5)), expected)
        bias = vk.GaussianBias(1.0, strength=Number(1.0))
        assert torch.equal(vk.tar_attention(*given, bias, scale=0.5), expected)
        with pytest.raises(TypeError, match="scale must be a number"):
            tar(*given, scale=memoryview(bytearray(b"x")))
    rule, steps = Stepped(), [vk.FrameRule.window(w) for w in (1, 2, 3)]
    for step in steps:
        found = vk.frame_attention(*given, LAYOUT, rule, backend="cpu")
        assert torch.equal(found, vk.frame_attention(*given, LAYOUT, step, backend="cpu"))


def test_an_output_of_the_caller_is_written():
    given, out = tensors(), torch.zeros(2, 12, 2, 8)
    expected = twice(tar, *given)
    assert tar(*given, out=out) is out
    assert torch.equal(out, expected)


def test_what_pytorch_allows_is_asked_every_time():
    """Its kernels, of which ``composed`` is made, are switched on and off unseen by guards."""
    given = tensors()

    def attend():
        vk.frame_attention(*given, LAYOUT, vk.FrameRule.window(1), backend="composed")

    twice(attend)
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.raises(ValueError, match="backend 'composed' cannot run this call"),
    ):
        attend()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"map_block": 1, "return_map": True}, {"map_block": True, "return_map": True}),
        ({"return_map": True}, {"return_map": 1}),
        ({"scale": 1.0}, {"scale": True}),
        ({"scale": None}, {"scale": [1.0]}),
        ({"backend": "cpu"}, {"backend": "none"}),
        ({"backend": "cpu"}, {"backend": {}}),
        ({"bias": BIAS}, {"bias": "gaussian"}),
    ],
)
def test_a_bad_argument_is_refused_after_a_good_one(before, after):
    given = tensors()
    twice(vk.tar_attention, *given, **before)
    with pytest.raises((TypeError, ValueError), match=next(iter(after))):
        vk.tar_attention(*given, **after)


@pytest.mark.parametrize(
    "other",
    [
        vk.GaussianBias(2.0),
        vk.GaussianBias(1.0, strength=2.0),
        vk.GaussianBias(1.0, stat="map_max"),
        vk.GaussianBias(1.0, clamp_negative=True),
        vk.ToeplitzBias(torch.rand(12)),
        vk.ToeplitzBias(torch.rand(23), signed=True),
        vk.DenseBias(torch.rand(12, 12)),
        None,
    ],
    ids=lambda x: type(x).__name__,
)
def test_another_bias_is_no_repeat(other):
    query, key, value = tensors()
    given = query.abs(), -key.abs(), value  # all logits are negative
    twice(vk.tar_attention, *given, BIAS)
    found = vk.tar_attention(*given, other)
    exact = vk.tar_attention(*given, other, backend="reference")
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_a_bias_of_the_same_numbers_is_a_repeat(unchecked):
    given = tensors()
    twice(vk.tar_attention, *given, vk.GaussianBias(1.0))
    unchecked()
    vk.tar_attention(*given, vk.GaussianBias(1.0))


def test_a_shorter_table_is_refused():
    given = tensors()
    twice(vk.tar_attention, *given, vk.ToeplitzBias(torch.rand(12)))
    with pytest.raises(ValueError, match="reaches 11 frames"):
        vk.tar_attention(*given, vk.ToeplitzBias(torch.rand(11)))


def test_gradients_are_wanted_later():
    given, table = tensors(), torch.rand(12)
    bias = vk.ToeplitzBias(table)
    assert twice(vk.tar_attention, *given, bias).grad_fn is None
    table.requires_grad_()
    assert vk.tar_attention(*given, bias).grad_fn is not None
    for attend in (tar, frames, lambda *x: vk.column_attention(*x, torch.ones(12, 1))[0]):
        trained = tensors(requires_grad=True)
        with torch.no_grad():
            assert twice(attend, *trained).grad_fn is None
        assert attend(*trained).grad_fn is not None
        with torch.inference_mode():
            assert twice(attend, *trained).is_inference()


def test_a_statistic_without_gradient_has_none():
    given, stat = tensors(), torch.rand(2, 12, 2, requires_grad=True)
    bias = vk.GaussianBias(1.0, stat=stat, detach_stat=True)
    for _ in range(3):
        assert not vk.tar_attention(*given, bias).requires_grad
    bias = vk.GaussianBias(1.0, stat=stat)
    assert vk.tar_attention(*given, bias).requires_grad


def test_a_table_that_is_trained_is_read_at_every_call():
    given, table = tensors(), torch.zeros(4, 4, requires_grad=True)
    rule = vk.FrameRule.bias(table)
    with torch.no_grad():
        before = twice(vk.frame_attention, *given, LAYOUT, rule)
        table[:, 0] = 3.0
        after = vk.frame_attention(*given, LAYOUT, rule)
        exact = vk.frame_attention(*given, LAYOUT, rule, backend="reference")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, exact, rtol=1e-4, atol=1e-5)


def test_autocast_gives_its_own_type():
    given = tensors()
    for _ in range(3):
        assert tar(*given).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert twice(tar, *given).dtype == twice(frames, *given).dtype == dtype


def test_transforms_of_torch_func_see_a_call():
    query, key, value = tensors()
    twice(tar, query, key, value)

    def of_heads(query):  # key and value are not mapped over
        return tar(query, key, value)

    mapped = torch.vmap(of_heads)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(mapped[1], tar(2 * query, key, value))
    gradient = torch.func.grad(lambda x: tar(x, key, value).sum())(query)
    assert gradient.abs().max() > 0
    functional = torch.func.functionalize(of_heads)(query)
    torch.testing.assert_close(functional, tar(query, key, value))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_not_remembered():
    """Its shapes are tensors, which nothing finds again."""
    given = tensors()
    for _ in range(3):
        torch.jit.trace(tar, tuple(given), check_trace=False)
    assert len(dispatch.TAR_ATTENTION.calls._known) == 0


def test_a_tangent_is_followed():
    query, key, value = tensors()
    twice(tar, query, key, value, backend="cpu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        found = tar(dual, key, value, backend="reference")
        assert forward_ad.unpack_dual(found).tangent is not None
        with pytest.raises(ValueError, match="carries a tangent"):
            tar(dual, key, value, backend="cpu")


def test_modes_see_every_call(unchecked):
    given = tensors()
    twice(tar, *given)
    with FlopCounterMode(display=False) as counter:
        tar(*given)
    assert counter.get_total_flops() > 0
    unchecked()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),  # of which guards see nothing
        pytest.raises(AssertionError, match="this call is checked"),
    ):
        tar(*given)


def test_the_profiler_sees_repeated_calls():
    given = tensors()
    twice(tar, *given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tar(*given)
    assert "tar_attention (cpu)" in [x.key for x in profile.key_averages()]


def test_no_tensor_is_held():
    given = [*tensors(), torch.rand(12, 12), torch.rand(2, 12, 2)]
    held = [weakref.ref(x) for x in given]
    twice(dense, *given)
    twice(with_lengths, *given[:3], torch.tensor([3, 4], dtype=torch.int32))
    twice(vk.column_attention, *given[:3], given[3])
    stat = torch.rand(2, 12, 2)
    held.append(weakref.ref(stat))
    twice(vk.frame_attention, *given[:3], LAYOUT, vk.FrameRule.tar(1.0, stat=stat))
    del given, stat
    gc.collect()
    assert [x() for x in held] == [None] * len(held)


def test_there_is_an_end_to_what_is_remembered(monkeypatch, unchecked):
    """The oldest go first; and of many strides the first stay, so that they do not take turns."""
    monkeypatch.setattr(dispatch.TAR_ATTENTION.calls, "max_keys", 3)
    sizes = [tensors(1, frames, 1, 4) for frames in range(1, 5)]
    for given in sizes:
        twice(tar, *given)
    query, key, value = sizes[-1]
    wide = torch.randn(1, 4, 1, 64)
    strides = [
        wide.as_strided(key.shape, (256, 8 + start, 4, 1))
        for start in range(call_cache.MAX_VARIANTS)
    ]
    for narrow in strides:
        twice(tar, query, narrow, value)
    unchecked()
    for given in sizes[1:]:
        tar(*given)
    for narrow in strides[:-1]:
        tar(query, narrow, value)
    for given in (sizes[0], (query, strides[-1], value)):
        with pytest.raises(AssertionError, match="this call is checked"):
            tar(*given)


def test_what_comes_once_is_not_prepared_for(monkeypatch):
    prepared = []
    monkeypatch.setattr(cpu, "prepare", lambda call: prepared.append(call) or cpu.forward)
    given = tensors()
    for scale in (0.1, 0.2, 0.3, 0.1, 0.1):
        tar(*given, scale=scale)
    assert len(prepared) == 1


def test_what_passes_no_guards_is_not_prepared_for(monkeypatch):
    prepared = []
    monkeypatch.setattr(cpu, "prepare", lambda call: prepared.append(call) or cpu.forward)
    query, key, value = tensors()
    for given in ((query, query, value), (query, torch.nn.Parameter(key, False), value)):
        found, exact = twice(tar, *given), tar(*given, backend="reference")
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert prepared == []


def test_texts_of_many_lengths_are_remembered(unchecked):
    query = tensors(count=1)
    texts = [[*tensors(2, keys, 2, 8, count=2), torch.rand(keys, 2)] for keys in range(1, 20)]
    for text in texts:
        twice(vk.column_attention, *query, *text)
    unchecked()
    for text in texts:
        vk.column_attention(*query, *text)


def test_every_size_of_a_model_is_remembered(unchecked):
    sizes = [tensors(1, 12, 1, 1 + size) for size in range(20)]
    for given in sizes:
        twice(tar, *given)
    unchecked()
    for given in sizes:
        tar(*given)


def test_many_threads(monkeypatch):
    """They find and forget calls while others do; each result is its own call's."""
    monkeypatch.setattr(dispatch.TAR_ATTENTION.calls, "max_keys", 2)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for number in range(100):
            size = 1 + (seed + number // 3) % 5
            shape = (1, size, 2, 8)
            given = [torch.randn(shape, generator=generator) for _ in range(3)]
            found, exact = tar(*given), tar(*given, backend="reference")
            if not torch.allclose(found, exact, rtol=1e-4, atol=1e-5):
                wrong.append((seed, number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("guards", [None, lambda *tensors: None])
def test_without_guards_every_call_is_checked(guards, monkeypatch, unchecked):
    """As with a torch that has none, or others."""
    monkeypatch.setattr(call_cache, "TensorGuards", guards)
    given = tensors()
    expected = twice(tar, *given)
    assert torch.equal(twice(tar, *given), expected)
    unchecked()
    with pytest.raises(AssertionError, match="this call is checked"):
        tar(*given)


def test_torch_has_guards():
    """Without them calls would be right, and slower."""
    assert call_cache.TensorGuards is not None
