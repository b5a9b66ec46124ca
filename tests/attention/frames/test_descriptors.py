"""Keys and values of frames that come by descriptors, as on sm_90 and sm_100, interpreted.

On such a GPU, or an emulated one, ``test_triton.py`` and ``test_shipped.py`` run the same kernels.
"""

import sys

import pytest
import torch

import vstar_kernels as vk
from tests.attention.described import between_nans, ways_of
from tests.attention.frames import cases
from tests.pairwise import some
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.testing import assert_frames, eager_frames

if not backend.interpreted():
    pytest.skip("says that the CPU is a GPU", allow_module_level=True)

from vstar_kernels.attention.triton import (
    configs,
    devices,
    frames,
    frames_forward,
    frames_plan,
)
from vstar_kernels.attention.triton.configs import FramesConfig

NAN = float("nan")
HOPPER = devices.Device("sm_90", sys.maxsize, 1)
SMALL = FramesConfig(rows=32, keys=16, warps=4, stages=1, programs=3, shared=0)
R = vk.FrameRule
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU with descriptors, small tiles that end within frames, plans that are made anew."""
    monkeypatch.setattr(devices, "device_of", lambda device: HOPPER)
    monkeypatch.setattr(configs, "frames", lambda *key: SMALL)
    monkeypatch.setattr(configs, "revisit_below", lambda *key: 0.0)
    yield
    frames._forward_plan.cache_clear()
    frames._backward_plan.cache_clear()


@pytest.fixture
def taken(monkeypatch):
    """Which way each launch takes: "descriptors" or "pointers"."""
    return ways_of(frames_forward.frames_kernel, monkeypatch)


def run(*arguments, **options):
    return vk.frame_attention(*arguments, **options, backend="triton")


def inputs(layout, batch=2, heads=2, head_dim=40, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shape = (3, batch, layout.tokens, heads, head_dim)
    return [x.clone() for x in torch.randn(shape).to(dtype).unbind()]


DESCRIBED = {
    "layout": [
        vk.Layout(vk.Frames(3, 16)),
        vk.Layout(vk.Text(5), vk.Frames(2, 37)),  # blocks that are not full, and less than one
        vk.Layout(vk.Frames(4, 20), vk.Text(30)),
        vk.Layout(vk.Frames(1, 9)),  # all keys are less than a block
    ],
    "rule": [
        R(),
        R.window(0),
        R.window(0, sink=1),
        R.tar(1.0, stat="row_max"),
        R.tar(1.0, strength=-0.7, stat="row_max", clamp_negative=True) + R.window(1),
    ],
    "lengths": [None, [0, 1], [31, 9], [1000, 12]],
    "head_dim": [16, 40, 64, 72],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "strides": [lambda x: x, cases.heads_outermost, between_nans],
    "dtype": [torch.bfloat16, torch.float16],
    "scale": [None, -0.2],
    "stages": [1, 3],
}


@pytest.mark.parametrize("case", some(DESCRIBED, 24), ids=lambda c: f"{c['head_dim']}")
def test_what_descriptors_compute(case, taken, monkeypatch):
    config = FramesConfig(32, 16, 4, case["stages"], 3, 0)
    monkeypatch.setattr(configs, "frames", lambda *key: config)
    layout, rule = case["layout"], case["rule"]
    heads, key_heads = case["heads"]
    q, k, v = inputs(layout, heads=heads, head_dim=case["head_dim"], dtype=case["dtype"])
    k, v = (case["strides"](x[:, :, :key_heads]) for x in (k, v))
    lengths = case["lengths"] and torch.tensor(case["lengths"], dtype=torch.int32)
    options = {"scale": case["scale"], "key_lengths": lengths}
    assert_frames(run(q, k, v, layout, rule, **options), q, k, v, layout, rule, **options)
    assert taken == ["descriptors"]


@pytest.mark.parametrize("case", some(cases.OPTIONS, 12), ids=cases.identify)
def test_every_option(case):
    """Some calls come by descriptors, and what they cannot do by pointers."""
    arguments, options = cases.make(case | {"dtype": torch.bfloat16})
    assert_frames(run(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("rule", [R.window(1), R.tar(1.0, stat="row_max")])
def test_gradients_of_what_came_by_descriptors(rule, taken):
    layout = vk.Layout(vk.Frames(3, 20))
    tensors = [x.requires_grad_() for x in inputs(layout)]
    out = run(*tensors, layout, rule)
    found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out = eager_frames(*exact, layout, rule)
    expected = torch.autograd.grad(out, exact, torch.ones_like(out))
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=2e-2, atol=2e-2)
    assert taken == ["descriptors"]


def test_keys_that_do_not_exist_may_hold_anything(taken):
    """A last block begins earlier, among keys that there are."""
    layout = vk.Layout(vk.Frames(2, 16), vk.Text(10))
    q, k, v = inputs(layout)
    lengths = torch.tensor([35, 42], dtype=torch.int32)
    rule = R.tar(1.0, stat="row_max")
    expected = run(q, k, v, layout, rule, key_lengths=lengths)
    k[0, 35:], v[0, 35:] = NAN, NAN
    assert torch.equal(run(q, k, v, layout, rule, key_lengths=lengths), expected)
    assert set(taken) == {"descriptors"}


def test_what_is_not_a_number_stays_in_its_sequence(taken):
    layout = vk.Layout(vk.Frames(3, 20))
    q, k, v = inputs(layout)
    clean = run(q, k, v, layout, R.window(1))
    for x in (k, v):
        x[1, 3, 1] = NAN
    found = run(q, k, v, layout, R.window(1))
    assert found[1, :20, 1].isnan().all()
    found[1, :, 1] = clean[1, :, 1]
    assert torch.equal(found, clean)
    assert set(taken) == {"descriptors"}


def test_tensors_that_are_not_aligned_come_by_pointers(taken):
    layout = vk.Layout(vk.Frames(2, 20))
    tensors = inputs(layout)
    for i in range(3):
        moved = list(tensors)
        shape = tensors[i].shape
        moved[i] = torch.empty(1 + tensors[i].numel(), dtype=torch.bfloat16)[1:].view(shape)
        moved[i].copy_(tensors[i])
        assert_frames(run(*moved, layout), *moved, layout)
    assert taken == ["descriptors", "pointers", "pointers"]  # a query is not described
    before = frames._forward_plan.cache_info().misses
    run(*moved, layout)
    run(*tensors, layout)
    assert frames._forward_plan.cache_info().misses == before
    assert taken[3:] == ["pointers", "descriptors"]


LAYOUT = vk.Layout(vk.Frames(3, 20))


@pytest.mark.parametrize(
    ("rule", "options", "change"),
    [
        (R.tar(1.0, stat="frame_max"), {}, None),
        (R.attenuate(0.5, 1), {}, None),
        (R.band(2), {}, None),
        (R(), {"return_map": True}, None),
        (R(), {}, lambda x: x[:1].expand_as(x)),
        (R(), {}, lambda x: torch.nn.functional.pad(x, (0, 4))[..., :-4]),
        (R(), {}, lambda x: x.float()),
    ],
    ids=["frame_max", "factor", "band", "map", "expanded", "gaps", "float32"],
)
def test_what_comes_by_pointers(rule, options, change, taken):
    tensors = inputs(LAYOUT)
    if change is not None:
        tensors = [change(x) for x in tensors]
    run(*tensors, LAYOUT, rule, **options)
    assert taken == ["pointers"]


def test_short_slots_are_revisited_by_pointers(taken, monkeypatch):
    monkeypatch.setattr(configs, "revisit_below", lambda *key: float("inf"))
    tensors = inputs(LAYOUT)
    rule = R.tar(1.0, stat="row_max")
    assert_frames(run(*tensors, LAYOUT, rule), *tensors, LAYOUT, rule)
    assert taken == ["pointers"]


@pytest.mark.parametrize(
    ("architecture", "rule", "table"),
    [
        ("sm_90", R.window(1), "known_described"),
        ("sm_100", R.tar(1.0, stat="row_max"), "forward_described"),
        ("sm_80", R.window(1), "known"),
        ("gfx942", R.tar(1.0, stat="row_max"), "forward"),
        ("sm_90", R.window(1) + R.band(2), "known_full"),
    ],
)
def test_each_way_has_configurations_of_its_own(architecture, rule, table, monkeypatch):
    asked = []

    def recorded(*key):
        asked.append(key[-1])
        return SMALL

    monkeypatch.setattr(configs, "frames", recorded)
    here = HOPPER._replace(architecture=architecture)
    monkeypatch.setattr(devices, "device_of", lambda device: here)
    run(*inputs(LAYOUT), LAYOUT, rule)
    assert asked == [table]


def test_a_bias_that_waits_for_nothing_is_an_offset():
    """Whatever it is made of: the kernels add one number for each row and slot."""
    tensors = inputs(LAYOUT)
    table = torch.randn(3, 3)
    both = R.bias(table) + R.window(1)
    key = frames_plan.frames_key(check_call(*tensors, LAYOUT, both), tensors[0])
    rule = key.rule_tables()
    assert (rule.delta, key.statistic(rule)) == (None, "none")
    assert_frames(run(*tensors, LAYOUT, both), *tensors, LAYOUT, both)
