"""What maps between frames say of how far attention reaches, and of heads."""

import math

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels import analysis


def test_profile_is_the_mean_at_each_distance():
    frame_map = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.0, 0.4, 0.6]])
    expected = [1.7 / 3, 1.2 / 4, 0.1 / 2]
    torch.testing.assert_close(
        analysis.frame_profile(frame_map), torch.tensor(expected, dtype=torch.float64)
    )
    with_text = torch.cat([0.5 * frame_map, torch.full((3, 1), 0.5)], -1)[None, None]
    assert analysis.frame_profile(with_text).shape == (1, 1, 3)
    torch.testing.assert_close(
        analysis.frame_profile(with_text)[0, 0], torch.tensor(expected, dtype=torch.float64) / 2
    )
    torch.testing.assert_close(analysis.without_text(with_text)[0, 0], frame_map.double())


def test_entropy_is_0_to_one_frame_and_1_to_all_alike():
    text = torch.full((4, 1), 0.2)
    uniform = torch.cat([torch.full((4, 4), 0.2), text], -1)
    one = torch.cat([0.8 * torch.eye(4), text], -1)
    two = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]).repeat(2, 1)
    found = [float(analysis.frame_entropy(x)) for x in (uniform, one, two, torch.ones(1, 1))]
    assert found == pytest.approx([1, 0, math.log(2) / math.log(4), 0])


def test_heads_of_one_frame_are_spatial_those_of_one_place_temporal():
    """Queries that look for their own frame, or for their own place, as their keys say."""
    frames, tokens = 8, 6
    layout = vk.Layout(vk.Text(2), vk.Frames(frames, tokens))
    f = torch.nn.functional.one_hot(torch.arange(frames).repeat_interleave(tokens), 8)
    p = torch.nn.functional.one_hot(torch.arange(tokens).repeat(frames), 8)
    key = torch.zeros(1, layout.tokens, 2, 8)
    key[0, 2:, 0], key[0, 2:, 1] = 8.0 * f, 8.0 * p
    _, frame_map = vk.frame_attention(
        key, key, key, layout, return_map=True, map_heads=True, backend="reference"
    )
    assert analysis.spatial_heads(frame_map).tolist() == [[True, False]]
    assert analysis.spatial_heads(frame_map, w=frames).all()
    assert analysis.spatial_heads(frame_map, sink=frames).all()
    rules = analysis.head_rules(frame_map, width=1, w=2)
    assert rules == [vk.FrameRule.window(2, sink=1), vk.FrameRule.band(1, sink=1)]
    assert analysis.head_rules(frame_map[0], width=1, w=2) == rules


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: analysis.frame_profile(torch.zeros(2, 4)), r"frame_map must be .*got \(2, 4\)"),
        (lambda: analysis.frame_profile([[1.0]]), "must be a torch.Tensor, got list"),
        (lambda: analysis.frame_entropy(torch.full((2, 2), math.nan)), "shares of attention"),
        (lambda: analysis.spatial_heads(torch.eye(3), w=-1), "w must be at least 0, got -1"),
        (lambda: analysis.spatial_heads(torch.eye(3), sink=-1), "sink must be at least 0, got -1"),
        (lambda: analysis.head_rules(torch.eye(3), 1), r"\(heads, F, F\) or .*got \(3, 3\)"),
    ],
)
def test_what_is_not_a_map(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
