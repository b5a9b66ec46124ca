"""The C++ kernels against the oracle, on each instruction set that can execute here."""

import pytest
import torch
import torch.nn.functional as F

import vstar_kernels as vk
from tests.attention.frames import cases
from tests.fuzz.guarded import Guarded
from tests.helpers import on_threads, run_python
from tests.pairwise import pairwise, some
from vstar_kernels.attention import native
from vstar_kernels.attention.frames import cpu
from vstar_kernels.attention.frames.call import TENSORS, check_call
from vstar_kernels.cli.measure import CLEAR_REFS
from vstar_kernels.testing import assert_frames

pytestmark = pytest.mark.usefixtures("several_threads", "poison")
NAN, INF = float("nan"), float("inf")
R = vk.FrameRule


def attend(*arguments, **options):
    return vk.frame_attention(*arguments, backend="cpu", **options)


def inputs(layout, *, keys=None, batch=2, heads=2, head_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens):
        return torch.randn(batch, tokens, heads, head_dim, generator=generator).to(dtype)

    tokens = layout.tokens if keys is None else keys.tokens
    return draw(layout.tokens), draw(tokens), draw(tokens)


# A frame of 130 tokens is in two chunks of keys; the formula of all its pairs takes its time.
LONG = cases.OPTIONS | {"tokens": [130], "heads": [(2, 1)], "layout": ["text first", "one frame"]}


