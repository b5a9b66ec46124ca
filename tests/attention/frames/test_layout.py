import itertools
import pickle

import pytest
import torch

import vstar_kernels as vk
from tests.attention.frames import cases
from vstar_kernels.testing.frames import _tokens


def spelled(layout):
    """The frame and the place of each token, from the runs."""
    frames, places = [], []
    for start, end, frame, place in layout.run_table().tolist():
        assert start == len(frames)
        frames += [frame] * (end - start)
        places += list(range(place, place + end - start)) if frame >= 0 else [0] * (end - start)
    return frames, places


@pytest.mark.parametrize("name", cases.LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_runs_say_what_the_segments_say(name, tokens):
    layout = cases.LAYOUTS[name](tokens)
    frames, places = spelled(layout)
    expected, expected_places = _tokens(layout)
    assert [layout.frames if f < 0 else f for f in frames] == expected.tolist()
    assert places == expected_places.tolist()
    assert layout.tokens == len(frames)
    assert layout.text_tokens == frames.count(-1)
    assert list(layout.frame_tokens) == [frames.count(f) for f in range(layout.frames)]
    starts = [run.frame for run in layout.runs]
    assert all(a != b for a, b in itertools.pairwise(starts))  # neighbours are one run
    table = layout.run_table()
    assert (table.dtype, table.device.type, table.shape) == (
        torch.int32, "cpu", (len(layout.runs), 4),
    )  # fmt: skip


def test_a_grid_image_has_many_runs_a_frame():
    """Frames side by side: every row of the image crosses all of them."""
    layout = vk.Layout(*[vk.Frames(2, 3)] * 2, *[vk.Frames(2, 3, first=2)] * 2)
    assert layout.frames == 4
    assert layout.frame_tokens == (6,) * 4
    assert spelled(layout)[0] == [0, 0, 0, 1, 1, 1] * 2 + [2, 2, 2, 3, 3, 3] * 2
    assert [run.place for run in layout.runs] == [0, 0, 3, 3] * 2


def test_frames_are_numbered_by_first_appearance():
    layout = vk.Layout(vk.Frames(1, 2, first=5), vk.Frames(6, 2))
    assert layout.coordinates == (5.0, 0.0, 1.0, 2.0, 3.0, 4.0)
    assert layout.frame_tokens == (4, 2, 2, 2, 2, 2)
    assert layout.order() == [1, 2, 3, 4, 5, 0]


def test_from_coordinates():
    times = torch.tensor([float("nan"), 0.5, 0.5, 0.25, 0.25, 0.5, 7.0])
    text = torch.tensor([1, 0, 0, 0, 0, 0, 1]).bool()
    layout = vk.Layout.from_coordinates(times, text)
    assert layout == vk.Layout(
        vk.Text(1), vk.Frames(1, 2, 0.5), vk.Frames(1, 2, 0.25), vk.Frames(1, 1, 0.5), vk.Text(1)
    )
    assert layout.frames == 2
    assert vk.Layout.from_coordinates([0, 0, 1, 1]) == vk.Layout(vk.Frames(2, 2))
    assert vk.Layout.from_coordinates([0.1]) == vk.Layout(vk.Frames(1, 1, first=0.1))


def test_equal_where_they_say_the_same():
    one = vk.Layout(vk.Text(2), vk.Text(1), vk.Frames(1, 4), vk.Frames(1, 4, first=1))
    other = vk.Layout(vk.Text(3), vk.Frames(2, 4), vk.Text(0))
    assert one == other
    assert hash(one) == hash(other)
    assert one != vk.Layout(vk.Text(3), vk.Frames(2, 4, step=2))
    assert one != vk.Layout(vk.Text(2), vk.Frames(2, 4))
    assert one != "a layout"
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert copy.segments == one.segments


def test_repr():
    layout = vk.Layout(vk.Text(226), vk.Frames(13, 1350, first=-1, step=0.5))
    assert repr(layout) == "Layout(Text(226), Frames(13, 1350, first=-1, step=0.5))"
    assert eval(repr(layout), {"Layout": vk.Layout, "Text": vk.Text, "Frames": vk.Frames}) == layout
    many = vk.Layout(*[vk.Frames(2, 3)] * 100)
    assert "…" in repr(many)
    assert "100 segments, 2 frames, 600 tokens" in repr(many)


def test_the_runs_are_on_the_cpu_whatever_the_default_device():
    layout = vk.Layout(vk.Frames(3, 5), vk.Text(11))
    with torch.device("meta"):
        assert layout.run_table().device.type == "cpu"
        assert vk.FrameRule.tar(0.123).tables(layout).delta.device.type == "cpu"
    with torch.inference_mode():
        assert layout.run_table().tolist()[0] == [0, 5, 0, 0]
    layout.run_table().add(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vk.Frames(0, 4), "count must be at least 1, got 0"),
        (lambda: vk.Frames(4, 0), "tokens must be at least 1, got 0"),
        (lambda: vk.Frames(4, 1, first=float("inf")), "first must be finite.*got inf"),
        (lambda: vk.Frames(4, 1, step=float("nan")), "step must be finite.*got nan"),
        (lambda: vk.Frames(4, 1, step=0), "step must not be 0 where count is 4"),
        (lambda: vk.Text(-1), "tokens of Text must be at least 0, got -1"),
        (lambda: vk.Layout(), "at least one token, got no segment"),
        (lambda: vk.Layout(vk.Text(0)), r"at least one token, got Text\(0\)"),
        (lambda: vk.Frames(3, 1, 1e308), "first must be finite, in float32 too, got 1e.308"),
        (lambda: vk.Frames(3, 1, 10**400), "first must be finite.*an integer of 1329 bits"),
        (lambda: vk.Frames(5, 3, first=1e17), "step 1.0 is too small for coordinates from 1e.17"),
        (lambda: vk.Frames(5, 3, first=1, step=-1e-20), "step -1e-20 is too small"),
        (lambda: vk.Text(2**31), "tokens of Text must be at most 2147483647, got 2147483648"),
        (lambda: vk.Frames(10**400, 1), "count must be at most 2147483647, got an integer of 1329"),
        (lambda: vk.Layout(vk.Frames(2**20, 2**12)), "at most 2147483647 tokens, got 4294967296"),
        (lambda: vk.Layout.from_coordinates([0.0, float("nan")]), "finite, got nan for token 1"),
        (lambda: vk.Layout.from_coordinates(torch.zeros(2, 3)), r"\(tokens,\).*\(2, 3\)"),
        (lambda: vk.Layout.from_coordinates([10**400]), "coordinates must be finite.*too l"),
        (lambda: vk.Layout.from_coordinates(torch.eye(1).to_sparse()), "coordinates must be an o"),
        (lambda: vk.Layout.from_coordinates([]), r"one token at least.*\(0,\)"),
        (
            lambda: vk.Layout.from_coordinates([1.0, 2.0], [True]),
            "each of the coord.*2, got 1",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vk.Frames(2.0, 4), "count must be an integer, got float"),
        (lambda: vk.Frames(True, 4), "count must be an integer, got bool"),
        (lambda: vk.Frames(2, 4, first="0"), "first must be a number, got str"),
        (lambda: vk.Text(None), "must be an integer, got NoneType"),
        (lambda: vk.Layout(3), "Frames and Text.*got int"),
        (lambda: vk.Layout([vk.Text(3)]), "Frames and Text.*got list"),
        (lambda: vk.Layout.from_coordinates([0.0], [1]), "text must be booleans, got torch.int64"),
        (lambda: vk.Layout.from_coordinates([0.0, None]), "coordinates must be a tensor or a seq"),
        (lambda: vk.Layout.from_coordinates(["0"]), "coordinates must be a tensor or a sequence"),
        (lambda: vk.Layout.from_coordinates([0.0], [None]), "text must be a tensor or a sequence"),
        (lambda: vk.Layout.from_coordinates(torch.ones(2) * 1j), "coordinates must be real"),
    ],
)
def test_wrong_kinds(make, message):
    with pytest.raises(TypeError, match=message):
        make()
