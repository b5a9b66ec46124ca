"""A long clip gets the frame profile of the trained length: FrameRule.match."""

import pytest
import torch

import vstar_kernels as vk

match = vk.FrameRule.match
NATIVE, LONG, TOKENS, TEXT = 6, 13, 5, 3


def profile_of(matrix):
    """The mean over the pairs at each distance, written as a loop over diagonals."""
    frames = matrix.shape[-2]
    return torch.stack(
        [
            torch.cat([matrix.diagonal(d, -2, -1), matrix.diagonal(-d, -2, -1)], -1).mean(-1)
            for d in range(frames)
        ],
        -1,
    )


def target_of(native, frames, beyond=0.0):
    """The profile of rows that fall off as the native profile does, with the text's share."""
    trained = native.shape[-2]
    profile = profile_of(native[..., :trained])
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    last = profile[..., -1:] * beyond
    rows = torch.cat([profile, last.expand(*last.shape[:-1], frames)], -1)[..., distance]
    rows = rows / rows.sum(-1, keepdim=True)
    video = native[..., :trained].sum(-1).mean(-1)[..., None]
    return profile_of(rows) * video


def attention(frames, noise):
    """Queries and keys that look for frames near them, and text, which anyone sees."""
    heads, seed = 2, 0
    generator = torch.Generator().manual_seed(seed)
    layout = vk.Layout(vk.Text(TEXT), vk.Frames(frames, TOKENS))
    frame = torch.arange(frames).repeat_interleave(TOKENS) / 3
    place = torch.cat([torch.full((TEXT,), 0.7), frame])
    waves = torch.stack([wave(place * w) for w in (1, 0.7, 0.3) for wave in (torch.sin, torch.cos)])
    inputs = torch.randn(3, 1, layout.tokens, heads, 6, generator=generator)
    query, key = noise * inputs[:2] + (2 - noise) * waves.T[:, None]
    return query, key, inputs[2], layout


def maps(frames, rule, noise):
    query, key, value, layout = attention(frames, noise)
    return vk.frame_attention(
        query, key, value, layout, rule, return_map=True, map_heads=True, backend="reference"
    )[1].double()


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(("beyond", "held"), [("clip", 0.0), ("hold", 1.0), ("mask", 0.0)])
@pytest.mark.parametrize(("noise", "allowed"), [(0.3, [0.1, 0.02]), (1.5, [0.7, 0.3, 0.2, 0.06])])
def test_the_matched_profile_is_the_trained_lengths(by_head, beyond, held, noise, allowed):
    """One shot comes within 10 % where tokens of a frame are alike; iterating gets there anyway."""

    def captured(frames, rule=None):
        found = maps(frames, rule, noise)
        return found if by_head else found.mean(1)

    native, rule, errors = captured(NATIVE), vk.FrameRule(), []
    target = target_of(native, LONG, held).mean(0)
    compared = slice(None) if beyond == "hold" else slice(NATIVE)
    for _ in range(1 + len(allowed)):
        found = captured(LONG, rule)
        reached = profile_of(found[..., :LONG]).mean(0)
        errors.append(float((reached / target - 1)[..., compared].abs().max()))
        rule = rule + match(native, found, beyond=beyond)
    assert errors[0] > 0.1
    assert all(error < most for error, most in zip(errors[1:], allowed, strict=True)), errors
    shares = [x[..., -1].mean() for x in (native, captured(LONG, rule))]
    assert abs(shares[1] / shares[0] - 1) < 0.02
    if beyond == "mask":
        assert captured(LONG, rule)[..., 0, NATIVE:LONG].eq(0).all()


def test_the_bias_is_the_logarithm_of_the_quotient():
    """Where rows of the long clip are those of logits of the distance, the target's are reached."""
    frame = torch.arange(6)
    distance = (frame[:, None] - frame).abs()
    native, long = (-distance[:3, :3] / 2.0).softmax(-1), (distance / 9.0).softmax(-1)
    table = match(native, long, beyond="mask").terms[0].table
    expected = profile_of(native).log()[distance.clamp(max=2)] - distance / 9.0
    difference = (table - expected)[distance < 3]
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    assert table[distance >= 3].isneginf().all()
    assert match(native, long).terms[0].table[distance >= 3].eq(-4).all()
    long = torch.full((6, 6), 1 / 6)
    native = torch.full((3, 3), 1 / 3)
    assert match(native, long, beyond="hold").terms[0].table.abs().max() < 1e-6
    assert match(native, long, clip=0.1).terms[0].table.abs().max() <= 0.1 + 1e-6
    assert match(native, native).terms[0].table.abs().max() < 1e-6


def test_what_nobody_sees_is_left_alone():
    long = torch.eye(4)
    table = match(torch.full((2, 2), 0.5), long).terms[0].table
    assert table[0, 1:].eq(0).all()
    assert table.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: match(torch.eye(2), torch.zeros(2, 4)), r"long_map must be .*got \(2, 4\)"),
        (lambda: match(-torch.eye(2), torch.eye(3)), "native_map must hold shares of attention"),
        (lambda: match(torch.zeros(2, 2), torch.eye(3)), "native_map .*attends to nothing"),
        (lambda: match(torch.eye(2)[None, None], torch.eye(3)), "same heads and dimensions"),
        (lambda: match(torch.ones(1, 1, 1, 1, 1), torch.eye(3)), r"\(batch, heads, F, F\)"),
        (lambda: match(torch.eye(2), torch.eye(3), clip=-1), "clip must be at least 0, got -1"),
        (
            lambda: match(torch.eye(2), torch.eye(3), beyond="far"),
            "'clip', 'hold', 'mask', got 'far'",
        ),
        (lambda: match([[1.0]], torch.eye(3)), "native_map must be a torch.Tensor, got list"),
    ],
)
def test_maps_that_cannot_be_matched(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
