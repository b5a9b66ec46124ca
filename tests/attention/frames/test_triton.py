"""The Triton kernels of attention over frames: on a GPU, or interpreted on the CPU.

The interpreter needs ``TRITON_INTERPRET=1`` from the start of its process; ``make test`` runs this
file so.
"""

import dataclasses
import types

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.pairwise import some
from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.frames.call import FrameWanted, check_call
from vstar_kernels.testing import assert_frames, assert_gradients, eager_frames

if backend.unavailable():
    pytest.skip("; ".join(backend.unavailable()), allow_module_level=True)

from vstar_kernels.attention.frames import reference
from vstar_kernels.attention.triton import (
    configs,
    devices,
    frames,
    frames_plan,
    frames_slots,
    plan,
    primitives,
)
from vstar_kernels.attention.triton.configs import FramesConfig

DEVICE = "cpu" if backend.interpreted() else "cuda:0"
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("poison")


SMALL = FramesConfig(rows=32, keys=32, warps=4, stages=1, programs=3, shared=0)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that end within frames, fewer programs than tiles, plans that are made anew."""
    monkeypatch.setattr(configs, "frames", lambda *key: SMALL)
    yield
    frames._forward_plan.cache_clear()
    frames._backward_plan.cache_clear()


def revisit(monkeypatch, wanted):
    """Slots whose bias waits for a statistic are gone through twice, or have partial outputs."""
    monkeypatch.setattr(configs, "revisit_below", lambda *key: float("inf") if wanted else 0.0)


def on_device(x):
    """A tensor, or a rule whose statistic is one, on the kernels' device; the rest as it is."""
    if isinstance(x, vk.FrameRule) and isinstance(x.stat, torch.Tensor):
        return dataclasses.replace(x, stat=x.stat.to(DEVICE))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def run(*arguments, **options):
    """The kernels' result, on the CPU."""
    options = {name: on_device(x) for name, x in options.items()}
    found = vk.frame_attention(*map(on_device, arguments), **options, backend="triton")
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


TINY = cases.OPTIONS | {
    "tokens": [1, 7, 20],
    "heads": [(2, 1), (2, 2)],
    "head_dim": [16, 40],
    "int64": [False, True],
    "given": [False, True],
    "stages": [1, 2],  # whether values are loaded with their keys, or behind
    "revisit": [False, True],  # or split, where a bias waits for a statistic
}


@pytest.mark.parametrize("case", some(TINY, 40), ids=cases.identify)
def test_options(case, monkeypatch):
    config = dataclasses.replace(SMALL, stages=case["stages"])
    monkeypatch.setattr(configs, "frames", lambda *key: config)
    revisit(monkeypatch, case["revisit"])
    if case["int64"]:
        monkeypatch.setattr(plan, "INT32_MAX", -1)
    arguments, options = cases.make(case)
    if case["given"] and arguments[4] is not None:
        arguments = (*arguments[:4], cases.with_given_statistic(arguments[4], arguments[0]))
    assert_frames(run(*arguments, **options), *arguments, **options)


def test_biases_count_without_a_scale():
    """A finite one is no mask, however far below; there a row sees nothing else."""
    layout = vk.Layout(vk.Frames(3, 16))
    query, key, value = torch.randn(3, 1, 48, 1, 16).unbind()
    table = torch.tensor([[-1e9, -1e9 - 128, -3e9], [0.0, -1e9, 2.0], [-torch.inf, 0.0, 1.0]])
    rule = vk.FrameRule.bias(table)
    found = run(query, key, value, layout, rule, scale=0.0)
    expected = eager_frames(*(x.double() for x in (query, key, value)), layout, rule, scale=0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_nan_in_a_trained_table_is_no_mask():
    """Here each tile has rows of one frame, all of whose slots the table decides."""
    layout, table = vk.Layout(vk.Frames(3, 64)), torch.zeros(3, 3)
    table[1, 2] = float("nan")
    tensors = torch.randn(3, 1, layout.tokens, 1, 16)
    with torch.no_grad():
        out = run(*tensors, layout, vk.FrameRule.bias(table.requires_grad_()))
    assert out[:, 64:128].isnan().all()
    assert out[:, :64].isfinite().all()
    assert out[:, 128:].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [20, 40]])
