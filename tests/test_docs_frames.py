"""What docs/frame-attention.md shows runs, and does what each published method's formula says."""

import ast
import math
import re

import pytest
import torch

import vstar_kernels as vk
from docs import make_frame_figures
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (ROOT / "docs/frame-attention.md").read_text(encoding="utf-8")
FRAMES, TOKENS, INF = 24, 16, math.inf
f, p = torch.arange(FRAMES).repeat_interleave(TOKENS), torch.arange(TOKENS).repeat(FRAMES)
df, dp = f - f[:, None], p - p[:, None]  # of the key from the query


def blocks(text, kind="python"):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def section(title):
    """The page from a heading, of ## or ###, to the next one of its rank or above."""
    heading = re.search(rf"^(##+) {re.escape(title)}\n", PAGE, re.MULTILINE)
    assert heading, title
    rest = PAGE[heading.end() :]
    end = re.search(
        rf"^#{{2,{len(heading[1])}}} ", rest, re.MULTILINE
    )  # a comment in code has one #
    return rest[: end.start()] if end else rest


@pytest.fixture(scope="module")
def begun():
    """The names that the page has made when it comes to the methods."""
    torch.manual_seed(0)
    names = {}
    exec(blocks(PAGE)[0], names)
    exec(blocks(section("Published methods"))[0], names)
    assert (names["frames"], names["tokens"]) == (FRAMES, TOKENS)
    return names


# ---- the methods' formulas, in float64 over all pairs of tokens ----


def dense(names, change, key="key", value="value"):
    """Attention whose logits, (batch, heads, tokens, keys), go through ``change``."""
    q, k, v = (names[x].double() for x in ("query", key, value))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", change(logits).softmax(-1), v)


def masked(keep):
    return lambda names: dense(names, lambda phi: phi.masked_fill(~keep, -INF))


def frame_max(phi):
    means = [phi[..., f == g].exp().mean(-1, keepdim=True).log() for g in range(FRAMES)]
    return torch.cat(means, -1).amax(-1, keepdim=True)


def tar(names):
    gaussian = torch.exp(-(df.double() ** 2) / 2)
    return dense(names, lambda phi: phi + 0.8 * frame_max(phi) * gaussian)


def dynamics(names):
    similarity = names["similarity"].double()[f[:, None], f]
    return dense(names, lambda phi: phi + frame_max(phi) * similarity)


def ultravico(names):
    i = torch.arange(FRAMES * TOKENS)
    far = (i - i[:, None]).abs() > 21 * TOKENS / 2
    hidden = (f[:, None] == 0) & (f >= 21)
    return dense(
        names,
        lambda phi: torch.where(far & (phi > 0), 0.9 * phi, phi).masked_fill(hidden, -INF),
    )


def radial():
    """A width of 2^(bits(P) − bits(n)) places, and below the block's width fewer frames."""
    keep = torch.zeros(len(f), len(f), dtype=torch.bool)
    for n in range(FRAMES):
        length = 2.0 ** (5 - n.bit_length())  # 16 has five binary digits
        width = TOKENS if n < 2 else max(length, 4)
        if length >= 4 or n % int(4 / length) == 0:
            keep |= (df.abs() == n) & (dp.abs() <= width)
    return keep | (f == 0)


def sparse_videogen(names):
    spatial, temporal = (df.abs() <= 1) | (f == 0), (dp.abs() <= 2) | (f == 0)
    return masked(torch.stack([spatial, temporal]))(names)


def prompt_relay(names):
    prompt = torch.tensor([-1] * 5 + [0] * 8 + [1] * 8 + [2] * 8)
    middle = 3.5 + 8 * prompt
    past = torch.relu((f[:, None] - middle).abs() - 3.5).double()
    penalty = torch.where(prompt < 0, 0.0, past**2 / (2 * 2.0**2))
    return dense(names, lambda phi: phi - penalty, "text_key", "text_value")


def dymos(names):
    """The attention to frame 0 of all others is multiplied by γ, then normalised again."""
    weaker = (f[:, None] != 0) & (f == 0)
    return dense(
        names,
        lambda phi: torch.where(weaker, 0.3 * phi.exp(), phi.exp()).log(),
    )


