"""``apply_grid`` on image UNets computes what the formulas say, and leaves them as they were."""

import copy
import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vstar_kernels as vk

pytest.importorskip("diffusers")
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import Timesteps

from tests.models.grid.unets import KINDS, LAYERS, LEVELS, call, make
from tests.models.models import make as make_video_model
from tests.models.models import noise
from vstar_kernels.analysis import (
    from_grid,
    grid_shape,
    mixed_embedding,
    receptive_field,
    to_grid,
    token_frames,
)
from vstar_kernels.models.grid import embedding as embeddings
from vstar_kernels.models.grid.model import GridAttnProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def always(sigma, **more):
    return vk.TARConfig(sigma, steps=None, **more)


@each
@pytest.mark.parametrize("frames", [1, 4])
def test_without_embedding_and_tar_it_is_the_stock_model(kind, frames):
    """Attention over a grid is the image's own; after removal it is that bit for bit."""
    model = make(kind)
    before = {name: id(p) for name, p in model.attn_processors.items()}
    stock = call(model, batch=2)
    with vk.apply_grid(model, frames, embedding=False) as handle:
        torch.testing.assert_close(call(model, batch=2), stock, rtol=0, atol=1e-5)
        ours = [p for p in model.attn_processors.values() if isinstance(p, GridAttnProcessor)]
        assert len(ours) == LAYERS[kind]
        assert f"{LAYERS[kind]} spatial self-attention layers, no TAR" in handle.describe()
        assert handle.layers == []
    assert {name: id(p) for name, p in model.attn_processors.items()} == before
    assert torch.equal(call(model, batch=2), stock)
    assert not model._forward_pre_hooks


