"""The clips that a grid is trained on, their filter and the loss."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vstar_kernels as vk
from vstar_kernels.analysis import mixed_embedding, to_grid
from vstar_kernels.methods.grid.data import FPS_VALUES
from vstar_kernels.methods.grid.filtering import LOGIT_SCALE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "indices"),
    [
        ((100, 60, 30, 4), [0, 2, 4, 6]),  # every second one
        ((100, 60, 60, 3, 5), [5, 6, 7]),
        ((100, 24, 15, 5), [0, 2, 3, 5, 6]),  # 0, 1.6, 3.2, 4.8, 6.4
        ((100, 24, 16, 4), [0, 2, 3, 5]),  # halves are rounded up, evenly
        ((8, 24, 0, 4, 4), [4, 5, 6, 7]),  # different images of a set
        ((1, 24, 120, 3), [0, 0, 0]),  # one image
        ((19, 60, 10, 4), [0, 6, 12, 18]),
    ],
)
def test_the_frames_of_a_clip(arguments, indices):
    assert vk.frame_indices(*arguments) == indices


def sources():
    frames = torch.arange(200.0)[:, None, None, None].expand(-1, 1, 2, 2)
    videos = [(frames, 60, "a"), (frames[:40], 24.0, "b")]
    labelled = [(1000 + frames[:5], "c")]
    captioned = [(2000 + frames[7], "d"), (2000 + frames[8], "e")]
    return videos, labelled, captioned


def drawn(count, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    data = vk.TripleData(*sources(), frames=4, generator=generator, **more)
    return list(itertools.islice(data, count))


def test_three_kinds_of_clips():
    clips = drawn(300)
    kinds = {"video": 0, "labelled": 0, "captioned": 0}
    for frames, text, fps in clips:
        numbers = frames[:, 0, 0, 0]
        if fps == 0:
            assert text == "c"
            assert len(set(numbers.tolist())) == 4
            kinds["labelled"] += 1
        elif fps == 120:
            assert numbers.tolist() == [2007.0 if text == "d" else 2008.0] * 4
            kinds["captioned"] += 1
        else:
            source = {"a": (60, 200), "b": (24, 40)}[text]
            start = int(numbers[0])
            expected = vk.frame_indices(source[1], source[0], fps, 4, start)
            assert numbers.tolist() == expected
            kinds["video"] += 1
    assert all(70 < count < 130 for count in kinds.values())
    speeds = {(text, fps) for _, text, fps in clips if text in "ab"}
    # One frame a second needs 181 of the first video, and the second is too short for two.
    assert speeds == {("a", fps) for fps in FPS_VALUES} | {("b", 2), ("b", 4), ("b", 8), ("b", 15)}


def test_a_seed_replays():
    first, again, other = drawn(20), drawn(20), drawn(20, seed=1)
    same = [torch.equal(x.frames, y.frames) for x, y in zip(first, again, strict=True)]
    assert all(same)
    assert not all(torch.equal(x.frames, y.frames) for x, y in zip(first, other, strict=True))
    data = vk.TripleData(*sources(), frames=4, weights=(1, 0, 0))
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch.frames.shape == (3, 4, 1, 2, 2)
    assert set(batch.text) <= {"a", "b"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_epochs_seeds_and_states_draw_apart():
    def clips(seed, drawn_before=0, loader_seed=0, **more):
        """Returns what each of two workers draws in each of two epochs."""
        generator = torch.Generator().manual_seed(seed)
        torch.rand(drawn_before, generator=generator)
        data = vk.TripleData(
            [(torch.arange(9999.0)[:, None, None, None], 60, "")],
            [],
            [],
            frames=1,
            generator=generator,
        )
        loader = DataLoader(
            data,
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(loader_seed),
            **more,
        )
        found = []
        for _ in range(2):
            epoch = [float(clip.frames) for clip in itertools.islice(loader, 8)]
            found += [tuple(epoch[0::2]), tuple(epoch[1::2])]  # the workers take turns
        return found

    first = clips(0)
    assert clips(0) == first
    # The loader's seeds are neighbours, as torch adds a worker's number to them.
    others = [clips(1), clips(0, loader_seed=1), clips(1, loader_seed=1), clips(0, drawn_before=1)]
    others.append(clips(2, persistent_workers=True))
    streams = list(itertools.chain(first, *others))
    assert len(set(streams)) == len(streams)


def test_footage_of_television_has_its_nominal_speeds():
    def speeds(rate, frames):
        data = vk.TripleData([(torch.zeros(4000, 1), rate, "")], [], [], frames=frames)
        return {clip.fps for clip in itertools.islice(data, 60)}

    assert speeds(29.97, 16) == {1, 2, 4, 8, 15, 30}
    assert speeds(60000 / 1001, 16) == set(FPS_VALUES)
    assert 30 not in speeds(29.97, 600)  # which would repeat a frame
    assert speeds(25.0, 2) == {1, 2, 4, 8, 15}  # at 30 two frames differ, and are of 25


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.frame_indices(18, 60, 10, 4), ValueError, "18 frames at 60 fps none fits"),
        (lambda: vk.frame_indices(25, 60, 10, 4, 7), ValueError, "start is at most 6, got 7"),
        (lambda: vk.frame_indices(9, 60, 121, 4), ValueError, "fps must be from 0 to 120, got 121"),
        (lambda: vk.frame_indices(9, 0, 1, 4), ValueError, "source_fps must be more than 0"),
        (lambda: vk.frame_indices(9, "60", 1, 4), TypeError, "source_fps must be a number"),
        (lambda: vk.TripleData([], [], [], frames=4), ValueError, "weights must be three numbers"),
        (
            lambda: vk.TripleData(sources()[0], [], [], frames=4, weights=(1, 1, 0)),
            ValueError,
            "labelled_images has the weight 1 and is empty",
        ),
        (
            lambda: next(iter(vk.TripleData([], sources()[1], [], frames=6))),
            ValueError,
            "'c' has 5 images, a clip needs 6",
        ),
        (
            lambda: next(iter(vk.TripleData(sources()[0][1:], [], [], frames=41))),
            ValueError,
            "a video of 40 frames at 24 fps is too short for a clip of 41 frames",
        ),
        (lambda: vk.filter_by_score(torch.empty(0), keep=0.5), ValueError, "one clip at least"),
        (lambda: vk.filter_by_score(torch.ones(2)), ValueError, "got neither"),
        (lambda: vk.filter_by_score(torch.ones(2), keep=1, threshold=1), ValueError, "got both"),
        (lambda: vk.filter_by_score(torch.ones(2), keep=1.5), ValueError, "from 0 to 1, got 1.5"),
        (lambda: vk.clip_scores([], None, None, reduce="max"), ValueError, "got 'max'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Embedder:
    """A CLIP whose embeddings are drawn: a frame's is its first three pixels, a text's a letter."""

    device, dtype = torch.device("cpu"), torch.float32

    def get_image_features(self, pixel_values):
        return pixel_values[:, :, 0, 0]

    def get_text_features(self, text):
        return text


class Processor:
    def __call__(self, return_tensors, images=None, text=None, **_):
        class Batch(dict):
            def to(self, device):
                return self

        if images is not None:
            return Batch(pixel_values=torch.stack(images))
        letters = {"r": [1.0, 0, 0], "g": [0, 1.0, 0]}
        return Batch(text=torch.tensor([letters[x] for x in text]))


def test_scores_are_eps_times_the_cosine():
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 2, 2)
    mixed = torch.tensor([0.6, 0.8, 0])[:, None, None].expand(3, 2, 2)
    clips = [vk.Clip(torch.stack([red, mixed]), "r", 8), (torch.stack([mixed, mixed]), "g")]
    assert pytest.approx(1 / 0.07) == LOGIT_SCALE
    found = vk.clip_scores(clips, Embedder(), Processor())
    torch.testing.assert_close(found, LOGIT_SCALE * torch.tensor([0.8, 0.8]))
    worst = vk.clip_scores(clips, Embedder(), Processor(), reduce="min")
    torch.testing.assert_close(worst, LOGIT_SCALE * torch.tensor([0.6, 0.8]))


def test_the_filter():
    scores = torch.tensor([0.3, 0.9, 0.5, 0.5, 0.1])
    keep = {share: vk.filter_by_score(scores, keep=share).tolist() for share in (0, 0.4, 0.5, 1)}
    assert keep[0] == [False] * 5
    assert keep[0.4] == [False, True, True, False, False]  # of equal ones the first
    assert keep[0.5] == [False, True, True, True, False]
    assert keep[1] == [True] * 5
    assert vk.filter_by_score(scores, threshold=0.5).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_image_models_own_on_the_grid(kind):
    diffusers = pytest.importorskip("diffusers")
    from tests.models.grid.unets import make
    from tests.models.models import noise

    unet = make().requires_grad_(True)
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    latents, text = noise(2, 6, 4, 4, 4), noise(2, 3, 24, seed=1)
    fps = vk.FPSEmbedding.for_unet(unet)
    torch.nn.init.normal_(fps.layers[-1].weight)
    embedding = vk.GridEmbedding(gain="learned", fps=fps)
    torch.nn.init.constant_(embedding.gain, 0.5)
    speeds = torch.tensor([8.0, 30.0])
    with vk.apply_grid(unet, 6, embedding=embedding) as handle:
        generator = torch.Generator().manual_seed(3)
        loss = vk.grid_loss(unet, scheduler, latents, text, speeds, generator=generator)
        assert handle.fps is None
        loss.backward()
    gradients = [p.grad for p in embedding.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert embedding.gain.grad.abs() > 0
    # By hand.
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(latents.shape, generator=generator)
    times = torch.randint(1000, (2,), generator=generator)
    target = {
        "epsilon": drawn,
        "v_prediction": scheduler.get_velocity(latents, drawn, times),
        "sample": latents,
    }[kind]
    noisy = to_grid(scheduler.add_noise(latents, drawn, times), 2, 3)
    given = noisy + 0.5 * mixed_embedding(2, 3, 4, 4, 4) + fps(speeds)[:, :, None, None]
    with torch.no_grad():
        predicted = unet(given, times, text).sample
    expected = F.mse_loss(predicted, to_grid(target, 2, 3))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_needs_a_grid_and_an_embedding_of_the_speed():
    pytest.importorskip("diffusers")
    from tests.models.grid.unets import make
    from tests.models.models import noise

    unet = make()
    with pytest.raises(ValueError, match="unet is not under apply_grid"):
        vk.grid_loss(unet, None, noise(1, 4, 4, 4, 4), noise(1, 3, 24))
    with (
        vk.apply_grid(unet, 4),
        pytest.raises(ValueError, match="fps needs an embedding that was trained with it"),
    ):
        vk.grid_loss(unet, None, noise(1, 4, 4, 4, 4), noise(1, 3, 24), 8)


def test_the_loss_names_what_does_not_fit():
    diffusers = pytest.importorskip("diffusers")
    from tests.models.grid.unets import make
    from tests.models.models import noise

    given = {
        "unet": make(),
        "scheduler": diffusers.DDPMScheduler(),
        "latents": noise(2, 4, 4, 4, 4),
        "text": noise(2, 3, 24),
    }
    with vk.apply_grid(given["unet"], 4):
        for wrong, error, message in (
            ({"scheduler": None}, TypeError, "scheduler must have add_noise .* got NoneType"),
            ({"latents": noise(2, 4, 4, 4)}, ValueError, r"latents must be \(batch, frames, "),
            ({"latents": noise(2, 4, 4, 4, 4).int()}, TypeError, "latents .* got torch.int32"),
            ({"text": "a"}, TypeError, "text must be a tensor of floats, got str"),
            ({"text": noise(1, 3, 24)}, ValueError, "batch as the latents, 2, got 1"),
        ):
            with pytest.raises(error, match=message):
                vk.grid_loss(**given | wrong)


def test_the_losss_speed_is_its_threads_alone():
    diffusers = pytest.importorskip("diffusers")
    from tests.models.grid.unets import make
    from tests.models.models import noise

    unet, scheduler = make(), diffusers.DDPMScheduler()
    embedding = vk.GridEmbedding(fps=vk.FPSEmbedding.for_unet(unet))
    latents, text = noise(1, 4, 4, 4, 4), noise(1, 3, 24)
    with vk.apply_grid(unet, 4, embedding=embedding) as handle, ExitStack() as pools:
        one, two, three = (pools.enter_context(ThreadPoolExecutor(1)) for _ in range(3))

        def announce(fps):
            handle.fps = fps

        one.submit(announce, 60).result()
        three.submit(vk.grid_loss, unet, scheduler, latents, text, 8).result()
        one.submit(announce, 15).result()  # which holds for the third thread too
        assert three.submit(lambda: handle.fps).result().tolist() == [15]
        two.submit(announce, 30).result()
        loss = three.submit(vk.grid_loss, unet, scheduler, latents, text, 8).result()
        assert loss.isfinite()
        two.submit(vk.grid_loss, unet, scheduler, latents, text, 8).result()
        assert two.submit(lambda: handle.fps).result().tolist() == [30]
