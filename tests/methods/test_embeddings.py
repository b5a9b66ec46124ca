import pytest
import torch

import vstar_kernels as vk

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, CHANNELS = 5, 7
MODES = ("linear", "slerp", "hold")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded_anchors(stages, frames, rounding="down"):
    """By hand: evenly spaced, cut off or halves up, in integers."""
    if stages == 1:
        return [0]
    gaps = stages - 1
    return [
        (2 * i * (frames - 1) + gaps * (rounding == "nearest")) // (2 * gaps) for i in range(stages)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("stages", "frames"), [(1, 1), (1, 16), (2, 16), (3, 16), (4, 512), (9, 9)]
)
def test_exact_at_evenly_spaced_anchors(stages, frames, dtype, mode):
    embeddings = draw(stages, TOKENS, CHANNELS, dtype=dtype)
    out = vk.interpolate_embeddings(embeddings, frames, mode=mode)
    assert (out.shape, out.dtype) == ((frames, TOKENS, CHANNELS), dtype)
    assert torch.equal(out[rounded_anchors(stages, frames)], embeddings)


@pytest.mark.parametrize("rounding", ["down", "nearest"])
@pytest.mark.parametrize(("stages", "frames"), [(3, 16), (4, 12), (5, 512), (2, 1)])
def test_rounding_of_anchors(stages, frames, rounding):
    embeddings = draw(stages, TOKENS, CHANNELS)
    out = vk.interpolate_embeddings(embeddings, frames, rounding=rounding, mode="hold")
    if stages <= frames:
        assert torch.equal(out[rounded_anchors(stages, frames, rounding)], embeddings)
        given = vk.interpolate_embeddings(
            embeddings, frames, rounded_anchors(stages, frames, rounding), mode="hold"
        )
        assert torch.equal(out, given)
    else:
        assert torch.equal(out, embeddings[:1])


def test_the_official_codes_anchors():
    """Its 16 frames and 3 stages, and every other size where its numbers are exact enough."""
    assert rounded_anchors(3, 16) == [0, 7, 15]
    assert rounded_anchors(3, 16, "nearest") == [0, 8, 15]
    stages = torch.eye(3)[:, None]
    out = vk.interpolate_embeddings(stages, 16)
    assert torch.equal(out[[0, 7, 15]], stages)
    for count, frames in [(4, 16), (5, 24), (6, 48), (7, 64)]:
        official = torch.linspace(0, frames - 1, count, dtype=torch.float64).long()
        stages = torch.eye(count)[:, None]
        assert torch.equal(vk.interpolate_embeddings(stages, frames)[official], stages)


def test_a_wrong_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding must be 'down' or 'nearest', got 'up'"):
        vk.interpolate_embeddings(draw(2, TOKENS, CHANNELS), 8, rounding="up")