class EagerTAR:
    """Diffusers' attention in float64 with TAR between frames, the oracle of one layer."""

    def __init__(self, delta, strength, frames_of):
        self.delta, self.strength, self.frames_of = delta, strength, frames_of

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (
            proj(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()
            for proj in (attn.to_q, attn.to_k, attn.to_v)
        )
        logits = q @ k.mT * attn.scale
        frame = self.frames_of(hidden_states.shape[1])
        delta = self.delta.double()[frame[:, None], frame]
        weights = logits + self.strength * logits.amax(-1, keepdim=True) * delta
        out = (weights.softmax(-1) @ v).transpose(1, 2).flatten(-2).float()
        return attn.to_out[1](attn.to_out[0](out))


def oracle_of(kind, handle, level, delta, strength, rows, cols, order, h, w):
    """The stock model with the formula in the layers of a level."""
    model = make(kind)
    frames = {
        rows * cols * (h >> n) * (w >> n): token_frames(rows, cols, h >> n, w >> n, order)
        for n in (0, 1)
    }
    for layer in handle.layers:
        assert layer.level == level
        model.get_submodule(layer.name).set_processor(EagerTAR(delta, strength, frames.get))
    return model


@each
@pytest.mark.parametrize("order", ["column", "row"])
def test_tar_is_the_formula_in_float64(kind, order):
    model, level, rows, cols, h, w = make(kind), max(LEVELS[kind]), 2, 3, 4, 2
    options = {"embedding": False, "order": order}
    size = {"batch": 2, "size": (rows * h, cols * w)}
    plain = call(model, **size)
    config = always({level: 1.5}, strength=0.7)
    with vk.apply_grid(model, 6, config=config, **options) as handle:
        out = call(model, **size)
        delta = vk.GaussianBias(1.5).matrix(6)
        oracle = oracle_of(kind, handle, level, delta, 0.7, rows, cols, order, h, w)
    expected = call(oracle, **size)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (out - plain).abs().max() > 100 * (out - expected).abs().max()


def test_a_dense_bias_is_by_the_frames_times():
    """Frames are numbered as they appear in the image, the bias's are in the order of time."""
    model, rows, cols, h, w = make(), 2, 3, 2, 2
    delta = noise(6, 6, seed=3)
    config = always(None, bias={0: vk.DenseBias(delta)}, stat="row_max")
    with vk.apply_grid(model, 6, config=config, embedding=False) as handle:
        out = call(model, size=(4, 6))
        oracle = oracle_of("SD 1.5", handle, 0, delta, 1.0, rows, cols, "column", h, w)
    torch.testing.assert_close(out, call(oracle, size=(4, 6)), **CLOSE)


@pytest.mark.parametrize("kind", ["identity", "uniform"])
def test_overrides(kind):
    model = make()
    seen = []
    config = vk.TARConfig(override={1: kind}, steps=None)
    with vk.apply_grid(model, 4, config=config, embedding=False) as handle:
        module = model.get_submodule(handle.layers[-1].name)
        hook = module.register_forward_hook(
            lambda module, args, out: seen.append((args[0], out)), with_kwargs=False
        )
        call(model)
        hook.remove()
    value = module.to_v(seen[0][0])
    if kind == "uniform":
        value = value.mean(1, keepdim=True).expand_as(value)
    torch.testing.assert_close(seen[0][1], module.to_out[0](value), **CLOSE)


def test_the_mixed_embedding_is_added_to_the_latents():
    model = make()
    sample = noise(2, 4, 8, 16)
    rows, cols = grid_shape(8)
    expected = call(model, sample=sample + mixed_embedding(rows, cols, 4, 4, 4))
    with vk.apply_grid(model, 8) as handle:
        assert (handle.rows, handle.cols, handle.frames) == (2, 4, 8)
        torch.testing.assert_close(call(model, sample=sample), expected, **CLOSE)
        by_name = model(sample=sample, timestep=10, encoder_hidden_states=noise(2, 3, 24, seed=1))
        torch.testing.assert_close(by_name.sample, expected, **CLOSE)
    with vk.apply_grid(model, 8, rows=4, order="row"):
        tall = noise(1, 4, 16, 8)
        with_paper = call(make(), sample=tall + mixed_embedding(4, 2, 4, 4, 4))
        torch.testing.assert_close(call(model, sample=tall), with_paper, **CLOSE)
    learned = vk.GridEmbedding(gain="learned", index="time", theta=50.0)
    stock = call(model, sample=sample)
    with vk.apply_grid(model, 8, embedding=learned):
        torch.testing.assert_close(call(model, sample=sample), stock, rtol=0, atol=1e-5)
        learned.gain.fill_(0.5)
        time = mixed_embedding(rows, cols, 4, 4, 4, theta=50.0, index="time")
        torch.testing.assert_close(
            call(model, sample=sample), call(make(), sample=sample + 0.5 * time), **CLOSE
        )


@pytest.mark.parametrize("where", ["noise", "time"])
def test_the_speed_is_embedded(where):
    model = make()
    stock = call(model, batch=2)
    torch.manual_seed(1)
    fps = vk.FPSEmbedding.for_unet(model, where)
    embedding = vk.GridEmbedding(gain=0.0, fps=fps, where=where)
    with vk.apply_grid(model, 4, embedding=embedding, fps=30) as handle:
        # The last layer is zero: nothing is changed before training.
        torch.testing.assert_close(call(model, batch=2), stock, rtol=0, atol=1e-5)
        torch.nn.init.normal_(fps.layers[-1].weight)
        slow = call(model, batch=2)
        handle.fps = torch.tensor([30.0, 60.0])
        both = call(model, batch=2)
        torch.testing.assert_close(both[0], slow[0])
        assert (both[1] - slow[1]).abs().max() > 1e-3
        # Guidance doubles the batch: the unconditional half comes first.
        guided = call(model, sample=noise(2, 4, 8, 8).repeat(2, 1, 1, 1))
        handle.fps = torch.tensor([30.0, 60.0, 30.0, 60.0])
        four = call(model, sample=noise(2, 4, 8, 8).repeat(2, 1, 1, 1))
        assert torch.equal(guided, four)
        handle.fps = torch.tensor([30.0, 60.0])
        assert handle.fps.tolist() == [30, 60]
        with pytest.raises(ValueError, match=r"each of the batch of 3, .* got 2"):
            call(model, batch=3)
        # Two images for each prompt: p0, p0, p1, p1 in diffusers' order, in which speeds are not.
        with pytest.raises(ValueError, match=r"each of the batch of 4, .* got 2"):
            call(model, batch=4)
        handle.fps = torch.tensor([30.0, 60.0])
        with pytest.raises(ValueError, match=r"each of the batch of 8, .* got 2"):
            call(model, sample=noise(4, 4, 8, 8).repeat(2, 1, 1, 1))
        added = fps(torch.tensor([30.0, 60.0]))
        handle.fps = None
        with pytest.raises(ValueError, match=r"fps must be given to apply_grid, or set by handle"):
            call(model, batch=2)
    if where == "noise":
        sample = noise(2, 4, 8, 8) + added[:, :, None, None]
        torch.testing.assert_close(both, call(model, sample=sample), **CLOSE)
    assert torch.equal(call(model, batch=2), stock)


def test_the_sinusoid_is_diffusers():
    for flip, shift, channels in ((True, 0, 16), (False, 1, 7)):
        embedding = vk.FPSEmbedding(channels, 4, flip_sin_to_cos=flip, freq_shift=shift)
        fps = torch.tensor([0.0, 1.0, 30.0, 120.0])
        theirs = Timesteps(channels, flip, shift)(fps)
        torch.testing.assert_close(embedding.sinusoid(fps), theirs)
    widths = [layer.weight.shape for layer in embedding.layers[::2]]
    assert widths == [(28, 7), (7, 28), (4, 7)]


def test_tar_only_at_its_steps():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(25)
    model = make()
    timesteps = scheduler.timesteps[[13, 14]]
    with vk.apply_grid(model, 4):
        plain = [call(model, timestep=t) for t in timesteps]
    config = vk.TARConfig(1.0)
    with vk.apply_grid(model, 4, config=config, scheduler=scheduler) as handle:
        out = [call(model, timestep=t) for t in timesteps]
        handle.step = 20
        announced = call(model, timestep=timesteps[0])
    assert (out[0] - plain[0]).abs().max() > 1e-3
    # Without a rule frames do not matter, with one that adds nothing here they are the same sums.
    torch.testing.assert_close(out[1], plain[1], **CLOSE)
    torch.testing.assert_close(announced, plain[0], **CLOSE)
    stock = [call(model, timestep=t) for t in timesteps]
    options = {"config": config, "scheduler": scheduler, "embedding": False}
    with vk.apply_grid(model, 4, **options, stock_elsewhere=True):
        assert torch.equal(call(model, timestep=timesteps[1]), stock[1])


def test_widths_are_those_of_one_frame():
    model = make()
    with vk.apply_grid(model, 6, config=always({0: 1.0, 1: 8.0})):
        expected = call(model, size=(8, 12))
    with vk.apply_grid(model, 6, config="4D1_2D8") as handle:
        handle.step = 0
        assert torch.equal(call(model, size=(8, 12)), expected)
        assert {(x.level, x.width, x.sigma) for x in handle.layers} == {(0, 4, 1.0), (1, 2, 8.0)}
        assert "level 1 (width 2), σ = 8" in handle.describe()
        with pytest.raises(ValueError, match=r"no spatial self-attention has width 2: .* 4, 8"):
            call(model, size=(16, 24))


def test_a_frame_reaches_every_other_by_attention_over_the_grid_alone():
    """B.1, in one layer: convolutions reach over the edges of cells too."""
    model = make()
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    video = noise(1, 6, 16, 2, 2)

    def within(video):
        tokens = video.flatten(0, 1).flatten(2).mT
        return attention(tokens).mT.unflatten(-1, (2, 2))[None]

    def over_the_grid(video):
        tokens = to_grid(video, 2, 3).flatten(2).mT
        return from_grid(attention(tokens).mT.unflatten(-1, (4, 6)), 2, 3)

    assert torch.equal(receptive_field(within, video) > 0, torch.eye(6, dtype=torch.bool))
    attention.set_processor(GridAttnProcessor())
    assert (receptive_field(over_the_grid, video) > 0).all()


def test_removal_in_any_state():
    model = make()
    stock = call(model)
    first = vk.apply_grid(model, 4)
    with pytest.raises(ValueError, match="under apply_grid already"):
        vk.apply_grid(model, 4)
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.set_processor(AttnProcessor())
    call(model)  # puts ours in again
    assert isinstance(layer.processor, GridAttnProcessor)
    first.remove()
    first.remove()
    torch.testing.assert_close(call(model), stock, **CLOSE)
    alive, handle = weakref.ref(model), vk.apply_grid(model, 4)
    call(model)
    handle.remove()
    del handle, model, layer, first
    gc.collect()
    assert alive() is None


def test_a_copy_is_stock_and_says_so():
    model = make()
    stock = call(model)
    embedding = vk.GridEmbedding(fps=vk.FPSEmbedding.for_unet(model, "time"), where="time")
    torch.nn.init.normal_(embedding.fps.layers[-1].weight)
    with vk.apply_grid(model, 4, embedding=embedding, fps=8):
        out = call(model)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"copy of one under apply_grid.*apply_grid\(copy"):
            call(twin)
        with vk.apply_grid(twin, 4, embedding=embedding, fps=8):
            assert torch.equal(call(twin), out)
        assert torch.equal(call(twin), stock)
        assert torch.equal(call(model), out)


