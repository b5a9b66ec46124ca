import types

import pytest
import torch

pytest.importorskip("matplotlib")

from vstar_kernels.analysis import plot_guidance, plot_plan, plot_word_maps

BOXES = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])[:, None].expand(2, 20, 4)
PRESENT = torch.ones(2, 20, dtype=torch.bool)


def boxes_drawn(axes):
    """The boxes in one panel, without the light lines under them."""
    drawn = [patch.get_bbox().bounds for patch in axes.patches]
    return drawn[1::2]


def test_a_plan_over_a_video():
    present = PRESENT.clone()
    present[1, 10:] = False
    frames = [torch.rand(6, 9, 3).numpy() for _ in range(20)]
    figure = plot_plan(BOXES, present, ["a $cat", "a_dog$"], frames)
    assert [axes.get_title() for axes in figure.axes] == [
        f"frame {index}" for index in (0, 3, 5, 8, 11, 14, 16, 19)
    ]
    assert boxes_drawn(figure.axes[0]) == [(0, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]
    assert boxes_drawn(figure.axes[-1]) == [(0, 0, 0.5, 0.5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a $cat", "a_dog$"]
    figure.canvas.draw()  # texts are no mathematics
    assert len(figure.axes[0].images) == 1
    assert not plot_plan(BOXES, PRESENT, ["a", "b"]).axes[0].images


def test_maps_of_words():
    maps = torch.rand(3, 2, 4, 5)
    figure = plot_word_maps(maps, ["$cat", "runs"], BOXES[:, :3], PRESENT[:, :3], [[0], []])
    assert len(figure.axes) == 6
    image = figure.axes[4].images[0]  # the second word in the second frame
    torch.testing.assert_close(torch.as_tensor(image.get_array()), maps[1, 1])
    assert image.get_clim() == (0, pytest.approx(float(maps[:, 1].max())))
    assert len(boxes_drawn(figure.axes[0])) == 1
    assert not boxes_drawn(figure.axes[3])
    figure.canvas.draw()
    assert not boxes_drawn(plot_word_maps(maps, ["cat", "runs"]).axes[0])


def test_losses():
    def update(step, spatial, syntax, mass):
        return types.SimpleNamespace(step=step, spatial=spatial, syntax=syntax, mass=mass)

    updates = [update(0, 3.0, None, 0.1), update(0, 2.0, None, 0.2), update(4, 1.0, None, 0.3)]
    spatial, syntax, mass = plot_guidance(updates).axes
    assert [line.get_ydata().tolist() for line in spatial.lines] == [[3, 2], [1]]
    assert [line.get_xdata().tolist() for line in mass.lines] == [[0, 1], [2]]
    assert [label.get_text() for label in spatial.get_xticklabels()] == ["0", "4"]
    assert syntax.texts[0].get_text() == "not in use"


def test_what_does_not_fit():
    for call, message in (
        (lambda: plot_plan(BOXES[0], PRESENT, ["a"]), r"boxes must be \(subjects, frames, 4\)"),
        (lambda: plot_plan(BOXES, PRESENT[:1], ["a", "b"]), r"present .* \(2, 20\), got \(1, 20\)"),
        (lambda: plot_plan(BOXES, PRESENT, ["a"]), "labels must be of 2 subjects, got 1"),
        (lambda: plot_plan(BOXES, PRESENT, ["a", "b"], [1]), "frames must be the plan's 20, got 1"),
        (lambda: plot_word_maps(torch.rand(3, 2, 4, 5), ["a"]), "and 1 names"),
        (lambda: plot_guidance([]), "at least one update, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
