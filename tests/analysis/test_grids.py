"""Grid images and their embedding, against the equations element by element."""

import math

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.analysis import (
    frame_order,
    from_grid,
    grid_layout,
    grid_shape,
    mixed_embedding,
    seam_error,
    to_grid,
    token_frames,
)

SHAPES = [(1, 1, 3, 2), (2, 2, 2, 3), (2, 3, 4, 1), (4, 2, 1, 5), (1, 4, 3, 2), (3, 1, 2, 2)]
ORDERS = ["column", "row"]


def video(rows, cols, h, w, batch=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, rows * cols, channels, h, w, generator=generator)


@pytest.mark.parametrize(
    ("frames", "shape"),
    [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (16, (4, 4)), (32, (4, 8)), (256, (16, 16))],
)
def test_the_shape_is_the_most_square_one(frames, shape):
    assert grid_shape(frames) == shape
    assert grid_shape(frames, rows=1) == (1, frames)


@pytest.mark.parametrize(("rows", "cols", "h", "w"), SHAPES)
def test_the_grid_is_equation_1(rows, cols, h, w):
    frames = video(rows, cols, h, w)
    image = to_grid(frames, rows, cols)
    assert image.shape == (2, 3, rows * h, cols * w)
    for x in range(rows * h):
        for y in range(cols * w):
            t = x // h + (y // w) * rows
            assert torch.equal(image[:, :, x, y], frames[:, t, :, x % h, y % w])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "cols", "h", "w"), SHAPES)
def test_the_way_back_is_the_inverse(rows, cols, h, w, order):
    frames = video(rows, cols, h, w)
    image = to_grid(frames, rows, cols, order)
    assert torch.equal(from_grid(image, rows, cols, order), frames)
    assert torch.equal(to_grid(from_grid(image, rows, cols, order), rows, cols, order), image)
    numbers = torch.arange(rows * cols)[None, :, None, None, None].expand(1, -1, 1, h, w)
    of_tokens = token_frames(rows, cols, h, w, order)
    assert torch.equal(to_grid(numbers, rows, cols, order).flatten(), of_tokens)
    # In the order of frames the image's tokens are the video's.
    tokens = image.flatten(2)[..., frame_order(rows, cols, h, w, order)]
    assert torch.equal(tokens, frames.transpose(1, 2).flatten(2))
    layout = grid_layout(rows, cols, h, w, order)
    coordinates = [layout.coordinates[run.frame] for run in layout.runs]
    lengths = torch.tensor([run.end - run.start for run in layout.runs])
    assert torch.equal(torch.tensor(coordinates).repeat_interleave(lengths).long(), of_tokens)


def test_rows_count_along_the_rows():
    assert token_frames(2, 3, 1, 2, "row").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert token_frames(2, 3, 1, 2).tolist() == [0, 0, 2, 2, 4, 4, 1, 1, 3, 3, 5, 5]


def test_it_is_differentiable():
    frames = video(2, 2, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_grid(x, 2, 2), frames)
    image = video(1, 1, 4, 6)[:, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: from_grid(x, 2, 3, "row"), image)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_changes_nothing_in_attention(order):
    """The point of §2 of ETC's case for kernels: attention over a grid is that over all tokens."""
    rows, cols, h, w = 2, 3, 2, 3
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, rows * cols * h * w, 2, 8, generator=generator).unbind()
    at = frame_order(rows, cols, h, w, order)
    rule = vk.FrameRule.tar(1.0, stat="row_max")
    layout = grid_layout(rows, cols, h, w, order)
    frame_major = vk.Layout(vk.Frames(rows * cols, h * w))
    for applied in (None, rule):
        grid, grid_map = vk.frame_attention(q, k, v, layout, applied, return_map=True)
        video_, video_map = vk.frame_attention(
            q[:, at], k[:, at], v[:, at], frame_major, applied, return_map=True
        )
        torch.testing.assert_close(grid[:, at], video_)
        by_time = layout.order()
        torch.testing.assert_close(grid_map[:, by_time][..., by_time], video_map[..., :-1])


def test_fixed_spatial_and_temporal_attention_are_one():
    """Spatial then temporal attention with fixed maps is one with the sum of their logarithms."""
    generator = torch.Generator().manual_seed(2)
    temporal, spatial = (torch.rand(n, n, generator=generator).double() for n in (3, 4))
    temporal, spatial = (x / x.sum(-1, keepdim=True) for x in (temporal, spatial))
    value = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    factorised = torch.einsum("fg,ij,gjc->fic", temporal, spatial, value)
    logits = temporal.log()[:, None, :, None] + spatial.log()[None, :, None, :]
    joint = logits.reshape(12, 12).softmax(-1) @ value.flatten(0, 1)
    torch.testing.assert_close(joint.unflatten(0, (3, 4)), factorised)
    torch.testing.assert_close(logits.reshape(12, 12).exp(), torch.kron(temporal, spatial))