class Pipeline:
    def __init__(self, **parts):
        self.components = parts
        self.__dict__.update(parts)


class Strange(AttnProcessor):
    pass


def strange_model():
    model = make()
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Strange())
    return model


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (lambda: "unet", {}, TypeError, "pipe_or_model must be .* got str"),
        (lambda: torch.nn.Linear(1, 1), {}, ValueError, "is or holds no UNet2DConditionModel"),
        (lambda: Pipeline(unet=make_video_model("UNetMotionModel")), {}, ValueError, "apply_tar"),
        (strange_model, {}, ValueError, "mid_block.*attn1 cannot be .* has a Strange"),
        (make, {"rows": 3}, ValueError, "rows must divide the 4 frames, got 3"),
        (make, {"order": "diagonal"}, ValueError, "order must be 'column' or 'row'"),
        (make, {"backend": "cuda"}, ValueError, "backend"),
        (make, {"config": 3}, TypeError, "config must be a TARConfig, a preset or None, got int"),
        (make, {"config": vk.TARConfig({4: 1.0})}, ValueError, "has level 4: the levels are 0, 1"),
        (make, {"config": always(1.0, stat="map_max")}, ValueError, "'map_max' .* use 'row_max'"),
        (
            make,
            {"config": always(None, bias=vk.DenseBias(torch.ones(3, 3)))},
            ValueError,
            "3 frames",
        ),
        (make, {"stock_elsewhere": "no"}, TypeError, "stock_elsewhere must be True or False"),
        (make, {"embedding": 1}, TypeError, "embedding must be .* got int"),
        (make, {"embedding": vk.GridEmbedding(6)}, ValueError, "of 6 channels, .* have 4"),
        (make, {"fps": 30}, ValueError, "FPSEmbedding.for_unet"),
        (
            make,
            {
                "embedding": vk.GridEmbedding(fps=vk.FPSEmbedding(4, 4), where="time"),
                "fps": 30,
            },
            ValueError,
            "time embedding of width 64 .* got 4",
        ),
        (make, {"embedding": vk.GridEmbedding(fps=vk.FPSEmbedding(4, 4)), "fps": 121}, ValueError,
         "from 0 .* to 120 .* got 121"),
        (make, {"embedding": vk.GridEmbedding(fps=vk.FPSEmbedding(4, 4)), "fps": "8"}, TypeError,
         "fps must be a number, got str"),
    ],
)  # fmt: skip
def test_bad_arguments(make_model, options, error, message):
    with pytest.raises(error, match=message):
        vk.apply_grid(make_model(), 4, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 1}, ValueError, "channels must be at least 2"),
        ({"theta": 0.5}, ValueError, "theta must be more than 1"),
        ({"where": "end"}, ValueError, "where must be 'noise' or 'time', got 'end'"),
        ({"gain": "big"}, TypeError, "gain must be a number, got str"),
        ({"fps": 3}, TypeError, "fps must be an FPSEmbedding or None, got int"),
        ({"fps": vk.FPSEmbedding(4, 6)}, ValueError, "latents of 4 channels .* got 6"),
    ],
)
def test_bad_embeddings(arguments, error, message):
    with pytest.raises(error, match=message):
        vk.GridEmbedding(**arguments)


