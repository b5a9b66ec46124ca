"""What several processes check together: each compares what it gets with what one process has."""

from __future__ import annotations

import copy
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import LattePipeline, StableVideoDiffusionPipeline
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY
from tests.models.models import KINDS, TEXT, TOKENS, call, flat, make, noise
from vstar_kernels.models.sharded.apply import spread
from vstar_kernels.models.sharded.liveness import PATIENCE, PERIOD
from vstar_kernels.models.sharded.ranks import Ranks

CHECKS: dict[str, Callable[[Any], None]] = {}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS[function.__name__] = function
    return function


def by_hand(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check that takes long: where somebody says how many processes."""
    return check(function) if "SHARDED_PROCESSES" in os.environ else function


def close(actual, expected, most=1e-5) -> None:
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert error <= most, f"off by {error:.2g}"


# ---- frames ----


def both(mesh, name, run, *, most=1e-5):
    """Compares what a model gives in one process and in all of them."""
    model = make(name).to(torch.get_default_dtype())
    expected = run(model)
    with vk.shard_frames(model, mesh):
        actual = run(model)
    close(actual, expected, most)


@contextmanager
def in_float64(name):
    """Rounding errors, which normalization of a few numbers makes large, are none then."""
    # LaVie's is the only one that cannot.
    torch.set_default_dtype(torch.float32 if name == "LaVie" else torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@check
@torch.no_grad()
def bytes_sent(mesh):
    """What processes send is what one counts of tensors without numbers, as benchmarks.sharding."""
    for name in ("UNet3DConditionModel", "UNetMotionModel", "LatteTransformer3DModel"):
        model, paper = make(name), Ranks(mesh.get_rank(), mesh.size())
        with vk.shard_frames(model, mesh) as handle:
            call(model, name, batch=2)
        inputs = {x: y.to("meta") for x, y in KINDS[name].inputs(noise(2, 4, 6, 8, 8)).items()}
        with spread({"": model.to("meta")}, paper):
            model(**inputs, timestep=torch.ones(2, device="meta"))
        sent = handle.sent
        assert sent.pop("check") > 0  # of numbers
        assert sent == paper.sent


@check
@torch.no_grad()
def models(mesh):
    for name in KINDS:
        model = make(name)
        settings = {"batch": 2, "frames": 6, "size": (6, 10)}
        expected = call(model, name, **settings)
        with vk.shard_frames(model, mesh) as handle:
            actual = call(model, name, **settings)
            assert handle.sent["all-to-all"]
        close(actual, expected)
        # As it was, to the last bit.
        assert torch.equal(call(model, name, **settings), expected)
        assert not any("forward" in vars(module) for module in model.modules())
    # As many frames as processes, and one more; of 1 position one process has none.
    for name in KINDS:
        # SVD's normalization refuses one number; Latte has positions for 6 frames.
        size = (4, 4) if name.startswith("UNetSpatio") else (2, 2)
        counts = (6,) if name.startswith("Latte") else (mesh.size() + 1, mesh.size())
        most = 1e-4 if name == "LaVie" else 1e-10
        for frames in counts:
            run = functools.partial(call, name=name, frames=frames, size=size)
            with in_float64(name):
                both(mesh, name, run, most=most)


def tar(model, *, name, config, size, positions):
    """What a model and its maps are under TAR."""
    with vk.apply_tar(model, config), vk.capture_maps(model) as capture:
        out = call(model, name, batch=2, size=size)
    assert {m.positions for m in capture.maps} <= positions
    return torch.cat([out, *(m.map.flatten() for m in capture.maps)])


@check
@torch.no_grad()
def regularized(mesh):
    config = vk.TARConfig({0: 1.0, 1: 2.0}, strength=3.0, steps=None)
    latte = vk.TARConfig(1.0, strength=3.0, steps=None)
    for name in KINDS:
        used = latte if name.startswith("Latte") else config
        # Of 9 positions one process has more than the other, of 1 one has none.
        for size, positions in (((6, 6), {36, 9}), ((2, 2), {4, 1})):
            run = functools.partial(tar, name=name, config=used, size=size, positions=positions)
            with in_float64(name):
                both(mesh, name, run, most=1e-4 if name == "LaVie" else 1e-6)
    # In the other order, and for more frames than there are positions.
    for name, frames in (("UNetMotionModel", 18), ("LatteTransformer3DModel", 9)):
        model = make(name)
        config = vk.TARConfig(1.0, steps=None)
        with vk.apply_tar(model, config, extend_positions=True):
            expected = call(model, name, frames=frames)
            with vk.shard_frames(model, mesh):
                close(call(model, name, frames=frames), expected)
            assert torch.equal(call(model, name, frames=frames), expected)
        handle = vk.shard_frames(model, mesh)
        with vk.apply_tar(model, config, extend_positions=True):
            close(call(model, name, frames=frames), expected)
        handle.remove()
        with pytest.raises((ValueError, RuntimeError)):
            call(model, name, frames=frames)  # too many again


@check
@torch.no_grad()
def frame_prompts(mesh):
    for name in ("UNet3DConditionModel", "UNetMotionModel", "LatteTransformer3DModel"):
        texts, negative = (noise(6, TOKENS, TEXT, seed=seed) for seed in (5, 6))
        for more in ({"guidance": False}, {"guidance": True}, {"negative": negative}):
            put_on = functools.partial(vk.condition_frames, embeddings=texts, **more)

            def prompted(model, name=name, put_on=put_on):
                with put_on(model):
                    return call(model, name, batch=2)

            both(mesh, name, prompted)


@check
def gradients(mesh):
    for name in ("UNet3DConditionModel", "LatteTransformer3DModel"):
        wanted = []
        for sharded in (False, True):
            model = make(name)
            if sharded:
                vk.shard_frames(model, mesh)
                if name.startswith("Latte"):
                    model.train().enable_gradient_checkpointing()
            sample = noise(1, 4, 6, 4, 4).requires_grad_()
            text = noise(1, TOKENS, TEXT, seed=1).requires_grad_()
            first = next(iter(KINDS[name].inputs(sample)))
            given = {first: sample, "encoder_hidden_states": text}
            out = model(**given, timestep=torch.tensor([10]), return_dict=False)[0]
            (out * noise(*out.shape, seed=7)).sum().backward()
            wanted.append((sample.grad, text.grad))
        for one, other in zip(*wanted, strict=True):
            close(one, other)
    # Of one frame each or of two; I2VGen-XL's first image is read by all processes.
    for name, asked in (("lvdm", ("context",)), ("I2VGenXLUNet", ("image_latents",))):
        for frames in (mesh.size(), mesh.size() + 1):
            wanted = []
            for sharded in (False, True):
                model = make(name)
                given = KINDS[name].inputs(noise(1, 4, frames, 4, 4))
                leaves = [given[argument].requires_grad_() for argument in asked]
                with vk.shard_frames(model, mesh) if sharded else nullcontext():
                    step = "timesteps" if name == "lvdm" else "timestep"
                    out = flat(model(**given, **{step: torch.tensor([10])}))
                    (out * noise(*out.shape, seed=7)).sum().backward()
                wanted.append([leaf.grad for leaf in leaves])
            for one, other in zip(*wanted, strict=True):
                close(one, other)


@check
@torch.no_grad()
def refusals(mesh):
    model = make("UNetMotionModel")
    for wrong, error, message in (
        (2, TypeError, "mesh must be a torch.distributed DeviceMesh"),
        (dist.init_device_mesh("cpu", (1, mesh.size())), ValueError, "one dimension, got 2"),
    ):
        with pytest.raises(error, match=message):
            vk.shard_frames(model, wrong)
    for timeout in (0, float("inf"), "1"):
        with pytest.raises(ValueError, match="timeout must be more than 0 seconds or None, got"):
            vk.shard_frames(model, mesh, timeout=timeout)
    with vk.shard_frames(model, mesh):
        threads = set(threading.enumerate())
        with pytest.raises(ValueError, match="under shard_frames already"):
            vk.shard_frames(model, mesh)
        time.sleep(2 * PERIOD)
        assert set(threading.enumerate()) <= threads  # nor does what was not put on live on
        few = mesh.size() - 1
        with pytest.raises(ValueError, match=f"{few} frames are too few for {mesh.size()} proc"):
            call(model, "UNetMotionModel", frames=few)
        sample = noise(1, 4, 6, 4, 4, seed=mesh.get_rank())
        with pytest.raises(ValueError, match=r"different sample, .*manual_seed"):
            model(**KINDS["UNetMotionModel"].inputs(sample), timestep=10)
        copied = copy.deepcopy(model)
        assert call(copied, "UNetMotionModel").isfinite().all()
        assert "forward" not in vars(copied) or not hasattr(copied.forward, "previous")
    close(call(copied, "UNetMotionModel"), call(make("UNetMotionModel"), "UNetMotionModel"))
    with pytest.raises(ValueError, match="compiled"):
        vk.shard_frames(torch.compile(model), mesh)
    other = make("UNet3DConditionModel")
    sample = torch.zeros(1, 4, 128 + mesh.get_rank(), 2, 2)  # a large number that is one off
    with vk.shard_frames(other, mesh), pytest.raises(ValueError, match="different sample"):
        other(**KINDS["UNet3DConditionModel"].inputs(sample), timestep=10)
    with pytest.raises(ValueError, match=r"enable_parallelism\(.*ulysses_degree"):
        vk.shard_frames(TINY["wan"].make(), mesh)


# ---- pipelines ----


@check
def a_pipeline(mesh):
    from examples import tiny

    in_pipeline(mesh, tiny.animatediff())


@by_hand
def pipelines(mesh):
    from examples import tiny

    for kind in ("text_to_video", "i2vgen_xl", "stable_video_diffusion", "latte"):
        pipe = getattr(tiny, kind)().to(torch.float64)  # guidance makes rounding errors larger
        in_pipeline(mesh, pipe, most=1e-6)


@by_hand
@torch.no_grad()
def ulysses(mesh):
    """Full-3D transformers, whose tokens diffusers spreads, and whose heads it exchanges."""
    from diffusers import ContextParallelConfig

    tiny, rule, frames = TINY["wan"], vk.FrameRule.tar(1.0), 4
    model = tiny.make(num_attention_heads=4)
    with vk.apply_frames(model, rule):
        expected = tiny.run(model, frames)
    # diffusers takes a rank's device modulo the number of accelerators, which is none here.
    with mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.size()))
    plain = tiny.run(model, frames)
    with vk.apply_frames(model, rule):
        close(tiny.run(model, frames), expected)
    assert (plain - expected).abs().max() > 1e-3
    ring = tiny.make(num_attention_heads=4)
    with mock.patch("torch.accelerator.device_count", return_value=1):
        ring.enable_parallelism(config=ContextParallelConfig(ring_degree=mesh.size()))
    with vk.apply_frames(ring, rule), pytest.raises(ValueError, match="under ring attention"):
        tiny.run(ring, frames)


@by_hand
def free_noise(mesh):
    from examples import tiny

    pipe = tiny.animatediff()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    in_pipeline(mesh, pipe, num_frames=8)


@by_hand
def sparse_control(mesh):
    from tests.models.test_pipelines import image, sparse_pipeline

    control = {"conditioning_frames": [image()], "controlnet_frame_indices": [0]}
    in_pipeline(mesh, sparse_pipeline(), **control)


def in_pipeline(mesh, pipe, most=1e-5, **changes):
    """A video under TAR and guidance, whose latents are the same from all processes as from one."""
    from tests.models.test_pipelines import run

    if not isinstance(pipe, StableVideoDiffusionPipeline | LattePipeline):
        changes = {"num_frames": 5} | changes
    with vk.apply_tar(pipe, vk.TARConfig(1.0, strength=20.0, steps=1)):
        expected = run(pipe, **changes)
        with vk.shard_frames(pipe, mesh) as handle:
            close(run(pipe, **changes), expected, most)
            assert handle.sent["all-to-all"]
        assert torch.equal(run(pipe, **changes), expected)


# ---- DTensors ----


def whole(x):
    """What a DTensor is in one process, and its gradient."""
    return x.full_tensor()


def inputs(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(mesh, run, tensors, placements, plain, *, exact, exact_plain=False):
    """Compares results and gradients of DTensors with those of tensors, and of plain ones.

    ``tensors`` are placed by ``placements``; ``plain`` are the same in all processes and stay so.
    """
    ours = [
        distribute_tensor(x, mesh, p).requires_grad_()
        for x, p in zip(tensors, placements, strict=True)
    ]
    theirs = [x.clone().requires_grad_() for x in tensors]
    our_plain, their_plain = ([x.clone().requires_grad_() for x in plain] for _ in range(2))
    results = run(*ours, *our_plain), run(*theirs, *their_plain)
    results = [x if isinstance(x, tuple) else (x,) for x in results]
    for one, other in zip(*results, strict=True):
        assert isinstance(one, DTensor)
        same(whole(one), other, exact)
    gradients = inputs(*(x.shape for x in results[1]), seed=1)
    sum((whole(x) * g).sum() for x, g in zip(results[0], gradients, strict=True)).backward()
    sum((x * g).sum() for x, g in zip(results[1], gradients, strict=True)).backward()
    for one, other in zip(ours, theirs, strict=True):
        # Of what all processes have, a gradient may be a sum that is yet to be made.
        assert one.grad.placements in (one.placements, (Partial(),))
        same(whole(one.grad), other.grad, exact)
    for one, other in zip(our_plain, their_plain, strict=True):
        assert not isinstance(one.grad, DTensor)
        same(one.grad, other.grad, exact_plain)


def same(one, other, exact):
    if exact:
        assert torch.equal(one, other), f"off by {float((one - other).abs().max()):.2g}"
    else:
        close(one, other)


@check
def dtensors_tar(mesh):
    size = mesh.size()
    shape = (size, 2 * size, 5, size, 8)
    attended = inputs(shape, shape, shape)
    (shared, per_head, stat) = inputs((5, 5), (size, 5, 5), shape[:-1], seed=2)
    table = inputs((5,), seed=3)[0]

    def run(query, key, value, delta=None, stat="row_max", **maps):
        bias = vk.GaussianBias(1.0, stat=stat)
        if delta is not None:
            bias = (vk.ToeplitzBias if delta.ndim == 1 else vk.DenseBias)(delta, stat=stat)
        return vk.tar_attention(query, key, value, bias, **maps)

    for dim in (0, 1, 3, None):
        placements = [[Replicate() if dim is None else Shard(dim)]] * 3
        by_head = dim == 3
        compare(mesh, run, attended, placements, [], exact=True)
        compare(mesh, run, attended, placements, [shared], exact=True, exact_plain=dim is None)
        compare(mesh, run, attended, placements, [table], exact=True)
        compare(mesh, run, attended, placements, [per_head], exact=True, exact_plain=by_head)
        compare(mesh, run, attended, placements, [shared, stat], exact=True)
        mean_map = functools.partial(run, return_map=True)
        compare(mesh, mean_map, attended, placements, [], exact=dim is None)  # a mean is a sum
        each = functools.partial(run, return_map=True, map_heads=True)
        compare(mesh, each, attended, placements, [], exact=dim is None)
    # A gradient of the mean map that is sharded itself.
    placed = [distribute_tensor(x, mesh, [Shard(3)]).requires_grad_() for x in attended]
    _, mean_map = run(*placed, return_map=True)
    weights = inputs(mean_map.shape, seed=1)[0]
    (
        mean_map.redistribute(placements=[Shard(0)]) * distribute_tensor(weights, mesh, [Shard(0)])
    ).sum().backward()
    leaves = [x.clone().requires_grad_() for x in attended]
    (run(*leaves, return_map=True)[1] * weights).sum().backward()
    for one, other in zip(placed[:2], leaves[:2], strict=True):
        close(whole(one.grad), other.grad)
    uneven = inputs((2 * size - 1, 5, 3, 8))[0]
    for dim in (0, 2):
        placed = distribute_tensor(uneven, mesh, [Shard(dim)])
        expected = vk.tar_attention(uneven, uneven, uneven, return_map=True)
        actual = vk.tar_attention(placed, placed, placed, return_map=True)
        for one, other in zip(actual, expected, strict=True):
            close(whole(one), other)
    for dim, of in ((1, 4), (3, 4), (2, 5), (4, 5)):
        x = distribute_tensor(torch.zeros((size,) * of), mesh, [Shard(dim)])
        with pytest.raises(ValueError, match=rf"cannot be sharded along dimension {dim} of query"):
            vk.tar_attention(x, x, x)
    x = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
    for backend in ("cpu", "reference"):
        assert vk.tar_attention(x, x, x, backend=backend).placements == (Shard(0),)


@check
def dtensors_columns(mesh):
    size = mesh.size()
    query, key, value, columns = inputs(
        (size, 2 * size, size, 8), (size, 3, size, 8), (size, 3, size, 8), (3, 2)
    )
    for dim, others in ((0, Shard(0)), (1, Replicate()), (2, Shard(2)), (None, Replicate())):
        placements = [[Replicate() if dim is None else Shard(dim)], [others], [others]]
        exact = dim in (0, None)  # or the gradients of keys are sums over processes
        attended = [query, key, value]
        with_value = lambda q, k, v: vk.column_attention(q, k, v, columns)  # noqa: E731
        compare(mesh, with_value, attended, placements, [], exact=exact)
        without = lambda q, k: vk.column_attention(q, k, None, columns)  # noqa: E731
        compare(mesh, without, attended[:2], placements[:2], [], exact=exact)
        with pytest.warns(vk.SlowBackendWarning) if dim == 0 else nullcontext():
            compare(mesh, vk.column_attention, attended, placements, [columns], exact=False)
    key = distribute_tensor(torch.zeros(size, size, size, 8), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="cannot be sharded along dimension 1 of key"):
        vk.column_attention(query, key, key, torch.ones(size, 1))


@check
def dtensors_frames(mesh):
    size = mesh.size()
    layout = vk.Layout(vk.Frames(3, 4), vk.Text(2))
    query, key, value = inputs(*[(size, layout.tokens, 2 * size, 8)] * 3)
    shared, per_head = inputs((3, 3), (2 * size, 3, 3), seed=2)
    rules = {
        "tar": lambda: vk.FrameRule.tar(1.0),
        "per head": lambda: vk.FrameRule.bias(per_head),
    }
    lengths = torch.full((size,), layout.tokens - 1, dtype=torch.int32)
    for dim in (0, 2, None):
        placements = [[Replicate() if dim is None else Shard(dim)]] * 3
        for rule in rules.values():
            for options in ({}, {"key_lengths": lengths}, {"return_map": True, "map_heads": True}):
                run = functools.partial(vk.frame_attention, layout=layout, rule=rule(), **options)
                compare(mesh, run, [query, key, value], placements, [], exact=True)
        compare(
            mesh,
            lambda q, k, v, t: vk.frame_attention(q, k, v, layout, vk.FrameRule.bias(t)),
            [query, key, value], placements, [shared], exact=False,
        )  # fmt: skip
        compare(
            mesh,
            lambda q, k, v: vk.frame_attention(q, k, v, layout, rules["tar"](), return_map=True),
            [query, key, value], placements, [], exact=False,
        )  # fmt: skip
    few = inputs(*[(1, layout.tokens, size, 8)] * 2)
    placed = [distribute_tensor(x, mesh, [Shard(2)]) for x in (query[:1], *few)]
    expected = vk.frame_attention(query[:1], *few, layout, rules["tar"]())
    same(whole(vk.frame_attention(*placed, layout, rules["tar"]())), expected, exact=True)
    fewer = inputs((1, layout.tokens, 1, 8))[0]
    placed[1] = placed[2] = distribute_tensor(fewer, mesh, [Replicate()])
    with pytest.raises(ValueError, match=f"heads of query, which read 1 of keys, .* {size} proc"):
        vk.frame_attention(*placed, layout, rules["tar"]())
    x = distribute_tensor(query, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="frame_attention cannot be sharded along dimension 1"):
        vk.frame_attention(x, x, x, layout)


# ---- the last: one of them dies ----


@check
@torch.no_grad()
def a_process_dies(mesh):
    model = make("UNetMotionModel")
    with vk.shard_frames(model, mesh, timeout=20):
        call(model, "UNetMotionModel")
        if mesh.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(vk.RankFailure, match=r"rank 1 \(pid \d+ on .*\) has died") as caught:
            call(model, "UNetMotionModel")
        assert caught.value.ranks == (1,)
        assert time.monotonic() - begun < 20
        if mesh.get_rank() == 0 and mesh.size() > 2:
            time.sleep(2 * PATIENCE)  # it keeps the store, which the others ask
