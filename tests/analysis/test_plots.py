import sys

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.analysis.maps import AttentionMap
from vstar_kernels.analysis.plots import COLOURS, INK
from vstar_kernels.methods.vstar.optimize import NoiseLoss, OptimizedNoise

mpl = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 8


def means():
    places = [("init", "init"), (0, "down"), (0, "up"), (1, "mid")]
    maps = [
        AttentionMap("", f"{level}{place}", level, place, step, 0.0, random_map(step), 4)
        for step in (0, 13)
        for level, place in places
        if (step, place) != (13, "mid")
    ]
    return vk.analysis.mean_maps(maps)


def random_map(seed):
    noise = torch.rand(2, FRAMES, FRAMES, generator=torch.Generator().manual_seed(seed))
    return noise.softmax(-1)


def images(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def render(figure, tmp_path):
    """Draws it as a user would; what does not fit would warn."""
    path = tmp_path / "figure.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000


def test_maps(tmp_path):
    given = means()
    figure = vk.analysis.plot_maps(given)
    render(figure, tmp_path)
    shown = images(figure)
    assert len(shown) == len(given) == 7
    for picture in shown:
        assert (picture.min(), picture.max()) == (0, 1)
    expected = {tuple(vk.analysis.min_max(item.map[-1]).flatten().tolist()) for item in given}
    assert {tuple(picture.flatten().tolist()) for picture in shown} == expected
    other = images(vk.analysis.plot_maps(given, batch=0))
    assert not (other[0] == shown[0]).all()
    words = texts(figure)
    for word in ("step 0", "step 13", "init\nquery frame", "level 0, up\nquery frame", "key frame"):
        assert word in words
    hidden = [axes for axes in figure.axes if not axes.axison]
    assert len(hidden) == 1  # level 1 has no step 13


def test_frame_maps(tmp_path):
    plain = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    masked = plain.clone()
    masked[:, 0, 3] = 0
    figure = vk.analysis.plot_frame_maps({"plain": plain, "masked": masked}, batch=1)
    render(figure, tmp_path)
    first, second = images(figure)
    assert torch.equal(torch.from_numpy(first.data), plain[1])
    assert second.mask.nonzero() == ([0], [3])  # empty, not the least of the scale
    assert {"plain", "masked", "share of the attention", "query frame"} <= set(texts(figure))
    (axes, *_) = figure.axes
    assert axes.images[0].norm.vmax == masked[1].max()
    without_text = plain[0].clone()
    without_text[:, -1] = 0
    assert images(vk.analysis.plot_frame_maps({"": without_text}))[0].shape == (4, 4)
    with pytest.raises(ValueError, match="at least one map"):
        vk.analysis.plot_frame_maps({})


def test_figures(tmp_path):
    given = vk.analysis.map_figures(means(), half_width=2)
    figure = vk.analysis.plot_figures(given)
    render(figure, tmp_path)
    for axes, name in zip(figure.axes, ("diagonalness", "band_share", "band_width"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["init", "level 0, down", "level 0, up", "level 1, mid"]
        own = [f for f in given if (f.source.level, f.source.place) == (0, "up")]
        assert lines["level 0, up"].get_xdata().tolist() == [0, 13]
        values = [float(getattr(f, name)[-1]) for f in own]
        assert lines["level 0, up"].get_ydata().tolist() == values
        looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in axes.lines}
        assert len(looks) == 4
    assert "share of attention with |j − i| ≤ 2" in texts(figure)


def test_figures_without_steps(tmp_path):
    item = AttentionMap("", "a", 0, "up", None, 0.0, random_map(0), 4)
    figure = vk.analysis.plot_figures(vk.analysis.map_figures(vk.analysis.mean_maps([item])))
    render(figure, tmp_path)
    assert "denoising step" not in texts(figure)


def test_deltas(tmp_path):
    deltas = vk.analysis.delta_matrices([0, 1, 4, 8], FRAMES)
    figure = vk.analysis.plot_deltas(deltas)
    render(figure, tmp_path)
    assert [picture.tolist() for picture in images(figure)] == [
        delta.tolist() for delta in deltas.values()
    ]
    (profile,) = (axes for axes in figure.axes if axes.lines)
    assert profile.lines[1].get_ydata().tolist() == deltas["σ = 1"][4].tolist()
    assert profile.lines[1].get_xdata().tolist() == list(range(-4, 4))
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert limits == {(0, 1)}
    per_head = {"x": torch.stack([deltas["σ = 1"], -deltas["σ = 1"]])}
    assert images(vk.analysis.plot_deltas(per_head))[0].min() >= 0


def test_similarities(tmp_path):
    matrices = {"one": torch.rand(3, FRAMES, FRAMES), "other": torch.rand(FRAMES, FRAMES)}
    joint = vk.analysis.normalize_jointly(matrices)
    render(vk.analysis.plot_similarities(joint), tmp_path)
    figure = vk.analysis.plot_similarities(vk.analysis.normalize_jointly({"a": matrices["one"]}))
    assert len(images(figure)) == 1
    shown = images(vk.analysis.plot_similarities(joint))
    for picture, matrix in zip(shown, joint.matrices.values(), strict=True):
        assert picture.tolist() == matrix[0].tolist()


def test_histogram(tmp_path):
    histogram = vk.analysis.similarity_histogram(torch.rand(3, 20, 20))
    figure = vk.analysis.plot_histogram(histogram)
    render(figure, tmp_path)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == histogram.shares.tolist()
    assert axes.lines[0].get_xdata().tolist() == histogram.means.tolist()
    labels = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert labels == list(range(1, 20, 2))


def test_histograms_of_several_methods(tmp_path):
    one, other = (vk.analysis.similarity_histogram(torch.rand(9, 9), limits=(0, 1)) for _ in "ab")
    figure = vk.analysis.plot_histogram({"baseline": one, "VSTAR": other})
    render(figure, tmp_path)
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["baseline", "VSTAR"]
    meshes = [axes.collections[0] for axes in panels]
    assert [mesh.get_array().tolist() for mesh in meshes] == [
        one.shares.tolist(),
        other.shares.tolist(),
    ]
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    assert all(axes.yaxis_inverted() for axes in panels)
    wide = vk.analysis.similarity_histogram(torch.rand(9, 9), limits=(0, 2))
    with pytest.raises(ValueError, match="'a' and 'b' must have the same intervals"):
        vk.analysis.plot_histogram({"a": one, "b": wide})
    with pytest.raises(ValueError, match="at least one method"):
        vk.analysis.plot_histogram({})


def test_losses(tmp_path):
    losses = [NoiseLoss(3.0, 2.0, 0.5), NoiseLoss(1.0, 0.5, 0.6), NoiseLoss(2.0, 1.5, 0.7)]
    found = OptimizedNoise(vk.NoisePrior(), torch.zeros(1), [], losses, 1, False)
    figure = vk.analysis.plot_losses(found)
    render(figure, tmp_path)
    assert [axes.lines[0].get_ydata().tolist() for axes in figure.axes] == [
        [3, 1, 2],
        [2, 0.5, 1.5],
        [0.5, 0.6, 0.7],
    ]
    assert all(axes.lines[1].get_xdata() == [1, 1] for axes in figure.axes)


def luminance(colour):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["white", "#0d1117"])
def test_figures_are_legible_on_light_and_dark_pages(page):
    page = mpl.colors.to_rgb(page)
    assert contrast(mpl.colors.to_rgb(INK), page) > 4
    for colour in COLOURS:
        assert contrast(mpl.colors.to_rgb(colour), page) > 2
    figure = vk.analysis.plot_maps(means())
    assert figure.get_facecolor()[3] == 0
    assert {text.get_color() for text in figure.findobj(mpl.text.Text)} == {INK}


def test_matplotlibs_settings_are_left_alone():
    before = dict(mpl.rcParams)
    vk.analysis.plot_maps(means())
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("plot", [vk.analysis.plot_maps, vk.analysis.plot_figures])
def test_nothing_to_draw_raises(plot):
    with pytest.raises(ValueError, match=r"must hold .*at least one map, got none"):
        plot([])
    with pytest.raises(ValueError, match="at least one matrix, got none"):
        vk.analysis.plot_deltas({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "vstar-kernels\[analysis\]"'):
        vk.analysis.plot_deltas({})