def enhance_a_video(names):
    q, k = (names[x].double().unflatten(1, (FRAMES, TOKENS)) for x in ("query", "key"))
    maps = torch.einsum("bfphd,bgphd->bphfg", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    others = ~torch.eye(FRAMES, dtype=torch.bool)
    score = (FRAMES + 4.0) * maps[..., others].mean((1, 2, 3))
    return dense(names, lambda phi: phi) * score.clamp(min=1)[:, None, None, None]


def matched(names):
    """Rows of the shares that each distance has in the first frames alone, in 24 frames."""
    shares = vk.analysis.frame_profile(names["native_map"])[0]
    frame = torch.arange(FRAMES)
    distance = (frame[:, None] - frame).abs()
    rows = torch.cat([shares, torch.zeros(FRAMES - 12)])[distance]
    wanted = vk.analysis.frame_profile(rows / rows.sum(-1, keepdim=True))[:12]
    reached = vk.analysis.frame_profile(names["long_map"])[0]
    assert (reached[:12] / wanted - 1).abs().max() < 0.03
    assert reached[12:].max() < 0.03 * wanted.min()
    table = sum(term.table for term in names["rule"].terms)
    return dense(names, lambda phi: phi + table.double()[f[:, None], f])


def freelong(names):
    size = (FRAMES, 4, 4)

    def transform(x, sign):
        for dim, n in enumerate(size, 1):
            index = torch.arange(n, dtype=torch.float64)
            waves = torch.exp(sign * 2j * math.pi * index[:, None] * index / n)
            x = torch.tensordot(waves, x, ([1], [dim])).movedim(0, dim)
        return x

    parts = [dense(names, lambda phi: phi), masked(df.abs() <= 4)(names)]
    every, near = (transform(x.unflatten(1, size).to(torch.complex128), -1) for x in parts)
    axes = [torch.arange(n).minimum(n - torch.arange(n)) * 2.0 / n for n in size]
    distance = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2
    low = torch.exp(-2 * distance / 0.0625)[..., None, None]
    return transform(low * every + (1 - low) * near, 1).real.flatten(1, 3) / math.prod(size)


ANCHORS = {0, 1} | {(1 + 6 * i) % FRAMES for i in range(4)}
FORMULAS = {
    "VSTAR's temporal attention regularization": tar,
    "VSTAR's transfer of dynamics": dynamics,
    "UltraViCo": ultravico,
    "LVSA": masked((df.abs() <= 2) | torch.tensor([int(g) in ANCHORS for g in f])),
    "Block-causal models": masked(f // 4 <= (f // 4)[:, None]),
    "StreamingLLM and LongLive": masked((df <= 0) & ((df >= -5) | (f < 3))),
    "Radial Attention": masked(radial()),
    "Sparse VideoGen": sparse_videogen,
    "FreeLOC's tiered attention": masked(
        (df.abs() <= 3) | ((df.abs() <= 8) & (dp.abs() <= 2)) | (f == 0)
    ),
    "Prompt Relay": prompt_relay,
    "DyMoS": dymos,
    "Spatiotemporal skip guidance": lambda names: names["value"].double(),
    "Enhance-A-Video": enhance_a_video,
    "FreeLong": freelong,
    "The profile of the trained length": matched,
}


@pytest.mark.parametrize("method", FORMULAS)
def test_method(method, begun):
    names = dict(begun)
    names["attend"] = type(begun["attend"])(begun["attend"].__code__, names)  # of these names
    (block,) = blocks(section(method))
    exec(block, names)
    expected = FORMULAS[method](names)
    torch.testing.assert_close(names["out"].double(), expected, rtol=1e-4, atol=1e-5)
    if method == "Block-causal models":
        torch.testing.assert_close(names["last"], names["out"][:, -4 * TOKENS :])


def test_every_method_has_a_formula():
    titles = re.findall(r"^### (.*)$", section("Published methods"), re.MULTILINE)
    assert titles == [*FORMULAS, "What it does not express"]


def test_layouts(begun):
    """The tokens and the frames that the examples have by what is said of them."""
    (block,) = blocks(section("Layouts"))
    made = [eval(ast.unparse(line), dict(begun)) for line in ast.parse(block).body]
    assert [(x.tokens, x.frames) for x in made] == [
        (21 * 1560, 21),
        (226 + 13 * 1350, 13),
        (33 * 3600 + 256, 33),
        (22 * 352, 21),
        (4 * 8 * 13 + 15 * 26 + 30 * 52 + 9 * 30 * 52, 15),
        (6 * 4 * 5, 6),
        (5, 2),
    ]
    assert made[4].coordinates[:7] == (-17.5, -13.5, -9.5, -5.5, -2.5, -1, 0)


@pytest.mark.parametrize("title", ["Backends", "How exact"])
def test_the_rest_runs(title, begun):
    names = dict(begun)
    (block,) = blocks(section(title))
    exec(block, names)
    if title == "Backends":
        assert names["reasons"]["composed"] == ["weights whole frames of keys, the rule has a band"]


def test_errors_are_as_shown(begun):
    (block,) = blocks(section("Errors"), "pycon")
    shown = re.findall(r">>> (.*)\nValueError: (.*)", block)
    assert len(shown) == 4
    for expression, message in shown:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            eval(expression, dict(begun))


def test_the_table_of_statistics_is_what_is_measured():
    """Its two small sizes; the others are as the command prints them."""
    shown = section("The statistic")
    for frames, tokens in make_frame_figures.SIZES[:2]:
        shares = [make_frame_figures.own_share(frames, tokens, x) for x in ("frame_max", "row_max")]
        cells = [f"{frames} × {tokens}", *(f"{x:.0%}" for x in (1 / frames, *shares))]
        assert f"| {' | '.join(cells)} |" in shown
