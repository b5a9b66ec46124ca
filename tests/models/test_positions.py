"""Frame positions that are drawn for training: what a model reads, and that it leaves no trace."""

import copy

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import default_dtype
from tests.models.models import KINDS, call, flat, make, noise
from vstar_kernels.models import positions

pytest.importorskip("diffusers")
from diffusers.models.embeddings import (
    SinusoidalPositionalEmbedding,
    get_1d_sincos_pos_embed_from_grid,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("UNetMotionModel", "SparseControlNetModel", "LatteTransformer3DModel")
LONGEST, FRAMES = 40, 6
each = pytest.mark.parametrize("name", NAMES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(seed=0):
    return torch.randperm(LONGEST, generator=generator(seed))[:FRAMES].sort().values


@torch.no_grad()
def with_rows(model, rows):
    """The model with these rows of the longer table for its first frames."""
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            table = SinusoidalPositionalEmbedding(module.pe.shape[2], max_seq_length=LONGEST).pe
            module.pe[:, :FRAMES] = table[:, rows]
    if hasattr(model, "temp_pos_embed"):
        grid = torch.arange(LONGEST).unsqueeze(1)
        channels = model.temp_pos_embed.shape[2]
        table = get_1d_sincos_pos_embed_from_grid(channels, grid, output_type="pt").float()[None]
        model.temp_pos_embed.copy_(table[:, rows])
    return model


@each
@torch.no_grad()
def test_frames_have_the_positions_that_are_drawn(name):
    model = make(name)
    stock = call(model, name)
    expected = call(with_rows(make(name), drawn()), name)
    with vk.randomize_positions(model, LONGEST, generator=generator()):
        assert torch.equal(call(model, name), expected)
        again = call(model, name)
    assert (expected - stock).abs().max() > 1e-3
    assert (again - expected).abs().max() > 1e-3
    assert torch.equal(call(model, name), stock)
    assert drawn().diff().min() > 0


@torch.no_grad()
def test_all_positions_are_the_models_own():
    model = make("UNetMotionModel")
    stock = call(model, "UNetMotionModel")
    with vk.randomize_positions(model, FRAMES):
        assert torch.equal(call(model, "UNetMotionModel"), stock)
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="is a copy of one under randomize_positions"):
            call(copied, "UNetMotionModel")
    vk.randomize_positions(copied, FRAMES).remove()
    assert torch.equal(call(copied, "UNetMotionModel"), stock)


class Pipeline:
    def __init__(self, **components):
        self.components = components
        self.__dict__.update(components)


@torch.no_grad()
def test_beside_tar_and_in_several_models():
    """Which have the same positions in the same call, and others in the next one."""
    models = {name: make(name) for name in NAMES[:2]}
    config = vk.TARConfig(1.0, steps=None)
    numbers = generator()
    in_turn = [torch.randperm(LONGEST, generator=numbers)[:FRAMES].sort().values for _ in range(4)]
    expected = {name: [] for name in models}
    for name in models:
        for rows in in_turn:
            oracle = with_rows(make(name), rows)
            with vk.apply_tar(oracle, config):
                expected[name].append(call(oracle, name))
    pipe = Pipeline(unet=models["UNetMotionModel"], controlnet=models["SparseControlNetModel"])
    # The controlnet at 10 is not of the UNet's second call, which was at 20.
    calls = [(1, 10, 0), (0, 10, 0), (0, 20, 1), (1, 10, 2), (0, 10, 2), (1, 10, 3)]
    with (
        vk.randomize_positions(pipe, LONGEST, generator=generator()),
        vk.apply_tar(pipe, config),
    ):
        for which, timestep, draw in calls:
            name = NAMES[which]
            out = call(models[name], name, timestep=timestep)
            if timestep == 10:  # of the oracle
                assert torch.equal(out, expected[name][draw])


def test_a_timestep_that_is_changed_in_place_is_another():
    """As that of a training loop may be, which keeps one tensor for all steps."""
    draws, timestep = positions._Draws(LONGEST, generator()), torch.tensor([5])
    first = draws.take(torch.nn.Identity(), FRAMES, timestep)
    timestep.fill_(7)
    assert not torch.equal(draws.take(torch.nn.Flatten(), FRAMES, timestep), first)


def test_layers_that_are_computed_again_have_the_same_positions():
    """By gradient checkpointing, after another forward pass has had others."""

    def gradient(model):
        sample = noise(1, 4, FRAMES, 8, 8).requires_grad_()
        numbers, losses = generator(), []
        with vk.randomize_positions(model, LONGEST, generator=numbers):
            for _ in range(2):
                out = model(**KINDS["UNetMotionModel"].inputs(sample), timestep=10)
                losses.append(flat(out).square().sum())
            sum(losses).backward()
        return sample.grad

    plain, checkpointed = make("UNetMotionModel"), make("UNetMotionModel").train()
    checkpointed.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(checkpointed), gradient(plain))


def test_what_cannot_be_is_refused():
    motion = make("UNetMotionModel")
    with vk.randomize_positions(motion, FRAMES - 1):
        with pytest.raises(ValueError, match="longest must be at least the 6 frames of a call"):
            call(motion, "UNetMotionModel")
        with pytest.raises(ValueError, match="are changed by another handle"):
            vk.randomize_positions(motion, LONGEST)
        with pytest.raises(ValueError, match="are changed by another handle"):
            vk.apply_tar(motion, vk.TARConfig(1.0, steps=None), extend_positions=True)
    with (
        vk.apply_tar(motion, vk.TARConfig(1.0, steps=None), extend_positions=True),
        pytest.raises(ValueError, match="are changed by another handle"),
    ):
        vk.randomize_positions(motion, LONGEST)
    stock = call(motion, "UNetMotionModel")
    assert torch.equal(call(make("UNetMotionModel"), "UNetMotionModel"), stock)
    for name in ("UNet3DConditionModel", "LaVie"):
        with pytest.raises(ValueError, match="UNet3DConditionModel has no table of frame pos"):
            vk.randomize_positions(make(name), LONGEST)
    with pytest.raises(ValueError, match="positions of a compiled UNetMotionModel"):
        vk.randomize_positions(torch.compile(motion, backend="eager"), LONGEST)
    with pytest.raises(TypeError, match="longest must be an integer, got float"):
        vk.randomize_positions(motion, 8.0)
    with pytest.raises(TypeError, match=r"generator must be a torch.Gen.* got int"):
        vk.randomize_positions(motion, LONGEST, generator=5)
    for longest in (0, 2**40, 10**5000):
        with pytest.raises(ValueError, match="longest must be from 1 to 65536 positions, got "):
            vk.randomize_positions(motion, longest)


def test_learned_positions_are_not_drawn():
    model = make("UNetMotionModel")
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            module.pe += torch.rand_like(module.pe)
    with (
        vk.randomize_positions(model, LONGEST),
        pytest.raises(ValueError, match="are not sinusoidal"),
    ):
        call(model, "UNetMotionModel")


@pytest.mark.parametrize(("frames", "channels"), [(32, 320), (7, 16)])
def test_the_motion_modules_table_is_that_of_diffusers_whatever_the_default_type(frames, channels):
    expected = SinusoidalPositionalEmbedding(channels, max_seq_length=frames).pe
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            assert torch.equal(positions._motion_table(frames, channels), expected)
