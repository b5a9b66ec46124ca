"""Calls like earlier ones are computed as those were, and nothing else is taken for one."""

import gc
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import vstar_kernels as vk
from vstar_kernels.attention import cpu, repeats, temporal
from vstar_kernels.attention.columns import operation as columns_operation
from vstar_kernels.attention.frames import operation as frames_operation
from vstar_kernels.attention.repeats import Repeats

BIAS = vk.GaussianBias(1.0)
LAYOUT = vk.Layout(vk.Frames(4, 3))
RULE = vk.FrameRule.tar(1.0) + vk.FrameRule.window(2)


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
    attend(*make())
    others = [make() for _ in range(3)]
    expected = [results(attend(*given, backend="reference")) for given in others]
    unchecked()
    for given, exact in zip(others, expected, strict=True):
        torch.testing.assert_close(results(attend(*given)), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_what_changes_in_place_is_read_again(name):
    attend, make = CALLS[name]
    given = make()
    attend(*given)
    for tensor in given:
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    found, exact = attend(*given), attend(*given, backend="reference")
    torch.testing.assert_close(results(found), results(exact), rtol=1e-4, atol=1e-5)


# Each with all but its keys as a call before it, and its keys as they then come.
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
    "negated": lambda x: torch._neg_view(x),
    "a list": lambda x: x.tolist(),
    "none": lambda x: None,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("attend", [tar, frames], ids=["tar", "frames"])
def test_other_tensors_are_no_repeat(attend, other, unchecked):
    query, key, value = tensors()
    attend(query, key, value)
    unchecked()
    attend(query, key.clone(), value)
    with pytest.raises(AssertionError, match="this call is checked"):
        attend(query, OTHERS[other](key), value)


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
    vk.tar_attention(*given, **before)
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
    given = [-x.abs() for x in tensors()]
    vk.tar_attention(*given, BIAS)
    found = vk.tar_attention(*given, other)
    exact = vk.tar_attention(*given, other, backend="reference")
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_a_bias_of_the_same_numbers_is_a_repeat(unchecked):
    given = tensors()
    vk.tar_attention(*given, vk.GaussianBias(1.0))
    unchecked()
    vk.tar_attention(*given, vk.GaussianBias(1.0))


def test_a_shorter_table_is_refused():
    given = tensors()
    vk.tar_attention(*given, vk.ToeplitzBias(torch.rand(12)))
    with pytest.raises(ValueError, match="reaches 11 frames"):
        vk.tar_attention(*given, vk.ToeplitzBias(torch.rand(11)))


def test_gradients_are_wanted_later():
    given, table = tensors(), torch.rand(12)
    bias = vk.ToeplitzBias(table)
    assert vk.tar_attention(*given, bias).grad_fn is None
    table.requires_grad_()
    assert vk.tar_attention(*given, bias).grad_fn is not None
    for attend in (tar, frames, lambda *x: vk.column_attention(*x, torch.ones(12, 1))[0]):
        trained = tensors(requires_grad=True)
        with torch.no_grad():
            assert attend(*trained).grad_fn is None
        assert attend(*trained).grad_fn is not None
        with torch.inference_mode():
            assert attend(*trained).is_inference()


def test_a_statistic_without_gradient_has_none():
    given, stat = tensors(), torch.rand(2, 12, 2, requires_grad=True)
    bias = vk.GaussianBias(1.0, stat=stat, detach_stat=True)
    for _ in range(2):
        assert not vk.tar_attention(*given, bias).requires_grad


def test_a_table_that_is_trained_is_read_at_every_call():
    given, table = tensors(), torch.zeros(4, 4, requires_grad=True)
    rule = vk.FrameRule.bias(table)
    with torch.no_grad():
        before = vk.frame_attention(*given, LAYOUT, rule)
        table[:, 0] = 3.0
        after = vk.frame_attention(*given, LAYOUT, rule)
        exact = vk.frame_attention(*given, LAYOUT, rule, backend="reference")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, exact, rtol=1e-4, atol=1e-5)


def test_autocast_gives_its_own_type():
    given = tensors()
    for _ in range(2):
        assert tar(*given).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert tar(*given).dtype == frames(*given).dtype == dtype


