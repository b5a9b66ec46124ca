"""What rules say of pairs of frames: against formulas, one a published method, written here."""

import json
import math
import pickle

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases

R = vk.FrameRule
INF = math.inf


def inputs(tokens, heads=2, dim=8, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = (tokens, *[tokens if keys is None else keys] * 2)
    return [torch.randn(2, n, heads, dim, generator=generator).double() for n in lengths]


def dense(q, k, v, change):
    """Attention whose scaled logits, (batch, heads, tokens, keys), went through ``change``."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", change(logits).softmax(-1), v)


def masked(keep):
    return lambda logits: logits.masked_fill(~keep, -INF)


def check(layout, rule, change, *, key_layout=None, heads=2):
    """The rule gives what ``change`` of the logits gives, to float32 tables' rounding."""
    keys = None if key_layout is None else key_layout.tokens
    q, k, v = inputs(layout.tokens, heads=heads, keys=keys)
    out = vk.frame_attention(q, k, v, layout, rule, key_layout=key_layout, backend="reference")
    torch.testing.assert_close(out, dense(q, k, v, change), rtol=1e-6, atol=1e-6)


def grid(frames, tokens, *, text_after=0):
    """The frame and the place of each token of (frames, tokens), −1 for text behind them."""
    f = torch.arange(frames).repeat_interleave(tokens)
    p = torch.arange(tokens).repeat(frames)
    text = torch.full((text_after,), -1)
    return torch.cat([f, text]), torch.cat([p, text])


# ---- published methods ----


@pytest.mark.parametrize("stat", ["frame_max", "row_max", "none"])
def test_vstar_tar(stat):
    """VSTAR (2403.13501): φ + strength · m · exp(−df²/2σ²)."""
    f, _ = grid(5, 3)

    def change(phi):
        means = torch.stack([phi[..., f == g].logsumexp(-1) - math.log(3) for g in range(5)], -1)
        m = {"frame_max": means, "row_max": phi, "none": torch.ones_like(phi)}[stat]
        bias = torch.exp(-((f[:, None] - f) ** 2) / (2 * 1.3**2))
        return phi + 0.8 * m.amax(-1, keepdim=True) * bias

    check(vk.Layout(vk.Frames(5, 3)), R.tar(1.3, 0.8, stat), change)


def test_vstar_transfer_of_dynamics():
    """VSTAR, Fig. 8: the similarity of a real video's frames as Δ."""
    similarity = torch.rand(4, 4)
    f, _ = grid(4, 3)

    def change(phi):
        return phi + phi.amax(-1, keepdim=True) * similarity.double()[f[:, None], f]

    check(vk.Layout(vk.Frames(4, 3)), R.bias(similarity, stat="row_max"), change)


@pytest.mark.parametrize(("window", "tokens"), [(2, 1), (3, 4), (5, 5), (3, 5)])
def test_ultravico(window, tokens):
    """UltraViCo (2511.20123): positive logits with |i − j| > W · P / 2 times α; frame 0 sees W."""
    frames = 7
    i = torch.arange(frames * tokens)
    f = i // tokens
    far = (i[:, None] - i).abs() > window * tokens / 2
    hidden = (f[:, None] == 0) & (f >= window)

    def change(phi):
        return torch.where(far & (phi > 0), 0.9 * phi, phi).masked_fill(hidden, -INF)

    rule = R.attenuate(0.9, window, metric="token") + R.horizon(window)
    check(vk.Layout(vk.Frames(frames, tokens)), rule, change)


def test_a_horizon_is_that_of_the_clip():
    """Wherever the first frames lie, and for a part of the clip with a cache of keys."""
    keep = torch.ones(5, 5, dtype=torch.bool)
    keep[:2, 3:] = False
    layout, last = vk.Layout(vk.Frames(5, 1)), vk.Layout(vk.Frames(4, 1, first=1))
    back = vk.Layout(vk.Frames(5, 1, first=4, step=-1))
    rule = R.horizon(3, queries=2)
    for query, key, expected in (
        (layout, layout, keep),
        (last, layout, keep[1:]),
        (back, back, keep.flip(0, 1)),
    ):
        assert torch.equal(rule.tables(query, key).offset == 0, expected)
    assert R.horizon(3, queries=0).tables(layout) == R().tables(layout)
    assert R.horizon(3, queries=9).tables(layout).offset.isinf().sum() == 10


def test_ultravico_bands():
    """UltraViCo on HunyuanVideo: β where the model repeats itself, α elsewhere far; not on text."""
    f, _ = grid(12, 2, text_after=3)
    video = (f[:, None] >= 0) & (f >= 0)
    df = (f[:, None] - f).abs()
    factor = torch.where(df > 2.5, 0.9, 1.0)
    factor = torch.where(((df >= 4) & (df <= 5)) | ((df >= 9) & (df <= 10)), 0.6, factor)
    factor = torch.where(video, factor, 1.0).double()
    rule = R.attenuate(0.9, 5, bands=((4, 5), (9, 10)), beta=0.6)
    layout = vk.Layout(vk.Frames(12, 2), vk.Text(3))
    check(layout, rule, lambda phi: torch.where(phi > 0, phi * factor, phi))


@pytest.mark.parametrize("step", range(6))
def test_lvsa(step):
    """LVSA (2605.31057): first frames, a grid of keyframes that rotates with the steps, ±W."""
    frames, interval, first, w = 11, 4, 1, 1
    anchors = {(step + i * interval) % frames for i in range(math.ceil(frames / interval))}
    anchors |= set(range(first))
    f, _ = grid(frames, 3)
    keep = ((f[:, None] - f).abs() <= w) | torch.tensor([int(g) in anchors for g in f])
    check(vk.Layout(vk.Frames(frames, 3)), R.keyframes(first, interval, step, w), masked(keep))


@pytest.mark.parametrize(("tokens", "block", "neighbour"), [(40, 4, 1.0), (17, 8, 0.5), (5, 1, 1)])
def test_radial_attention(tokens, block, neighbour):
    """Radial Attention (2506.19852): a width that halves as df doubles; far frames thinned out."""
    frames = 13
    keep = torch.zeros(frames, tokens, frames, tokens, dtype=torch.bool)
    place = torch.arange(tokens)
    apart = (place[:, None] - place).abs()
    for i in range(frames):
        for j in range(frames):
            n = abs(i - j)
            length = 2 ** len(f"{tokens:b}") / 2 ** (len(f"{n:b}") if n else 0)
            width = max(length, block) if n > 1 else tokens * (neighbour if n else 1)
            kept = length >= block or n % int(block / length) == 0
            keep[i, :, j] = (apart <= width) if kept and j else torch.tensor(j == 0)
    keep = keep.flatten(0, 1).flatten(1)
    rule = R.radial(block=block, neighbour=neighbour)
    check(vk.Layout(vk.Frames(frames, tokens)), rule, masked(keep), heads=1)


def test_sparse_videogen():
    """Sparse VideoGen (2502.01776): spatial heads see near frames, temporal ones near places."""
    f, p = grid(6, 8, text_after=2)
    text = (f[:, None] < 0) | (f < 0)
    spatial = text | ((f[:, None] - f).abs() <= 1)
    temporal = text | ((p[:, None] - p).abs() <= 2)
    layout = vk.Layout(vk.Frames(6, 8), vk.Text(2))
    check(layout, R.window(1), masked(spatial))
    check(layout, R.band(2), masked(temporal))


@pytest.mark.parametrize("sink", [0, 2])
def test_freeloc_tiers(sink):
    """FreeLOC (2603.25209): near frames whole, farther ones in a band, the first ones whole."""
    f, p = grid(9, 8, text_after=2)
    df, apart = (f[:, None] - f).abs(), (p[:, None] - p).abs()
    keep = (df <= 1) | ((df <= 4) & (apart <= 2)) | (f < sink) | (f[:, None] < 0) | (f < 0)
    rule = R.window(4, sink=sink) + R.band(2, beyond=1, sink=sink)
    check(vk.Layout(vk.Frames(9, 8), vk.Text(2)), rule, masked(keep))


def test_heads_may_differ_in_the_frames_that_they_see():
    f, _ = grid(5, 3)
    frame = torch.arange(5)
    tables = [torch.where((frame[:, None] - frame).abs() <= w, 0.0, -INF) for w in (0, 2)]
    keep = torch.stack([(f[:, None] - f).abs() <= w for w in (0, 2)])
    check(vk.Layout(vk.Frames(5, 3)), R.bias(torch.stack(tables)), masked(keep))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_skyreels_is_causal_by_blocks(block):
    """SkyReels-V2: a block of frames sees itself and what is before; with a cache of keys too."""
    f, _ = grid(7, 2)
    check(vk.Layout(vk.Frames(7, 2)), R.causal(block), masked(f // block <= (f // block)[:, None]))
    last = f >= 4
    keep = f // block <= (f[last] // block)[:, None]
    check(
        vk.Layout(vk.Frames(3, 2, first=4)), R.causal(block), masked(keep),
        key_layout=vk.Layout(vk.Frames(7, 2)),
    )  # fmt: skip


def test_streaming_llm_sink_and_window():
    """StreamingLLM (2309.17453), LongLive: the first frames, and those just before."""
    f, _ = grid(9, 2)
    df = f[:, None] - f
    keep = (df >= 0) & ((df <= 2) | (f < 2))
    check(vk.Layout(vk.Frames(9, 2)), R.window(2, sink=2) + R.causal(), masked(keep))


@pytest.mark.parametrize("w", [0.5, None])
def test_prompt_relay(w):
    """Prompt Relay (2604.10030): each prompt's tokens are penalised outside of its segment."""
    segments, sigma, lengths = [(0, 3), (4, 5), (6, 9)], 0.7, (4, 2, 5)
    prompts = vk.Layout(vk.Text(3), *(vk.Frames(1, n, first=i) for i, n in enumerate(lengths)))
    f, _ = grid(10, 2)
    bias = torch.zeros(20, prompts.tokens, dtype=torch.float64)
    start = 3
    for (first, last), length in zip(segments, lengths, strict=True):
        half = (last - first) / 2 if w is None else w
        past = torch.relu((f - (first + last) / 2).abs() - half)
        bias[:, start : start + length] = (-(past**2) / (2 * sigma**2))[:, None]
        start += length
    rule = R.relay(segments, w, sigma)
    check(vk.Layout(vk.Frames(10, 2)), rule, lambda phi: phi + bias, key_layout=prompts)


def test_dymos_weakens_the_first_frame():
    """DyMoS (2605.19398): all frames but the first pay the first γ times the attention."""
    f, _ = grid(4, 3, text_after=2)
    weaker = (f[:, None] > 0) & (f == 0)
    layout = vk.Layout(vk.Frames(4, 3), vk.Text(2))
    check(layout, R.reference(0.3), lambda phi: phi + math.log(0.3) * weaker.double())


def test_the_rule_is_of_coordinates_not_of_places_in_the_sequence():
    """LTX appends its conditions: the last tokens are those of an early frame."""
    layout = vk.Layout(vk.Frames(3, 2, first=1), vk.Frames(1, 2))
    t = torch.tensor([1, 1, 2, 2, 3, 3, 0, 0])
    keep = ((t[:, None] - t).abs() <= 1) | (t == 0)
    check(layout, R.window(1, sink=1), masked(keep))
    check(layout, R.causal(2), masked(t // 2 <= (t // 2)[:, None]))


# ---- composition ----


def test_biases_add_masks_are_all_obeyed_and_factors_multiply():
    layout, keys = vk.Layout(vk.Frames(4, 3)), vk.Layout(vk.Frames(5, 3))
    a, b = cases.table(layout, keys), cases.table(layout, keys, 3, seed=4)
    tables = (R.bias(a, 2.0) + R.bias(b)).tables(layout, keys)
    torch.testing.assert_close(tables.offset, 2 * a + b)
    tables = (R.tar(1.0, 0.3, "row_max") + R.bias(a, 0.5, "row_max") + R.bias(b)).tables(
        layout, keys
    )
    distance = torch.arange(5.0) - torch.arange(4.0)[:, None]
    torch.testing.assert_close(tables.delta, 0.3 * torch.exp(-(distance**2) / 2) + 0.5 * a)
    torch.testing.assert_close(tables.offset, b)
    tables = (R.window(1) + R.causal() + R.bias(a)).tables(layout, keys)
    keep = (distance <= 0) & (distance >= -1)
    torch.testing.assert_close(tables.offset, a.masked_fill(~keep, -INF))
    tables = (R.attenuate(0.5, 2) + R.attenuate(0.9, 4)).tables(layout, keys)
    far = distance.abs()
    expected = torch.where(far > 1, 0.5, 1.0) * torch.where(far > 2, 0.9, 1.0)
    torch.testing.assert_close(tables.factor, torch.stack([expected, torch.ones(4, 5)]))
    tables = (R.band(2) + R.band(1)).tables(layout, keys)
    assert tables.band.tolist() == [[[-1] * 5] * 4, [[1] * 5] * 4]


def test_what_changes_nothing_has_no_tables():
    layout = vk.Layout(vk.Frames(4, 3), vk.Text(2))
    nothing = [
        R(), R() + R(), R.tar(1.0, 0.0), R.tar(1.0, 0.0, "none"), R.window(3), R.band(2),
        R.attenuate(1.0, 2), R.attenuate(0.5, 8), R.attenuate(0.5, 8, metric="token"),
        R.reference(1.0), R.bias(torch.zeros(4, 4)), R.causal(4),
        R.bias(torch.full((4, 4), -INF), 0.0),
    ]  # fmt: skip
    for rule in nothing:
        assert rule.tables(layout) == (None,) * 5, rule


def test_statistics_of_a_sum():
    assert (R.window(1) + R.tar(1.0)).stat == "frame_max"
    assert (R.tar(1.0) + R.window(1)).stat == "frame_max"
    assert (R.tar(1.0, clamp_negative=True) + R.bias(torch.zeros(2, 2))).clamp_negative
    stat = torch.randn(2, 6, 2)
    assert (R.tar(1.0, stat=stat) + R.bias(torch.zeros(2, 2), stat=stat)).stat is stat
    for a, b in [
        (R.tar(1.0), R.tar(1.0, stat="row_max")),
        (R.tar(1.0), R.tar(1.0, clamp_negative=True)),
        (R.tar(1.0, stat=stat), R.tar(1.0, stat=stat.clone())),
    ]:
        with pytest.raises(ValueError, match=r"statistic is the same, got '?(frame_max|a tensor)"):
            a + b


def test_tables_are_the_calls_own_numbers():
    layout, table = vk.Layout(vk.Frames(3, 2)), torch.rand(3, 3)
    rule, before = R.bias(table), table.clone()
    table.zero_()
    torch.testing.assert_close(rule.tables(layout).offset, before)
    assert rule == R.bias(before)
    assert hash(rule) == hash(R.bias(before))
    assert rule != R.bias(before, 2.0)
    trained = torch.rand(3, 3, requires_grad=True)
    rule = R.bias(trained) + R.window(1)
    first = rule.tables(layout).offset
    assert first.requires_grad
    with torch.no_grad():
        trained += 1
    difference = (rule.tables(layout).offset - first).detach()
    keep = (torch.arange(3)[:, None] - torch.arange(3)).abs() <= 1
    torch.testing.assert_close(difference[keep], torch.ones(int(keep.sum())))


def test_a_rule_can_be_copied_and_sent():
    rule = R.tar(1.0) + R.bias(torch.rand(3, 3)) + R.relay([(0, 1)], None, 1.0)
    assert pickle.loads(pickle.dumps(rule)) == rule


# ---- JSON ----

SAVED = {
    "nothing": lambda: R(),
    "identity": R.identity,
    "tar": lambda: R.tar(1.5, 0.7, "row_max", True),
    "masks": lambda: R.window(2, 1) + R.causal(2) + R.keyframes(1, 3, 2, 1) + R.band(3, 2, 1),
    "horizon": lambda: R.horizon(21, 2),
    "factors": lambda: R.attenuate(0.9, 21, bands=((46, 54), (96, 104)), beta=0.6),
    "tokens": lambda: R.attenuate(0.9, 21, metric="token") + R.reference(0.5, 1) + R.radial(0.5),
    "relay": lambda: R.relay([(0, 3), (4.5, 9)], None, 0.7) + R.relay([(0, 1)], 2, 0.7),
    "tables": lambda: R.bias(cases.masked(torch.randn(2, 3))) + R.bias(torch.rand(2, 2, 3), 0.3),
}


@pytest.mark.parametrize("name", SAVED)
def test_json_gives_the_rule_back(name):
    rule = SAVED[name]()
    assert R.from_json(rule.to_json()) == rule
    json.loads(rule.to_json(), parse_constant=pytest.fail)


def test_json_of_tensors():
    trained = R.bias(torch.ones(2, 2, requires_grad=True))
    assert R.from_json(trained.to_json()) == R.bias(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"stat is a tensor \(of shape \(2, 6, 2\)\)"):
        R.tar(1.0, stat=torch.zeros(2, 6, 2)).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "it must be a JSON object"),
        ('{"term": []}', "term: there is no such field"),
        ('{"stat": "map_max"}', "stat: .*'frame_max', 'row_max' or 'none'"),
        ('{"clamp_negative": 1}', "clamp_negative: .*boolean, got int"),
        ('{"terms": [{"term": "blur"}]}', r"terms\[0\].*term"),
        ('{"terms": [{"term": "causal"}]}', r"terms\[0\].*block: it is missing"),
        ('{"terms": [{"term": "causal", "block": 1.5}]}', r"block: .*integer, got float"),
        ('{"terms": [{"term": "causal", "block": true}]}', r"block: .*integer, got bool"),
        ('{"terms": [{"term": "causal", "block": 0}]}', r"terms\[0\]: block must be at least 1"),
        ('{"terms": [{"term": "causal", "block": 1, "w": 2}]}', r"w: there is no such field"),
        ('{"terms": [{"term": "window", "w": NaN, "sink": 0}]}', r"terms\[0\].w: NaN"),
        ('{"terms": [{"term": "window", "w": "1", "sink": 0}]}', r"w: .*number, got str"),
        ('{"terms": [{"term": "window", "w": 1, "w": 2, "sink": 0}]}', "it is there twice"),
        (
            '{"terms": [{"term": "table", "table": [[1], [1, 2]], "strength": 1, "by_stat":true}]}',
            r"terms\[0\]: the lists of a table must be of equal lengths",
        ),
        (
            '{"terms": [{"term": "table", "table": [[null]], "strength": 1, "by_stat": true}]}',
            r"terms\[0\]: table must be finite in float32, got -inf",
        ),
        (
            '{"terms": [{"term": "table", "table": [[-1e300]], "strength": 1, "by_stat": false}]}',
            r"terms\[0\]: .*too large for float32",
        ),
        (
            '{"terms": [{"term": "relay", "segments": [[1]], "w": null, "sigma": 1}]}',
            r"terms\[0\]: segments must be pairs",
        ),
        (
            '{"terms": [{"term": "identity"}, {"term": "causal", "block": 1}]}',
            "leaves no attention",
        ),
    ],
)
def test_json_is_read_strictly(text, message):
    with pytest.raises(ValueError, match=message):
        R.from_json(text)


# ---- errors ----


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R.tar(-1.0), "sigma must be at least 0, got -1.0"),
        (lambda: R.tar(1.0, INF), "strength must be finite.*got inf"),
        (lambda: R.tar(1.0, stat="map_max"), "'frame_max', 'row_max', 'none'.*'map_max'"),
        (lambda: R.tar(1.0, stat=torch.zeros(2).double()), "stat tensor must be float32"),
        (lambda: R.bias(torch.zeros(3)), r"\(F_q, F_k\) or \(heads, F_q, F_k\).*\(3,\)"),
        (lambda: R.bias(torch.zeros(3, 3).int()), "floating point, got torch.int32"),
        (lambda: R.bias(torch.full((2, 2), INF)), "finite in float32, or -inf to mask, got inf"),
        (
            lambda: R.bias(torch.full((2, 2), -INF), stat="row_max"),
            "must be finite in float32, got -inf",
        ),
        (
            lambda: R.bias(torch.full((2, 2), -1e300, dtype=torch.float64)),
            "finite in float32.*got -1e.300",
        ),
        (
            lambda: R.bias(torch.nested.as_nested_tensor([torch.eye(2)])),
            "table must be an ordinary .strided. tensor, got a nested one",
        ),
        (lambda: R.bias(torch.eye(2).to_sparse()), "table must be an ordinary .strided. tensor"),
        (lambda: R.bias(torch.ones(2, 2, device="meta")), "meta device and holds no numbers"),
        (
            lambda: R.bias(torch.ones(2, 2, device="meta", requires_grad=True)),
            "meta device and holds no numbers",
        ),
        (lambda: R.tar(1.0, stat=torch.ones(1, 2, 3).to_sparse()), "ordinary .strided. tensor"),
        (lambda: R.window(1, sink=2**70), "sink must be at most 2147483647, got 1180591620717411"),
        (lambda: R.band(10**400), "width must be at most 2147483647, got an integer of 1329 bits"),
        (lambda: R.radial(block=10**400), "block must be at most"),
        (lambda: R.window(-1), "w must be at least 0, got -1"),
        (lambda: R.window(1, sink=-1), "sink must be at least 0, got -1"),
        (lambda: R.band(-1), "width must be at least 0, got -1"),
        (lambda: R.band(1, beyond=-1), "beyond must be at least 0, got -1"),
        (lambda: R.band(1, sink=-1), "sink must be at least 0, got -1"),
        (lambda: R.causal(0), "block must be at least 1, got 0"),
        (lambda: R.keyframes(1, 0), "interval must be at least 1, got 0"),
        (lambda: R.horizon(0), "frames must be at least 1, got 0"),
        (lambda: R.horizon(1, -1), "queries must be at least 0, got -1"),
        (lambda: R.attenuate(-0.1, 21), "alpha must be at least 0, got -0.1"),
        (lambda: R.attenuate(0.9, 21, metric="pixel"), "'frame' or 'token', got 'pixel'"),
        (lambda: R.attenuate(0.9, 21, bands=((1, 2),)), "bands and beta.*beta=None"),
        (lambda: R.attenuate(0.9, 21, beta=0.1), r"bands and beta.*bands=\(\)"),
        (lambda: R.attenuate(0.9, 21, bands=((3, 2),), beta=0.1), r"got \(3, 2\)"),
        (lambda: R.attenuate(0.9, 21, bands=(3,), beta=0.1), "bands must be pairs.*got 3"),
        (lambda: R.attenuate(0.9, 21, ((1, 2),), 0.1, "token"), "bands need metric='frame', got 1"),
        (lambda: R.attenuate(0.9, 1, metric="token"), "window must be at least 2 frames.*got 1"),
        (lambda: R.reference(0.0), "gamma must be above 0, got 0.0"),
        (lambda: R.radial(block=0), "block must be at least 1, got 0"),
        (lambda: R.relay([], 1, 1), "segments must hold at least one"),
        (lambda: R.relay([(3, 2)], 1, 1), r"\(first, last\) coordinates, got \(3, 2\)"),
        (lambda: R.relay([(0, 1)], 1, 0), "sigma must be above 0, got 0"),
        (lambda: R.identity() + R.window(1), "leaves no attention"),
        (lambda: R.window(1) + R.identity(), "leaves no attention"),
        (lambda: R((vk.FrameRule,)), "terms"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R.tar("1"), "sigma must be a number, got str"),
        (lambda: R.tar(1.0, clamp_negative=1), "clamp_negative must be True or False, got int"),
        (lambda: R.bias([[0.0]]), "table must be a torch.Tensor, got list"),
        (lambda: R.tar(1.0, stat=[0.0] * 999), "stat must be a string or a tensor, got list"),
        (lambda: R.causal(1.0), "block must be an integer, got float"),
        (lambda: R.window(1) + 1, "unsupported operand"),
        (lambda: R(3), "terms must be a tuple of terms, got int"),
        (lambda: R([]), "terms must be a tuple of terms, got list"),
        (lambda: R.attenuate(0.5, 2, 3, 0.5), "bands must be a sequence of pairs, got int"),
        (lambda: R.relay(None, 1, 1), "segments must be a sequence of pairs, got NoneType"),
    ],
)
def test_wrong_kinds(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (R.bias(torch.zeros(3, 4)), r"for 3 frames of queries and 4 of keys.*layouts have 4 and 4"),
        (
            R.bias(torch.zeros(4, 4, requires_grad=True)[:3]),
            r"for 3 frames of queries and 4 of keys",
        ),
        (R.reference(0.5, 4), "needs frame 4, the keys have 4"),
        (R.relay([(0, 1)] * 3, 1, 1), "3 segments.*the keys have 4"),
        (R.attenuate(0.5, 2, metric="token"), "one size, got frames of 2, 3 tokens"),
        (R.radial(), "one size, got frames of 2, 3 tokens"),
    ],
)
def test_a_rule_that_does_not_fit_its_layout(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.tables(vk.Layout(vk.Frames(3, 2), vk.Frames(1, 3, first=3)))


def test_spans_that_differ_cannot_be_added():
    layout = vk.Layout(vk.Frames(6, 2))
    one = R.attenuate(0.5, 2, metric="token")
    (one + one).tables(layout)
    for other in (R.attenuate(0.5, 3, metric="token"), R.attenuate(0.5, 2)):
        with pytest.raises(ValueError, match="factors of two terms hold for different tokens"):
            (one + other).tables(layout)


def test_radial_needs_whole_distances():
    with pytest.raises(ValueError, match="whole numbers"):
        R.radial().tables(vk.Layout(vk.Frames(3, 2, step=0.5)))


# ---- large numbers, and tables that change ----

LAYOUT = vk.Layout(vk.Text(1), vk.Frames(3, 2))
LARGE = 2**70  # in float32's range, but not in int64's


@pytest.mark.parametrize(
    "make",
    [
        lambda x: R.tar(x),
        lambda x: R.tar(1, x),
        lambda x: R.bias(torch.eye(3), x),
        lambda x: R.window(x),
        lambda x: R.band(1, x),
        lambda x: R.keyframes(1, 2, 0, x),
        lambda x: R.attenuate(x, 1),
        lambda x: R.attenuate(0.5, x, ((x, x),), x),
        lambda x: R.attenuate(0.5, x, metric="token"),
        lambda x: R.reference(x),
        lambda x: R.radial(x, x),
        lambda x: R.relay([(-x, x)] * 3, x, x),
    ],
)
def test_integers_are_the_floats_that_they_are(make):
    rule = make(LARGE)
    assert rule == make(float(LARGE))
    for found, expected in zip(rule.tables(LAYOUT), make(float(LARGE)).tables(LAYOUT), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    assert R.from_json(rule.to_json()) == rule


@pytest.mark.parametrize(
    "rule",
    [
        R.bias(torch.full((3, 3), 1e38), 1e30),
        R.bias(torch.full((3, 3), 3e38)) + R.bias(torch.full((3, 3), 3e38)),
        R.bias(torch.full((3, 3), -3e38)) + R.bias(torch.full((3, 3), -3e38)),
        R.tar(1.0, 3e38) + R.tar(1.0, 3e38),
        R.attenuate(1e38, 1) + R.attenuate(1e38, 1),
    ],
)
def test_terms_that_leave_float32_are_an_error(rule):
    with pytest.raises(ValueError, match="terms of the rule make numbers beyond float32"):
        rule.tables(LAYOUT)


@pytest.mark.parametrize("sigma", [1e-300, 1e-30])
def test_a_narrow_relay_costs_nothing_within_its_segment(sigma):
    offset = R.relay([(0, 0), (1, 1), (2, 2)], None, sigma).tables(LAYOUT).offset
    assert offset.diagonal().eq(0).all()
    assert (offset + torch.eye(3)).lt(0).sum() == 6
    assert offset.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("strength", [-2.0, 0.0, 3.0])
def test_infinities_of_a_table_mask_whatever_its_strength(strength, trained):
    table = torch.tensor([[1.0, -INF, 2.0]] * 3).requires_grad_(trained)
    offset = R.bias(table, strength).tables(LAYOUT).offset
    if strength == 0:
        assert offset is None or offset.eq(0).all()
    else:
        assert offset.tolist() == [[strength, -INF, 2 * strength]] * 3


@pytest.mark.parametrize("trained", [False, True])
def test_tables_of_unequal_heads_cannot_be_added(trained):
    rule = R.bias(torch.ones(2, 3, 3)) + R.bias(torch.ones(4, 3, 3).requires_grad_(trained))
    with pytest.raises(ValueError, match="same number of heads, got 2 and 4"):
        rule.tables(LAYOUT)


def test_a_table_that_is_frozen_after_it_was_trained_is_read_at_every_call():
    table = torch.nn.Parameter(torch.ones(3, 3))
    rule = R.bias(table)
    table.requires_grad_(False)
    assert rule.tables(LAYOUT).offset.eq(1).all()
    table.mul_(5)
    assert rule.tables(LAYOUT).offset.eq(5).all()
    assert rule != R.bias(torch.full((3, 3), 5.0))


def test_rules_with_a_statistic_can_be_compared():
    stat, other = torch.ones(2, 7, 4), torch.ones(2, 7, 4)
    assert R.tar(1.0, stat=stat) == R.tar(1.0, stat=stat)
    assert R.tar(1.0, stat=stat) != R.tar(1.0, stat=other)
    assert R.tar(1.0, stat=stat) != R.tar(1.0)
    assert hash(R.tar(1.0, stat=stat)) == hash(R.tar(1.0, stat=stat))