def test_linear_in_between():
    embeddings = draw(4, TOKENS, CHANNELS, dtype=torch.float64)
    out = vk.interpolate_embeddings(embeddings, 16)  # anchors 0, 5, 10, 15
    expected = torch.nn.functional.interpolate(
        embeddings.flatten(1).T[None], 16, mode="linear", align_corners=True
    )[0].T.unflatten(1, (TOKENS, CHANNELS))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["linear", "slerp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types_are_interpolated_in_float32(dtype, mode):
    embeddings = draw(3, TOKENS, CHANNELS, dtype=dtype)
    expected = vk.interpolate_embeddings(embeddings.float(), 50, mode=mode).to(dtype)
    assert torch.equal(vk.interpolate_embeddings(embeddings, 50, mode=mode), expected)


def test_hold():
    embeddings = draw(3, TOKENS, CHANNELS)
    out = vk.interpolate_embeddings(embeddings, 7, anchors=[1, 3, 5], mode="hold")
    assert torch.equal(out, embeddings[[0, 0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("mode", MODES)
def test_given_anchors(mode):
    embeddings = draw(3, TOKENS, CHANNELS)
    out = vk.interpolate_embeddings(embeddings, 12, anchors=[2, 3, 9], mode=mode)
    assert torch.equal(out[[0, 1, 2, 3, 9, 10, 11]], embeddings[[0, 0, 0, 1, 2, 2, 2]])
    between = embeddings[1] if mode == "hold" else None
    assert (between is None) != torch.equal(out[6], embeddings[1])


def test_slerp_stays_on_the_sphere_at_a_constant_speed():
    embeddings = torch.nn.functional.normalize(
        draw(2, TOKENS, CHANNELS, dtype=torch.float64), dim=-1
    )
    out = vk.interpolate_embeddings(embeddings, 9, mode="slerp")
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(9, TOKENS, dtype=torch.float64))
    steps = (out[1:] * out[:-1]).sum(-1).acos()
    torch.testing.assert_close(steps, steps[:1].expand(8, -1))
    whole = (embeddings[0] * embeddings[1]).sum(-1).acos()
    torch.testing.assert_close(steps.sum(0), whole)


def test_more_stages_than_frames():
    embeddings = draw(5, TOKENS, CHANNELS, dtype=torch.float64)
    out = vk.interpolate_embeddings(embeddings, 4)  # stages at 0, 3/4, 3/2, 9/4, 3
    expected = torch.stack(
        [
            embeddings[0],
            embeddings[1] * 2 / 3 + embeddings[2] / 3,
            embeddings[2] / 3 + embeddings[3] * 2 / 3,
            embeddings[4],
        ]
    )
    torch.testing.assert_close(out, expected)
    for mode in MODES:
        single = vk.interpolate_embeddings(embeddings, 1, mode=mode)
        assert torch.equal(single, embeddings[:1])


@pytest.mark.parametrize("mode", MODES)
def test_batches(mode):
    embeddings = draw(2, 3, TOKENS, CHANNELS)
    out = vk.interpolate_embeddings(embeddings, 8, mode=mode)
    assert out.shape == (2, 8, TOKENS, CHANNELS)
    for single, frames in zip(embeddings, out, strict=True):
        assert torch.equal(vk.interpolate_embeddings(single, 8, mode=mode), frames)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    embeddings = draw(2, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: vk.interpolate_embeddings(x, 7, anchors=[1, 3, 6], mode=mode), embeddings
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slerp_of_equal_opposite_and_zero_embeddings(dtype):
    start = draw(1, 6, CHANNELS, dtype=dtype)
    near = start[0, 5] * (1 + 1e-3)
    end = torch.stack(
        [start[0, 0], -start[0, 1], 0 * start[0, 2], -2 * start[0, 3], start[0, 4] + 1, near]
    )[None]
    embeddings = torch.cat([start, end, end * 0]).requires_grad_()
    out = vk.interpolate_embeddings(embeddings, 9, mode="slerp")
    assert out.isfinite().all()
    assert torch.equal(out[[0, 4, 8]], embeddings)
    linear = vk.interpolate_embeddings(embeddings, 9)
    chord = [0, 1, 2, 3, 5]
    torch.testing.assert_close(out[:, chord], linear[:, chord])
    assert not torch.allclose(out[:4, 4], linear[:4, 4], rtol=1e-2)
    (out.float() ** 2).sum().backward()
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad[0].abs().sum() > 0


def test_slerp_has_no_jump_where_it_becomes_linear():
    """Around the threshold, the arc and the chord are the same to float32's precision."""
    angles = torch.linspace(1e-4, 1e-2, 200)
    embeddings = torch.zeros(2, 200, 2)
    embeddings[0, :, 0] = 1
    embeddings[1, :, 0], embeddings[1, :, 1] = angles.cos(), angles.sin()
    out = vk.interpolate_embeddings(embeddings, 3, mode="slerp")
    expected = torch.stack([(angles / 2).cos(), (angles / 2).sin()], dim=-1)
    torch.testing.assert_close(out[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], 4), TypeError, "stage_embeddings must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4), 4), ValueError, r"stage_embeddings must be .* got \(3, 4\)"),
        ((torch.zeros(0, 4, 4), 4), ValueError, r"none of them 0, got \(0, 4, 4\)"),
        ((torch.zeros(2, 4, 4).int(), 4), ValueError, "floating-point type, got torch.int32"),
        ((torch.zeros(2, 4, 4), 0), ValueError, "num_frames must be at least 1, got 0"),
        ((torch.zeros(2, 4, 4), 4.0), TypeError, "num_frames must be an integer, got float"),
        ((torch.zeros(2, 4, 4), 4, [0, 4]), ValueError, r"below num_frames, 4, got \[0, 4\]"),
        ((torch.zeros(2, 4, 4), 4, [2, 2]), ValueError, r"increase strictly .*\[2, 2\]"),
        ((torch.zeros(2, 4, 4), 4, [-1, 2]), ValueError, r"from 0 .*\[-1, 2\]"),
        ((torch.zeros(2, 4, 4), 4, [1]), ValueError, "each of the 2 stages, got 1"),
        ((torch.zeros(2, 4, 4), 4, [0.5, 2]), TypeError, "anchors must be integers"),
        ((torch.zeros(2, 4, 4), 4, None, "cubic"), ValueError, "'hold', got 'cubic'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        vk.interpolate_embeddings(*arguments)