def test_transforms_of_torch_func_see_a_call():
    query, key, value = tensors()
    tar(query, key, value)
    tar(query[0][None].clone(), *(x[:1].clone() for x in (key, value)))

    def of_heads(query):  # key and value are not mapped over
        return tar(query, key, value)

    mapped = torch.vmap(of_heads)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(mapped[1], tar(2 * query, key, value))
    gradient = torch.func.grad(lambda x: tar(x, key, value).sum())(query)
    assert gradient.abs().max() > 0
    functional = torch.func.functionalize(of_heads)(query)
    torch.testing.assert_close(functional, tar(query, key, value))


def test_a_tangent_is_followed():
    query, key, value = tensors()
    tar(query, key, value, backend="cpu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        found = tar(dual, key, value, backend="reference")
        assert forward_ad.unpack_dual(found).tangent is not None
        with pytest.raises(ValueError, match="carries a tangent"):
            tar(dual, key, value, backend="cpu")


def test_modes_see_every_call():
    given = tensors()
    tar(*given)
    with FlopCounterMode(display=False) as counter:
        tar(*given)
    assert counter.get_total_flops() > 0
    (known,) = temporal.REPEATS._known
    like = known[2:8], given
    assert temporal.REPEATS.find(*like) is not None
    with FakeTensorMode():  # guards see none of it
        assert temporal.REPEATS.find(*like) is None


def test_the_profiler_sees_repeated_calls():
    given = tensors()
    tar(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tar(*given)
    assert "tar_attention (cpu)" in [x.key for x in profile.key_averages()]


def test_the_reference_is_not_remembered(monkeypatch):
    kept = []
    monkeypatch.setattr(Repeats, "keep", lambda *arguments: kept.append(arguments))
    given = tensors(dtype=torch.float64)
    for attend in (tar, frames):
        attend(*given, backend="reference")
    assert kept == []


def test_no_tensor_is_held():
    given = [*tensors(), torch.rand(12, 12), torch.rand(2, 12, 2)]
    held = [weakref.ref(x) for x in given]
    dense(*given)
    with_lengths(*given[:3], torch.tensor([3, 4], dtype=torch.int32))
    vk.column_attention(*given[:3], given[3])
    stat = torch.rand(2, 12, 2)
    held.append(weakref.ref(stat))
    vk.frame_attention(*given[:3], LAYOUT, vk.FrameRule.tar(1.0, stat=stat))
    del given, stat
    gc.collect()
    assert [x() for x in held] == [None] * len(held)


def test_there_is_an_end_to_what_is_remembered(monkeypatch):
    monkeypatch.setattr(repeats, "MOST", 3)
    known = temporal.REPEATS._known
    for frames in range(1, 8):
        tar(*tensors(1, frames, 1, 4))
        assert len(known) <= 3
    query, key, value = tensors()
    wide = torch.randn(2, 12, 2, 200)
    for start in range(20):
        narrow = wide.as_strided(key.shape, (wide.stride(0), wide.stride(1), 100 + start, 1))
        tar(query, narrow, value)
    assert max(map(len, known.values())) == repeats.ALIKE


def test_a_tensor_that_comes_twice_is_not_remembered():
    query, _, value = tensors()
    tar(query, query, value)
    assert temporal.REPEATS._known == {}


def test_every_size_of_a_model_is_remembered(unchecked):
    sizes = [tensors(1, 12, 1, 1 + size) for size in range(20)]
    for given in sizes:
        tar(*given)
    unchecked()
    for given in sizes:
        tar(*given)


def test_many_threads(monkeypatch):
    """They find and forget calls while others do; each result is its own call's."""
    monkeypatch.setattr(repeats, "MOST", 2)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for number in range(100):
            size = 1 + (seed + number) % 5
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


def test_a_backend_without_preparation_is_called_with_the_call(monkeypatch):
    given, calls = tensors(), []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda call, **_: calls.append(call) or forward(call))
    for _ in range(3):
        tar(*given)
    assert [x.options for x in calls] == [calls[0].options] * 3
    assert all(x.query is given[0] for x in calls)


def test_torch_has_guards():
    """Without them every call would be checked: right, and slower."""
    assert repeats.TensorGuards is not None