@pytest.mark.parametrize(
    ("size", "message"),
    [((9, 8), "9 × 8 does not divide into 2 rows"), ((4, 6), "multiples of 2, .* got 2 × 3")],
)
def test_latents_that_do_not_divide(size, message):
    model = make()
    with vk.apply_grid(model, 4), pytest.raises(ValueError, match=message):
        call(model, size=size)


def test_masks_are_refused():
    model = make()
    with vk.apply_grid(model, 4), pytest.raises(ValueError, match="an attention_mask"):
        model(noise(1, 4, 8, 8), 1, noise(1, 3, 24), attention_mask=torch.ones(1, 64))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("config", [None, always({0: 1.0, 1: 0.7}), "override"])
def test_the_maps_between_frames(config, heads):
    model, rows, cols = make(), 2, 3
    if config == "override":
        config = vk.TARConfig({0: 1.0}, override={1: "identity"}, steps=None)
    size = {"batch": 2, "size": (8, 12)}
    with vk.apply_grid(model, 6, config=config):
        out = call(model, **size)
        with vk.capture_maps(model, map_heads=heads) as capture:
            assert torch.equal(call(model, **size), out)
        assert len({item.layer for item in capture.maps}) == len(capture.maps) == LAYERS["SD 1.5"]
        with vk.capture_maps(model, layers=lambda layer: layer.level == 1) as coarse:
            call(model, **size)
        assert {item.level for item in coarse.maps} == {1}
    for item in capture.maps:
        assert item.map.shape == (2, 6, 6)
        torch.testing.assert_close(item.map.sum(-1), torch.ones(2, 6))
        assert item.positions == 16 >> 2 * item.level
        assert item.coordinates == (0, 1, 2, 3, 4, 5)
        assert (item.heads is not None) == heads
        if heads:
            torch.testing.assert_close(item.heads.mean(1), item.with_text)
    if config is not None and 1 in config.override:
        assert torch.equal(capture.mean(level=1), torch.eye(6).expand(2, 6, 6))
        return
    # By hand, for the first layer, from what it is given.
    name = capture.maps[0].layer
    with vk.apply_grid(model, 6, config=config):
        seen = []
        module = model.get_submodule(name)
        hook = module.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        call(model, **size)
        hook.remove()
    q, k = (p(seen[0]).unflatten(-1, (2, -1)) for p in (module.to_q, module.to_k))
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * module.scale
    frame = token_frames(rows, cols, 4, 4)
    if config is not None:
        delta = vk.GaussianBias(1.0).matrix(6).double()[frame[:, None], frame]
        logits = logits + logits.amax(-1, keepdim=True) * delta
    member = torch.nn.functional.one_hot(frame).double()
    expected = (member.mT @ logits.softmax(-1) @ member / 16).mean(1)
    torch.testing.assert_close(capture.maps[0].map.double(), expected, **CLOSE)


def test_maps_end_with_the_grid():
    model = make()
    with pytest.raises(ValueError, match="no temporal self-attention"):
        vk.capture_maps(model)
    handle = vk.apply_grid(model, 4)
    with vk.capture_maps(model):
        handle.remove()
        with pytest.raises(RuntimeError, match="apply_grid was removed while its maps"):
            call(model)
    call(model)


@pytest.mark.parametrize("how", ["export", "fake tensors", "make_fx"])
def test_an_embedding_that_is_traced_first_keeps_nothing_of_the_trace(how):
    embedding, sample = vk.GridEmbedding(), noise(1, 4, 8, 8)
    expected = sample + mixed_embedding(2, 2, 4, 4, 4)
    embeddings._kept.cache_clear()
    if how == "export":
        torch.export.export(embedding, (sample, 2, 2))
    elif how == "make_fx":
        make_fx(lambda x: embedding(x, 2, 2), tracing_mode="fake")(sample)
    else:
        with FakeTensorMode() as mode:
            assert embedding(mode.from_tensor(sample), 2, 2).shape == sample.shape
    torch.testing.assert_close(embedding(sample, 2, 2), expected, **CLOSE)