def expected_embedding(rows, cols, h, w, channels, theta, time):
    out = torch.empty(channels, rows * h, cols * w, dtype=torch.float64)
    for c in range(channels):
        for x in range(rows * h):
            for y in range(cols * w):
                a, b, power = x % h, y % w, c
                if c >= channels // 2:
                    a = b = time(x // h, y // w)
                    power = c - channels // 2
                scale = theta ** (power / channels)
                out[c, x, y] = math.sin(a / scale) + math.cos(b / scale)
    return out


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_the_embedding_is_equation_25(channels):
    rows, cols, h, w = 2, 3, 4, 2
    sizes = (rows, cols, h, w, channels)
    found = mixed_embedding(*sizes, dtype=torch.float64)
    # Multiplied and divided powers differ by rounding alone.
    close = {"rtol": 0, "atol": 1e-13}
    paper = expected_embedding(*sizes, 1e4, lambda i, j: i * (rows * h) + j)
    torch.testing.assert_close(found, paper, **close)
    found = mixed_embedding(*sizes, theta=9.0, index="time", dtype=torch.float64)
    columns = expected_embedding(*sizes, 9.0, lambda i, j: i + j * rows)
    torch.testing.assert_close(found, columns, **close)
    found = mixed_embedding(*sizes, index="time", order="row", dtype=torch.float64)
    torch.testing.assert_close(
        found, expected_embedding(*sizes, 1e4, lambda i, j: i * cols + j), **close
    )
    assert mixed_embedding(*sizes).dtype == torch.float32


def distinct(embedding, digits=3):
    return len(embedding.flatten(1).mT.round(decimals=digits).unique(dim=0))


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize(
    ("frames", "h", "w"), [(4, 8, 8), (16, 32, 32), (32, 16, 16), (256, 32, 20)]
)
def test_all_tokens_are_told_apart(channels, frames, h, w):
    rows, cols = grid_shape(frames)
    found = mixed_embedding(rows, cols, h, w, channels, dtype=torch.float64)
    assert distinct(found) == frames * h * w
    assert 0.5 < float(found.std()) < 2  # near the noise's


def test_what_is_printed_as_algorithm_1_collides():
    """Why it is not built: x mod h in the place of ⌊x/h⌋, and a lone y."""
    side, h, channels, half = 128, 32, 4, 2
    x = torch.arange(side, dtype=torch.float64)[:, None].expand(-1, side)
    y = x.mT
    printed = []
    for c in range(channels):
        scale = 1e4 ** ((c if c < half else c - half) / channels)
        a, b = (x % h, y % h) if c < half else (x % h * side + y, y % h * side + y)
        printed.append(torch.sin(a / scale) + torch.cos(b / scale))
    assert distinct(torch.stack(printed), 6) == 4096 < side**2
    # The sum of both embeddings over all channels, eq. 22, has a few collisions too.
    u = torch.div(x, h, rounding_mode="floor") * side + torch.div(y, h, rounding_mode="floor")
    summed = []
    for c in range(channels):
        scale = 1e4 ** (c / channels)
        place = torch.sin(x % h / scale) + torch.cos(y % h / scale)
        summed.append(place + torch.sin(u / scale) + torch.cos(u / scale))
    assert side**2 - distinct(torch.stack(summed)) == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grid_shape(0), ValueError, "frames must be at least 1, got 0"),
        (lambda: grid_shape(16, rows=3), ValueError, "rows must divide the 16 frames, got 3"),
        (lambda: grid_shape(4.0), TypeError, "frames must be an integer, got float"),
        (lambda: to_grid(video(2, 2, 2, 2), 2, 3), ValueError, "2 × 3 cells holds 6 .* has 4"),
        (lambda: to_grid(torch.ones(1, 4, 3), 2, 2), ValueError, r"shape \(1, 4, 3\)"),
        (lambda: to_grid([1], 2, 2), TypeError, "video must be a torch.Tensor, got list"),
        (lambda: to_grid(video(2, 2, 2, 2), 2, 2, "z"), ValueError, "order must be .*got 'z'"),
        (lambda: from_grid(torch.ones(1, 3, 5, 4), 2, 2), ValueError, "image of 5 × 4 .* 2 rows"),
        (lambda: from_grid(torch.ones(3, 5), 2, 2), ValueError, r"shape \(3, 5\)"),
        (lambda: from_grid("x", 2, 2), TypeError, "image must be a torch.Tensor, got str"),
        (lambda: token_frames(2, 2, 0, 1), ValueError, "h must be at least 1, got 0"),
        (lambda: mixed_embedding(2, 2, 2, 2, 1), ValueError, "channels must be at least 2, got 1"),
        (lambda: mixed_embedding(2, 2, 2, 2, 4, theta=1.0), ValueError, "theta .* got 1"),
        (lambda: mixed_embedding(2, 2, 2, 2, 4, index="t"), ValueError, "index .* got 't'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def drawn_frames(count=6, side=24):
    """Smooth pictures, each another."""
    x = torch.linspace(0, 3, side)
    phase = torch.arange(count)[:, None, None]
    waves = torch.sin(x[:, None] + phase) * torch.cos(1.3 * x + 0.5 * phase)
    noise = 0.005 * torch.randn(count, side, side, generator=torch.Generator().manual_seed(0))
    brightness = torch.tensor([0.2, 0.5, 0.7, 0.35, 0.8, 0.6])[:count, None, None]
    return (brightness + 0.1 * waves + noise)[:, None].clamp(0, 1)


@pytest.mark.parametrize("shift", [(7, 0), (0, 5), (9, 4)])
def test_frames_that_are_cut_wrongly_have_seams(shift):
    """Cells of a grid that is cut some pixels beside their borders."""
    video = drawn_frames()
    assert seam_error(video) == 0
    image = to_grid(video[None], 2, 3)
    assert seam_error(from_grid(image, 2, 3)[0]) == 0
    assert seam_error(from_grid(image.roll(shift, (2, 3)), 2, 3)[0]) == 1
    half = torch.cat([video, from_grid(image.roll(shift, (2, 3)), 2, 3)[0]])
    assert seam_error(half) == 0.5
    # An object has edges too, but not from one side to the other and as sharp beside it.
    video[:, :, 5:9, 5:9] = 0.9
    assert seam_error(video) == 0


def test_bad_seams():
    with pytest.raises(ValueError, match="threshold must be more than 1, got 1"):
        seam_error(drawn_frames(), 1.0)
    with pytest.raises(ValueError, match="at least 4 × 4 pixels, got 3 × 3"):
        seam_error(drawn_frames(side=3))