@pytest.mark.parametrize("stat", ["row_max", "frame_max"])
@pytest.mark.parametrize("twice", [False, True])
def test_the_statistic_is_of_what_the_row_sees(stat, lengths, twice, monkeypatch):
    """Rows of all frames share tiles here, and what some do not see has by far the largest logits.

    A row that sees no frame but text has a statistic of 0.
    """
    revisit(monkeypatch, twice)
    layout = vk.Layout(vk.Text(4), vk.Frames(3, 12))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 40, 1, 16).unbind()
    key[:, 28:] *= 4
    mask = torch.zeros(3, 3)
    mask[0], mask[1, 2] = -torch.inf, -torch.inf
    rule = vk.FrameRule.tar(1.0, stat=stat) + vk.FrameRule.bias(mask)
    options = {"key_lengths": lengths and torch.tensor(lengths, dtype=torch.int32)}
    found = run(query, key, value, layout, rule, **options)
    assert_frames(found, query, key, value, layout, rule, **options)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("runs", [1, 9])  # in which the frames lie: contiguous, and in turn
def test_a_frame_mean_is_of_the_keys_within_its_band(runs, twice, monkeypatch):
    """Bands begin and end within blocks of keys, as the keys of a batch element do."""
    revisit(monkeypatch, twice)
    layout = vk.Layout(vk.Text(3), *[vk.Frames(2, 45 // runs)] * runs)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 3, 93, 1, 16).unbind()
    rule = vk.FrameRule.tar(1.0) + vk.FrameRule.band(20)
    options = {"key_lengths": torch.tensor([93, 60, 4], dtype=torch.int32)}
    found = run(2 * query, 2 * key, value, layout, rule, **options)
    assert_frames(found, 2 * query, 2 * key, value, layout, rule, **options)


@pytest.mark.parametrize("stat", ["row_max", "frame_max"])
@pytest.mark.parametrize("largest", ["text", "far", "near", "lowered"])
def test_a_revisited_statistic_is_exact_whatever_dominates(stat, largest, monkeypatch):
    """What is far above the rest must not make the others' sums vanish from the statistic.

    Δ reaches two frames in one direction, and the rule lowers one far frame by much.
    """
    revisit(monkeypatch, True)
    layout = vk.Layout(vk.Text(8), vk.Frames(6, 16))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 104, 1, 16).unbind()
    frame = {"text": slice(0, 8), "far": slice(88, 104), "near": slice(8, 24)}
    place = frame.get(largest, slice(72, 88))
    query, key[:, place] = query.abs(), 60 * key[:, place].abs()
    delta = torch.ones(6, 6).triu() - torch.ones(6, 6).triu(3)
    lower = torch.zeros(6, 6)
    lower[:, 4] = -300.0
    rule = vk.FrameRule.bias(delta, stat=stat)
    call = check_call(query, key, value, layout, rule)
    call = dataclasses.replace(call, offset=lower)
    moved = {name: on_device(getattr(call, name)) for name in ("query", "key", "value")}
    found = frames.forward(dataclasses.replace(call, **moved), save=True)
    expected = reference.forward(call)
    torch.testing.assert_close(found.out.cpu(), expected.out, rtol=1e-4, atol=1e-4)


# ---- gradients ----


def test_a_trained_table_is_refused_only_where_its_gradient_is_wanted():
    layout = vk.Layout(vk.Frames(2, 4))
    rule = vk.FrameRule.bias(torch.zeros(2, 2).requires_grad_())
    x = torch.zeros(1, 8, 1, 16, device=DEVICE)
    assert "gradient of the rule's tables" in frames.why_not(check_call(x, x, x, layout, rule))[0]
    with torch.no_grad():
        assert not frames.why_not(check_call(x, x, x, layout, rule))


def test_the_gradient_of_a_map_without_rows():
    layout, x = vk.Layout(vk.Text(8)), torch.randn(1, 8, 1, 16, device=DEVICE).requires_grad_()
    out, mean_map = vk.frame_attention(x, x, x, layout, return_map=True, backend="triton")
    (found,) = torch.autograd.grad(out.square().sum() + mean_map.sum(), x)
    out = vk.frame_attention(x, x, x, layout, backend="reference")
    (expected,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


RULES = {
    "none": lambda: None,
    "tar row_max": lambda: vk.FrameRule.tar(1.0, stat="row_max"),
    "tar row_max clamped": lambda: vk.FrameRule.tar(1.0, -0.7, "row_max", True),
    "tar frame_max": lambda: vk.FrameRule.tar(1.0) + vk.FrameRule.window(1),
    "given": lambda: vk.FrameRule.tar(1.0),
    "factor, band": lambda: (
        vk.FrameRule.tar(1.0) + vk.FrameRule.attenuate(0.6, 1) + vk.FrameRule.band(3)
    ),
    "factor": lambda: vk.FrameRule.tar(1.0, stat="row_max") + vk.FrameRule.attenuate(0.6, 0),
}
GRADIENTS = {
    "layout": ["text on both sides", "grid", "sizes differ"],
    "keys": ["same", "cache before"],
    "tokens": [1, 9],
    "rule": list(RULES),
    "lengths": ["none", "some", "zero and one"],
    "strides": ["contiguous", "heads outermost", "expanded"],
    "heads": [(2, 1), (2, 2)],
    "head_dim": [16, 40],
    "map": ["none", "mean", "heads"],
    "dtype": [torch.float32, torch.float16],
    "scale": [None, -0.2],
}


def gradients(attention, tensors, weights):
    """The gradients of the weighted sum of an attention's results, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    results = attention(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((x.double() * w).sum() for x, w in zip(results, weights, strict=True))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("case", some(GRADIENTS, 10), ids=cases.identify)
def test_gradients(case):
    """Those of float16 against the formula in float16; the interpreter truncates to bfloat16."""
    (query, key, value, layout, _), options = cases.make({**case, "rule": "none"})
    rule = RULES[case["rule"]]()
    if case["rule"] == "given":
        rule = cases.with_given_statistic(rule, query)
    call = check_call(query, key, value, layout, rule, **options)
    torch.manual_seed(0)
    weights = [torch.randn(call.query.shape).to(call.dtype)]
    if case["map"] != "none":
        weights.append(20 * torch.randn(call.map_shape))

    given = {} if call.stat is None else {"stat": call.stat}
    moved = {name: on_device(getattr(call, name)) for name in ("query", "key", "value", *given)}
    moved["key_lengths"] = on_device(call.key_lengths)
    here = dataclasses.replace(call, **moved)
    result = frames.forward(here, save=True)
    wanted = FrameWanted(delta=False, offset=False, stat=bool(given))
    made = frames.backward(
        here, result.out, result.saved, *map(on_device, [*weights, None][:2]), wanted
    )
    found = {name: x.cpu() for name, x in made._asdict().items() if x is not None}

    def attention(query, key, value, stat=None):
        changed = rule
        if stat is not None:
            changed = vk.FrameRule(
                rule.terms, stat=stat.float(), clamp_negative=rule.clamp_negative
            )
        plain = eager_frames if query.dtype == torch.float16 else reference.frame_attention
        return plain(query, key, value, layout, changed, **options)

    def compute(convert):
        changed = {"query": query, "key": key, "value": value, **given}
        return gradients(attention, {k: convert(x) for k, x in changed.items()}, weights)

    # Of rows that see one key the gradients of logits are zero, but for rounding.
    assert_gradients(found, compute, vanishing=1e-2 if call.dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize(("head_dim", "ieee"), [(40, False), (72, False), (250, True)])
def test_gradients_of_heads_whose_parts_are_others(head_dim, ieee, monkeypatch):
    monkeypatch.setattr(plan, "ieee_products", lambda dtype: ieee)
    layout, rule = vk.Layout(vk.Text(4), vk.Frames(2, 8)), vk.FrameRule.tar(1.0)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 1, 20, 1, head_dim).unbind()
    found, expected = (
        gradients(
            lambda x, name=name: vk.frame_attention(x, x, x, layout, rule, backend=name),
            {"x": x.to(device)},
            [weight.to(device)],
        )["x"]
        for name, device in (("triton", DEVICE), ("reference", "cpu"))
    )
    # TF32 keeps ten bits of its operands; the interpreter does not compute in it.
    tolerance = 1e-4 if ieee or primitives.INTERPRETED.value else 2e-2
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


# ---- what rows see ----


def tables(rule, layout, **options):
    """The slots of tiles of 16 rows, each with its key frames' representative and its ranges."""
    key = plan_key(rule, layout)
    found = frames_slots.tile_tables(
        layout.run_table().tolist(),
        layout.run_table().tolist(),
        key.rule_tables(),
        rows=16,
        ordered=key.ordered,
        **options,
    )
    return [
        [
            (frame, [tuple(x[:2]) for x in found.ranges[first:end].tolist()])
            for frame, first, end in found.slots[slice(*tile)].tolist()
        ]
        for tile in found.tiles[0].tolist()
    ]


def plan_key(rule, layout, dtype=torch.bfloat16, **options):
    x = torch.zeros(1, layout.tokens, 2, 16, dtype=dtype)
    return frames_plan.frames_key(check_call(x, x, x, layout, rule, **options), x)


def test_slots_are_frames_of_equal_weights():
    layout = vk.Layout(vk.Text(16), vk.Frames(9, 16))
    found = tables(vk.FrameRule.tar(1.0), layout)
    everything = [(0, [(16, 160)]), (-1, [(0, 16)])]
    assert found[0] == everything  # text sees every frame alike
    of_frame_4 = dict(found[5])
    # Beyond four frames Δ is nothing in 16 bits: none of nine is that far from the middle.
    assert of_frame_4 == {
        -1: [(0, 16)],
        0: [(16, 32), (144, 160)],
        1: [(32, 48), (128, 144)],
        2: [(48, 64), (112, 128)],
        3: [(64, 80), (96, 112)],
        4: [(80, 96)],
    }
    far = dict(found[1])  # of frame 0
    assert far[5] == [(96, 160)]  # neighbours are one range
    assert len(far) == 7


def test_parts_of_heads_in_nvidias_gradients():
    """In TF32 there is no rest of 16, in IEEE float32 no part of 256."""
    key = plan_key(None, vk.Layout(vk.Frames(2, 16)), torch.float32)
    key = key._replace(ieee=False, grad_out=key.out)
    tf32 = {40: (64, 0), 64: (64, 0), 72: (64, 32), 80: (64, 32), 144: (128, 32), 160: (128, 32)}
    ieee = {128: (128, 0), 160: (128, 32), 192: (128, 64), 200: (128, 128), 256: (128, 128)}
    for head_dim in tf32 | ieee:
        of_size, usual = key._replace(head_dim=head_dim), configs.split(head_dim)
        for changes, wanted in (
            ({}, tf32.get(head_dim, usual)),
            ({"ieee": True}, ieee.get(head_dim, usual)),
            ({"dtype": torch.float16}, usual),
            ({"grad_out": ()}, usual),
            ({"device": devices.Device("gfx942", 2**16, 1)}, usual),
        ):
            head = of_size._replace(**changes).head()
            assert wanted == (head.MAIN, head.REST), (head_dim, changes)


def made_plan(rule, layout, dtype=torch.bfloat16):
    key = plan_key(rule, layout, dtype)
    return frames._forward_plan(key, torch.device("cpu"))


def test_short_frames_are_revisited_long_ones_split_and_known_biases_neither():
    tar = vk.FrameRule.tar(1.0)
    for tokens, rule, way in ((32, tar, "revisit"), (320, tar, "split"), (32, None, "known")):
        made = made_plan(rule, vk.Layout(vk.Frames(12, tokens), vk.Text(3)))
        assert made.launch.constants["WAY"] == way
        assert ("part" in made.filled) == (way == "split")


def test_slots_with_a_bias_come_first_and_their_keys_are_counted():
    layout = vk.Layout(vk.Text(16), vk.Frames(9, 16))
    key = plan_key(vk.FrameRule.tar(1.0), layout)
    runs = layout.run_table().tolist()
    found = frames_slots.tile_tables(runs, runs, key.rule_tables(), rows=16, ordered=False)
    biased = (found.biased - found.tiles[..., 0])[0].tolist()
    # Text has none; frame 0 sees frames 0 to 4 so, frame 4 pairs of them, and text is beside.
    assert biased[:2] == [0, 5]
    assert biased[5] == 5
    slots = (found.tiles[..., 1] - found.tiles[..., 0]).sum()
    keys = 16 * sum(min(f + 4, 8) - max(f - 4, 0) + 1 for f in range(9))
    assert found.biased_keys_of_a_slot() == pytest.approx(keys / slots)


def test_frames_keep_their_ranges_where_sums_by_frame_are_wanted():
    layout = vk.Layout(vk.Frames(9, 16))
    found = dict(tables(vk.FrameRule.tar(1.0), layout, by_frame=True)[0])
    assert found[5] == [(80, 96), (96, 112), (112, 128), (128, 144)]
    assert [frame for frame, _ in tables(None, layout, alone=True)[0]] == list(range(9))


def test_masked_frames_have_no_slot():
    layout = vk.Layout(vk.Frames(8, 16))
    for tile, slots in enumerate(tables(vk.FrameRule.window(1), layout)):
        (slot,) = slots
        assert slot[1] == [(16 * max(tile - 1, 0), 16 * min(tile + 2, 8))]


def test_heads_of_equal_rules_share_their_slots():
    layout = vk.Layout(vk.Frames(4, 16))
    table = torch.zeros(2, 4, 4)
    table[0].fill_diagonal_(-torch.inf)
    key = plan_key(vk.FrameRule.bias(table[[0, 1]]), layout)
    rule = key.rule_tables()
    assert rule.heads == 2
    for heads, equal in (([0, 1], False), ([0, 0], True)):
        own = dataclasses.replace(rule, offset=rule.offset[heads])
        runs = layout.run_table().tolist()
        found = frames_slots.tile_tables(runs, runs, own, rows=16, ordered=False)
        assert torch.equal(found.tiles[0], found.tiles[1]) == equal


def test_a_band_is_a_range_of_each_frame():
    layout = vk.Layout(vk.Frames(2, 64))
    found = tables(vk.FrameRule.band(3), layout)
    assert found[1] == [(0, [(13, 35), (77, 99)])]


def test_interleaved_frames_are_taken_in_order():
    layout = vk.Layout(*[vk.Frames(4, 8)] * 8)  # a frame's tokens lie in eight runs
    found = tables(vk.FrameRule.window(0), layout)
    assert found[5] == [(1, [(64, 128)])]
    assert plan_key(None, layout).ordered
    assert not plan_key(None, vk.Layout(vk.Frames(4, 64), vk.Frames(1, 64, first=2))).ordered


def test_a_plan_is_found_again_by_the_contents_of_the_rule():
    layout = vk.Layout(vk.Frames(3, 16), vk.Text(2))
    first, again = (plan_key(vk.FrameRule.tar(1.0), layout) for _ in range(2))
    assert first == again
    assert hash(first) == hash(again)
    assert first != plan_key(vk.FrameRule.tar(1.1), layout)
    assert frames._forward_plan(first, torch.device("cpu")) is frames._forward_plan(
        again, torch.device("cpu")
    )


def test_plans_are_made_on_the_cpu_whatever_the_default_device():
    key = plan_key(vk.FrameRule.tar(1.0), vk.Layout(*[vk.Frames(4, 8)] * 8, vk.Text(3)))
    key = key._replace(options=key.options._replace(mean_map="mean"))
    torch.set_default_device("meta")
    try:
        made = frames._forward_plan(key, torch.device("cpu"))
    finally:
        torch.set_default_device(None)
    assert {
        x.device.type
        for x in [*made.launch.tables.in_use().values(), *made.map.launch.tables.in_use().values()]
    } == {"cpu"}


class OnGPU:
    """Stands for a table on a GPU: it notes which streams its memory waits for."""

    device = torch.device("cuda")

    def __init__(self):
        self.waits_for = []

    def record_stream(self, stream):
        self.waits_for.append(stream.cuda_stream)


def test_tables_of_a_forgotten_plan_outlive_the_kernels_that_read_them(monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.cuda_stream == 3)
    monkeypatch.setattr(devices, "CAPTURED", set())
    made = devices.DeviceTables({"slots": OnGPU(), "ranges": OnGPU()})
    for number in (1, 2, 1, 2):
        stream.cuda_stream = number
        assert made.in_use() is made.tensors
    assert [table.waits_for for table in made.tensors.values()] == [[1, 2], [1, 2]]
    assert not devices.CAPTURED
    stream.cuda_stream = 3  # a graph is captured, which reads them whenever it is replayed
    made.in_use()
    assert {made} == devices.CAPTURED


# ---- what kernels must not do ----


def test_values_of_any_size():
    """Partial outputs in 16 bits have the range of bfloat16 all the same."""
    layout = vk.Layout(vk.Frames(3, 16))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 48, 1, 16).bfloat16() for _ in range(3))
    rule = vk.FrameRule.tar(1.0, stat="row_max")
    expected = run(query, key, value, layout, rule)
    for size in (2.0**100, 2.0**-60):
        found = run(query, key, value * size, layout, rule)
        torch.testing.assert_close(found / size, expected, rtol=0, atol=0)


def test_keys_that_do_not_exist_may_hold_anything():
    layout = vk.Layout(vk.Frames(2, 16), vk.Text(10))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 42, 1, 16).unbind()
    lengths = torch.tensor([35, 42], dtype=torch.int32)
    rule = vk.FrameRule.tar(1.0)
    expected = run(query, key, value, layout, rule, key_lengths=lengths)
    key[0, 35:], value[0, 35:] = NAN, NAN
    found = run(query, key, value, layout, rule, key_lengths=lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_nan_stays_in_its_row():
    layout = vk.Layout(vk.Frames(3, 16))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 48, 1, 16).unbind()
    query[0, 20] = NAN
    found = run(query, key, value, layout, vk.FrameRule.tar(1.0))
    assert found[0, 20].isnan().all()
    assert found[0, :20].isfinite().all()
    assert found[0, 21:].isfinite().all()


def test_reasons_name_what_is_missing():
    layout = vk.Layout(vk.Frames(2, 4))
    x = torch.zeros(1, 8, 1, 16, device=DEVICE)

    def why_not(*tensors, rule=None):
        return frames.why_not(check_call(*tensors, layout, rule))

    assert why_not(x, x, x) == []
    assert why_not(*[x.double()] * 3)[0].startswith("takes torch.float32")
    table = torch.zeros(2, 2, requires_grad=True)
    (reason,) = why_not(x, x, x, rule=vk.FrameRule.bias(table, stat="row_max"))
    assert "gradient of the rule's tables" in reason