@pytest.mark.parametrize(
    ("case", "isa_in_turn"),
    [(case, i) for i, case in enumerate([*pairwise(cases.OPTIONS), *some(LONG, 28)])],
    indirect=["isa_in_turn"],
    ids=lambda x: cases.identify(x) if isinstance(x, dict) else str(x),
)
@pytest.mark.usefixtures("isa_in_turn")
def test_options(case):
    arguments, options = cases.make(case)
    assert_frames(attend(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", ["tar row_max", "tar, attenuated, band, bias"])
def test_given_statistic(name, clamp, isa):
    layout = vk.Layout(vk.Frames(3, 50), vk.Text(2))
    q, k, v = inputs(layout)
    rule = cases.with_given_statistic(cases.RULES[name](layout, None, 2), q)
    rule = R(rule.terms, stat=rule.stat, clamp_negative=clamp)
    assert_frames(attend(q, k, v, layout, rule), q, k, v, layout, rule)


@pytest.mark.parametrize("head_dim", [1, 7, 72, 160, 256])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_head_dims(head_dim, dtype, isa):
    layout = vk.Layout(vk.Frames(3, 13))
    q, k, v = inputs(layout, head_dim=head_dim, dtype=dtype)
    rule = R.tar(1.0)
    assert_frames(attend(q, k, v, layout, rule), q, k, v, layout, rule)


@pytest.mark.parametrize("rule", [None, R.tar(1.0), R.tar(1.0, stat="row_max"), R.window(1)])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_long(rule, dtype):
    """Several blocks of queries, several chunks of each frame, and their sums."""
    layout = vk.Layout(vk.Text(30), vk.Frames(4, 300))
    q, k, v = inputs(layout, batch=1, head_dim=64, dtype=dtype)
    options = {"return_map": True}
    assert_frames(attend(q, k, v, layout, rule, **options), q, k, v, layout, rule, **options)


def test_many_frames():
    """More accumulators than the second cache holds; blocks that many frames share."""
    layout = vk.Layout(vk.Frames(130, 3))
    q, k, v = inputs(layout, batch=1, head_dim=80)
    for rule in (R.tar(2.0), R.tar(2.0, stat="none"), R.window(1)):
        options = {"return_map": True, "map_heads": True}
        assert_frames(attend(q, k, v, layout, rule, **options), q, k, v, layout, rule, **options)


@pytest.mark.parametrize("tokens", [128, 256, 384])
def test_frames_that_fill_chunks_of_keys(tokens, isa):
    """Half of 256 is no whole number of AVX2's tiles of six, and no chunk has room for more."""
    layout = vk.Layout(vk.Frames(1, tokens))
    tensors = inputs(layout, batch=1)
    assert_frames(attend(*tensors, layout), *tensors, layout)


def test_without_a_rule_is_sdpa():
    layout = vk.Layout(vk.Frames(4, 99))
    q, k, v = inputs(layout, head_dim=64)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(
        attend(q, k, v, layout).double(), expected.transpose(1, 2), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("stat", ["row_max", "frame_max"])
def test_one_token_a_frame_is_tar_attention(stat, isa):
    layout = vk.Layout(vk.Frames(33, 1))
    q, k, v = inputs(layout)
    expected = vk.tar_attention(q, k, v, vk.GaussianBias(1.5, strength=0.7), backend="cpu")
    out = attend(q, k, v, layout, R.tar(1.5, 0.7, stat=stat))
    torch.testing.assert_close(out, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("rule", [None, R.window(1), R.tar(1.0), R.tar(1.0, stat="row_max")])
@pytest.mark.parametrize("value", [1e37, -3.4e38, 1e-30])
def test_large_values(value, rule, isa):
    """No sum on the way to a mean of values overflows."""
    layout = vk.Layout(vk.Frames(3, 70))
    q, k, v = inputs(layout)
    out = attend(q, k, torch.full_like(v, value), layout, rule)
    torch.testing.assert_close(out, torch.full_like(v, value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [30.0, 1e4])
@pytest.mark.parametrize("stat", ["row_max", "frame_max", "none"])
def test_weights_beyond_the_exponentials_range(strength, stat):
    """A frame's weight may be e^1000 times another's, though its logits are as much below."""
    layout = vk.Layout(vk.Frames(3, 40))
    q, k, v = inputs(layout)
    rule = R.tar(0.7, strength, stat=stat)
    assert_frames(attend(q, 8 * k, v, layout, rule), q, 8 * k, v, layout, rule)


@pytest.mark.parametrize("rule", [R.window(0), R.bias(torch.tensor([[0.0, -INF], [0.0, 0.0]]))])
def test_masked_frames_are_not_read(rule, isa):
    """NaN where no query of a block looks would show in the block's rows otherwise."""
    layout = vk.Layout(vk.Frames(2, 256))
    q, k, v = inputs(layout, batch=1)
    expected = attend(q, k, v, layout, rule)
    k[:, 256:], v[:, 256:] = NAN, NAN
    assert torch.equal(attend(q, k, v, layout, rule)[:, :256], expected[:, :256])


def test_bands_are_not_read_around():
    layout = vk.Layout(vk.Frames(1, 1024))
    q, k, v = inputs(layout, batch=1)
    expected = attend(q, k, v, layout, R.band(100))
    k[:, 900:], v[:, 900:] = NAN, NAN
    out = attend(q, k, v, layout, R.band(100))
    assert torch.equal(out[:, :512], expected[:, :512])
    assert out[:, 800:].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("stat", ["none", "row_max", "frame_max"])
def test_containment(value, stat):
    """Not finite in a query stays in its row, in a key or value in its sequence and head."""
    layout = vk.Layout(vk.Frames(3, 50), vk.Text(3))
    clean, rule = inputs(layout), R.tar(1.0, stat=stat)
    expected = attend(*clean, layout, rule)
    for which in range(3):
        tensors = [x.clone() for x in clean]
        tensors[which][1, 4, 1, 5] = value
        out = attend(*tensors, layout, rule)
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[1, 4 if which == 0 else slice(None), 1] = True
        assert torch.equal(out[~touched], expected[~touched])
        if value != value:
            columns = slice(5, 6) if which == 2 else slice(None)
            assert out[1, 4 if which == 0 else slice(None), 1][..., columns].isnan().all()


@pytest.mark.parametrize("rule", [None, R.tar(1.0), R.causal(1), R.window(1) + R.band(9)])
def test_bits_do_not_depend_on_threads(rule):
    layout = vk.Layout(vk.Frames(5, 67), vk.Text(9))
    q, k, v = inputs(layout, batch=1)
    results = []
    for threads in (1, 2, 5):
        with on_threads(threads):
            results.append(attend(q, k, v, layout, rule, return_map=True))
    for out, mean_map in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(mean_map, results[0][1])


def test_bits_do_not_depend_on_strides_and_heads(isa):
    layout = vk.Layout(vk.Frames(3, 37))
    q, k, v = inputs(layout)
    expected = attend(q, k, v, layout, R.tar(1.0))
    for change in cases.STRIDES.values():
        if change is not cases.STRIDES["expanded"]:
            assert torch.equal(attend(*map(change, (q, k, v)), layout, R.tar(1.0)), expected)
    one = [x[1:, :, :1] for x in (q, k, v)]
    assert torch.equal(attend(*one, layout, R.tar(1.0)), expected[1:, :, :1])


@pytest.mark.parametrize("flush_end", [True, False])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_nothing_is_touched_outside(dtype, flush_end, isa, monkeypatch):
    """Every tensor ends at a page that no one may touch, or begins after one."""
    layout = vk.Layout(vk.Frames(2, 21), vk.Text(2))
    blocks = [Guarded(1 << 16) for _ in range(5)]
    tensors = inputs(layout, head_dim=19, dtype=dtype)
    expected = attend(*tensors, layout, R.tar(1.0), return_map=True)
    q, k, v = (block.copy(x, flush_end) for block, x in zip(blocks[:3], tensors, strict=True))

    def guarded(block, x):
        return block.tensor(tuple(x.shape), x.stride(), x.dtype, flush_end)

    with monkeypatch.context() as patched:
        patched.setattr(cpu, "empty_like", lambda x: guarded(blocks[3], x))
        patched.setattr(torch, "empty", lambda shape, **_: guarded(blocks[4], expected[1]))
        out, mean_map = attend(q, k, v, layout, R.tar(1.0), return_map=True)
    for block, result, wanted in zip(blocks[3:], (out, mean_map), expected, strict=True):
        assert block.holds(result)
        assert torch.equal(result, wanted)
    assert all(block.untouched() for block in blocks)


def test_errors():
    layout = vk.Layout(vk.Frames(2, 4))
    q, k, v = inputs(layout)
    with pytest.raises(ValueError, match=r"takes torch\.float32.*query is torch\.float64"):
        attend(q.double(), k.double(), v.double(), layout)
    with pytest.raises(ValueError, match="key has stride 2 in it"):
        attend(q, torch.stack([k, k], -1)[..., 0], v, layout)
    with pytest.raises(ValueError, match="no gradients of rules with factors"):
        attend(q, k, v.requires_grad_(), layout, R.attenuate(0.6, 0))
    with torch.no_grad():
        attend(q, k, v, layout, R.attenuate(0.6, 0))


def test_operator_refuses_what_would_leave_its_tensors():
    layout = vk.Layout(vk.Frames(2, 4))
    call = check_call(*inputs(layout), layout, R.tar(1.0), return_map=True)
    good = {name: getattr(call, name) for name in TENSORS}
    runs = call.query_runs
    bad = {
        "key": call.key[:, :7],
        "value": call.value[:, :7],
        "query": call.query[:1],
        "key_lengths": torch.tensor([1, 2]),
        "stat": torch.zeros(2, 8, 2),
        "query_runs": runs + torch.tensor([[0, 1, 0, 0]], dtype=torch.int32),
        "key_runs": runs[:1],
        "delta": call.delta[:1],
        "offset": call.delta.double(),
        "factor": call.delta,
        "band": torch.zeros(2, 2, 1, dtype=torch.int32),
    }
    for name, value in bad.items():
        arguments = {**good, name: value}
        with pytest.raises(RuntimeError):
            torch.ops.vstar_kernels.cpu_frames_forward(
                call.query.clone(), None, *arguments.values(), 2, False, 1.0, False
            )
    gap = runs.clone()
    gap[1, 3] = 1
    with pytest.raises(RuntimeError, match="number their frames"):
        torch.ops.vstar_kernels.cpu_frames_forward(
            call.query.clone(), None, *{**good, "key_runs": gap}.values(), 2, False, 1.0, False
        )


MEMORY = """
import torch
import vstar_kernels as vk
from vstar_kernels.cli.measure import read_peak_memory, reset_peak_memory

torch.set_num_threads(2)
cpu = torch.device("cpu")
layout, short = vk.Layout(vk.Frames(16, 512)), vk.Layout(vk.Frames(16, 8))
options = dict(backend="cpu", return_map=True)
inputs = torch.randn(3, 1, 8192, 1, 128)
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = inputs.to(dtype).unbind()
    for stat in ("frame_max", "none"):
        rule = vk.FrameRule.tar(1.0, stat=stat)
        vk.frame_attention(q[:, :128], k[:, :128], v[:, :128], short, rule, **options)
        assert reset_peak_memory(cpu)
        before = read_peak_memory(cpu)
        out, _ = vk.frame_attention(q, k, v, layout, rule, **options)
        beside = read_peak_memory(cpu) - before - out.nbytes
        assert beside <= (16 << 20) + 2 * (4 << 20), (dtype, stat, beside)
        del out
"""


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak cannot be reset")
def test_memory():
    """The output, 16 MiB and 4 MiB for each thread."""
    run = run_python(MEMORY)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("backend", ["cpu", "composed"])
def test_biases_up_to_1e38(backend):
    layout = vk.Layout(vk.Text(3), vk.Frames(3, 9))
    table = torch.tensor([[1e38, -1e38, 1e38], [-1e38, -1e38, -1e38], [0.0, -1e38, -INF]])
    tensors = inputs(layout)
    found = vk.frame_attention(*tensors, layout, R.bias(table), backend=backend)
    assert_frames(found, *tensors, layout, R.bias(table))
