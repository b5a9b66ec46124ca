"""Models under TAR called from several threads: each forward pass is that of a call of its own.

The threads meet at a barrier in every temporal layer, so that their forward passes are interleaved
in each of them, every time.
"""

import copy
import gc
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import run_python
from tests.models.models import KINDS, TEXT, TOKENS, call, make, noise
from vstar_kernels.testing import inputs

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import AnimateDiffPipeline, DDIMScheduler

from examples import tiny
from vstar_kernels.models.front_end import temporal_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WAIT = 60  # seconds, for a test that would hang
UNET, MOTION, LATTE = "UNet3DConditionModel", "UNetMotionModel", "LatteTransformer3DModel"
everywhere = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def scheduler():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(25)
    return scheduler


def together(*jobs):
    """Runs jobs in threads of their own, which begin at the same time; their results or errors."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(WAIT)
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs, timeout=2 * WAIT))


@contextmanager
def in_step(model, parties):
    """Lets forward passes enter and leave each temporal layer together."""
    barrier = threading.Barrier(parties)

    def meet(*_):
        barrier.wait(WAIT)

    hooks = []
    for layer in temporal_layers(model):
        hooks.append(layer.module.register_forward_pre_hook(meet))
        hooks.append(layer.module.register_forward_hook(meet))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("name", "stock_elsewhere"), [*((name, False) for name in KINDS), (UNET, True), (LATTE, True)]
)
def test_forward_passes_at_different_steps(name, scheduler, stock_elsewhere):
    model = make(name)
    timesteps = scheduler.timesteps[[0, 20, 13]]
    config = vk.TARConfig(1.0, strength=3.0)
    with vk.apply_tar(model, config, scheduler=scheduler, stock_elsewhere=stock_elsewhere):
        alone = [call(model, name, timestep=t) for t in timesteps]
        with in_step(model, len(timesteps)), torch.no_grad():
            found = together(*(lambda t=t: call(model, name, timestep=t) for t in timesteps))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    with vk.apply_tar(model, vk.TARConfig(1.0, strength=0.0, steps=None)):
        assert not torch.allclose(call(model, name, timestep=timesteps[0]), alone[0], atol=1e-4)


@pytest.mark.parametrize("name", [MOTION, "SparseControlNetModel", LATTE])
def test_forward_passes_of_different_lengths_beyond_the_positions(name):
    """Each has positions of its own length; nothing is put into the model."""
    model = make(name)
    lengths = (6, 17, 21)
    config = vk.TARConfig(1.0, steps=None)
    with vk.apply_tar(model, config, extend_positions=True):
        alone = [call(model, name, frames=n) for n in lengths]
        with in_step(model, len(lengths)):
            found = together(*(lambda n=n: call(model, name, frames=n) for n in lengths))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_widths_are_those_of_the_forward_pass():
    model = make(UNET)
    sizes = [(8, 8), (8, 16)]
    config = vk.TARConfig(by_width={8: 4.0}, steps=None, strength=3.0)  # level 0, or level 1
    with vk.apply_tar(model, config):
        alone = [call(model, UNET, size=size) for size in sizes]
        with in_step(model, len(sizes)):
            found = together(*(lambda s=s: call(model, UNET, size=s) for s in sizes))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_maps_and_frame_prompts():
    """Other handles keep the forward passes apart too: each map is of its own step and text."""
    model = make(UNET)
    texts = noise(6, TOKENS, TEXT, seed=5)
    batches = {0: 1, 1: 2}  # two videos of the prompt: where the texts go depends on the batch

    def run(step):
        capture.step = handle.step = step
        return call(model, UNET, batch=batches[step])

    with (
        vk.apply_tar(model, vk.TARConfig(1.0, strength=3.0, steps=0)) as handle,
        vk.condition_frames(model, texts, guidance=False),
        vk.capture_maps(model) as capture,
    ):
        alone = [run(step) for step in batches]
        maps = capture.maps
        capture.clear()
        with in_step(model, len(batches)):
            found = together(*(lambda s=s: run(s) for s in batches))
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
        both = {(m.layer, m.step): m for m in capture.maps}
        assert len(both) == len(maps) == 2 * KINDS[UNET].layers
        for expected in maps:
            item = both[expected.layer, expected.step]
            assert item.calls == 1
            assert torch.equal(item.map, expected.map)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_step_is_announced_by_the_thread_that_calls():
    model = make(UNET)
    with vk.apply_tar(model, vk.TARConfig(1.0, strength=3.0, steps=0)) as handle:
        alone = {}
        for handle.step in (0, 1):
            alone[handle.step] = call(model, UNET)
        handle.step = None
        announced = threading.Barrier(2)

        def run(step):
            handle.step = step
            announced.wait(WAIT)
            return call(model, UNET)

        found = together(lambda: run(0), lambda: run(1))
        assert torch.equal(found[0], alone[0])
        assert torch.equal(found[1], alone[1])

        announced = threading.Barrier(3)
        finished = threading.Barrier(3)

        def announce(step):
            handle.step = step
            announced.wait(WAIT)
            finished.wait(WAIT)

        def unannounced():
            announced.wait(WAIT)
            try:
                return call(model, UNET)
            finally:
                finished.wait(WAIT)

        *_, error = together(lambda: announce(0), lambda: announce(1), unannounced)
        assert isinstance(error, RuntimeError)
        assert "announce it in that thread" in str(error)


def test_a_pool_runs_what_one_thread_announces():
    model = make(UNET)
    with vk.apply_tar(model, vk.TARConfig(1.0, strength=3.0, steps=0)) as handle:
        for handle.step in (0, 1):
            (found,) = together(lambda: call(model, UNET))
            assert torch.equal(found, call(model, UNET))


def test_an_announcement_ends_with_its_thread(scheduler):
    """The next thread, which is given the number of the one that ended, is at another step."""
    model = make(UNET)
    timestep = scheduler.timesteps[0]
    config = vk.TARConfig(1.0, strength=3.0, steps=0)
    with vk.apply_tar(model, config, scheduler=scheduler) as handle:
        expected = call(model, UNET, timestep=timestep)
        for late in ([5], [5, 6]):
            together(*(lambda step=step: setattr(handle, "step", step) for step in late))
            (found,) = together(lambda: call(model, UNET, timestep=timestep))
            assert torch.equal(found, expected)


# Pipelines that share a model.


def two_pipelines():
    """Two pipelines with one UNet; the first one's schedule holds all timesteps of the second."""
    first = tiny.animatediff()
    # A tokenizer that two threads call may pad one's prompt as the other asked for.
    tokenizer = copy.deepcopy(first.tokenizer)
    second = AnimateDiffPipeline(**first.components | {"tokenizer": tokenizer})
    for pipe, steps in ((first, 50), (second, 5)):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler(steps_offset=1)
        pipe.scheduler.set_timesteps(steps)
    assert first.unet is second.unet
    assert set(second.scheduler.timesteps.tolist()) < set(first.scheduler.timesteps.tolist())
    return first, second


def sample(pipe, steps):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a cat",
        num_frames=4,
        height=16,
        width=16,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).frames


def test_the_step_is_that_of_the_pipeline_that_runs():
    first, second = two_pipelines()
    seen = []
    config = vk.TARConfig(1.0, strength=20.0, steps=lambda step, _: seen.append(step) or step < 2)
    with vk.apply_tar(second, config):
        expected = sample(second, 5)
        seen.clear()
    with vk.apply_tar(first, config):
        found = sample(second, 5)
        assert seen == [0, 1, 2, 3, 4]
        assert torch.equal(found, expected)
        seen.clear()
        sample(first, 5)
        assert seen == [0, 1, 2, 3, 4]
        with vk.capture_maps(first) as capture:
            sample(second, 5)
        assert {item.step for item in capture.maps} == {0, 1, 2, 3, 4}


def test_two_pipelines_at_a_time():
    first, second = two_pipelines()
    jobs = (first, 10), (second, 5)
    with vk.apply_tar(first, vk.TARConfig(1.0, strength=20.0, steps=0.3)):
        alone = [sample(*job) for job in jobs]
        found = together(*(lambda job=job: sample(*job) for job in jobs))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


# Gradient checkpointing, which calls layers again in the backward pass.


def checkpointed(name):
    model = make(name).requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [MOTION, LATTE])
@pytest.mark.parametrize("reentrant", [False, True])
def test_several_steps_in_one_graph(name, scheduler, reentrant):
    """Layers that are called again are regularized as they were in their own forward pass."""
    timesteps = scheduler.timesteps[[0, 20, 1]]

    def run(model):
        with vk.apply_tar(
            model,
            vk.TARConfig(1.0, strength=3.0),
            scheduler=scheduler,
            backend="reference",
            extend_positions=True,
        ):
            outs = [call(model, name, frames=17, timestep=t) for t in timesteps]
            sum(out.square().mean() for out in outs).backward()
        return gradients(model)

    plain = run(make(name).requires_grad_(True).train())
    model = checkpointed(name)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda function, *args: (
                torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
            )
    found = run(model)
    assert found.keys() <= plain.keys()
    assert any("to_q" in key for key in found)
    for key, gradient in found.items():
        if not reentrant or "temporal" in key or "motion" in key:
            torch.testing.assert_close(gradient, plain[key], rtol=1e-3, atol=1e-6)


def test_a_backward_pass_in_another_thread(scheduler):
    """As a GPU's is always."""

    def run(model, backward):
        with vk.apply_tar(
            model, vk.TARConfig(1.0, strength=3.0), scheduler=scheduler, backend="reference"
        ):
            out = call(model, LATTE, timestep=scheduler.timesteps[0])
            with torch.no_grad():
                call(model, LATTE, timestep=scheduler.timesteps[20])
            backward(out.square().mean())
        return gradients(model)

    plain = run(make(LATTE).requires_grad_(True).train(), torch.Tensor.backward)
    found = run(checkpointed(LATTE), lambda loss: together(loss.backward))
    assert found.keys() == plain.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_a_whole_forward_pass_that_is_checkpointed(scheduler):
    def run(wrap):
        model = make(LATTE).requires_grad_(True)
        with vk.apply_tar(
            model, vk.TARConfig(1.0, strength=3.0), scheduler=scheduler, backend="reference"
        ):
            steps = scheduler.timesteps[[0, 20]]
            outs = [wrap(lambda t=t: call(model, LATTE, timestep=t)) for t in steps]
            sum(out.square().mean() for out in outs).backward()
        return gradients(model)

    plain = run(lambda job: job())
    found = run(lambda job: torch.utils.checkpoint.checkpoint(job, use_reentrant=False))
    for key, gradient in plain.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_layers_that_nobody_can_place_raise(scheduler):
    """Passes of two threads, whose autograd nodes have the same numbers, at different steps."""
    model = checkpointed(LATTE)
    timesteps = scheduler.timesteps[[0, 20]]
    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler, backend="reference"):
        outs = together(*(lambda t=t: call(model, LATTE, timestep=t) for t in timesteps))
        with pytest.raises(RuntimeError, match=r"cannot be told for which of 2 forward passes"):
            outs[0].sum().backward()
    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None), backend="reference"):
        outs = together(*(lambda t=t: call(model, LATTE, timestep=t) for t in timesteps))
        sum(out.sum() for out in outs).backward()  # it does not matter whose they are


# Handles that come and go while another thread runs.


@pytest.mark.parametrize("kind", ["tar", "prompts", "maps"])
def test_a_handle_removed_while_another_thread_runs(kind):
    model = make(UNET)
    stock = call(model, UNET)
    layer = temporal_layers(model)[8].module
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(WAIT)

    apply = {
        "tar": lambda: vk.apply_tar(model, vk.TARConfig(1.0, strength=3.0, steps=None)),
        "prompts": lambda: vk.condition_frames(model, noise(6, TOKENS, TEXT, seed=5)),
        "maps": lambda: vk.capture_maps(model),
    }
    handle = apply[kind]()
    hook = layer.register_forward_pre_hook(wait)

    def remove():
        inside.wait(WAIT)
        handle.remove()
        go_on.set()

    found, _ = together(lambda: call(model, UNET), remove)
    hook.remove()
    if kind == "maps":
        assert torch.equal(found, stock)
        assert handle.maps == []  # of the half that was seen nothing is kept
    else:
        assert isinstance(found, RuntimeError)
        assert "while it ran, in another thread" in str(found)
    assert torch.equal(call(model, UNET), stock)
    assert_stock(model)


def assert_stock(model):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(model).__name__ not in vars(type(model))
    assert all("_vstar_kernels_base" not in vars(cls) for cls in type(model).__mro__)
    assert all(
        "TAR" not in type(layer.module.processor).__name__
        for layer in temporal_layers(model)
        if hasattr(layer.module, "processor")
    )


@pytest.mark.parametrize("name", [UNET, LATTE])
def test_a_call_that_began_before_the_handle_is_no_forward_pass_of_it(name):
    """It finds the hooks, but nothing would end the pass, or notice that the handle is removed."""
    model = make(name)
    stock, begun = call(model, name), model._call_impl  # as another thread has looked it up
    config = vk.TARConfig(1.0, strength=3.0, steps=None)
    with vk.apply_tar(model, config):
        with pytest.raises(RuntimeError, match=r"put on this .* while it ran, in another thread"):
            call(begun, name)
        regularized = call(model, name)
    assert not torch.equal(regularized, stock)
    assert torch.equal(call(model, name), stock)
    assert_stock(model)


def test_handles_that_come_and_go():
    """A forward pass is regularized or stock from end to end, or it raises."""
    model = make(LATTE)
    config = vk.TARConfig(1.0, strength=3.0, steps=None)
    stock = call(model, LATTE)
    with vk.apply_tar(model, config):
        regularized = call(model, LATTE)
    over = threading.Event()

    def toggle():
        for _ in range(60):
            with vk.apply_tar(model, config):
                pass
        over.set()

    def run():
        found, errors = [], []
        while not over.is_set():
            try:
                found.append(call(model, LATTE))
            except RuntimeError as error:
                errors.append(str(error))
        return found, errors

    done, *results = together(toggle, run, run)
    assert done is None
    for found, errors in results:
        assert all(torch.equal(x, stock) or torch.equal(x, regularized) for x in found)
        known = ("in another thread",)
        assert all(any(words in error for words in known) for error in errors)
    assert torch.equal(call(model, LATTE), stock)
    assert_stock(model)


def test_one_of_several_threads_applies_tar():
    model = make(UNET)
    for _ in range(5):
        found = together(*[lambda: vk.apply_tar(model, vk.TARConfig(1.0, steps=None))] * 4)
        handles = [handle for handle in found if not isinstance(handle, Exception)]
        errors = [error for error in found if isinstance(error, Exception)]
        assert len(handles) == 1
        assert all("under apply_tar already" in str(error) for error in errors)
        handles[0].remove()
        assert_stock(model)


def test_noise_is_optimised_for_a_model_in_one_thread_at_a_time():
    model = make(UNET)
    scheduler = tiny._scheduler()
    scheduler.set_timesteps(4)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(WAIT)

    hook = model.conv_in.register_forward_pre_hook(wait)

    def optimise():
        return vk.optimize_noise(
            model,
            torch.eye(6),
            (1, 4, 6, 8, 8),
            {"encoder_hidden_states": noise(1, TOKENS, TEXT, seed=1)},
            scheduler=scheduler,
            iterations=1,
            progress=False,
        )

    def second():
        inside.wait(WAIT)
        try:
            return optimise()
        finally:
            go_on.set()

    found, error = together(optimise, second)
    hook.remove()
    assert isinstance(error, RuntimeError)
    assert "being taken through this UNet3DConditionModel already" in str(error)
    assert len(found.losses) == 1
    assert all("forward" not in vars(module) for module in model.modules())
    assert len(optimise().losses) == 1


# The operation itself, and its import.


def operations():
    """Calls of many sizes, with every kind of bias, on every backend that runs here."""
    can = vk.backends.why_not(*inputs(1, 2, 1, 8))  # of tar_attention: others have backends too
    backends = [name for name, why in can.items() if not why]
    jobs = []
    for index in range(24):
        frames, head_dim = 1 + 7 * index % 40, (8, 40, 64)[index % 3]
        dense = vk.GaussianBias(1.0).matrix(frames)
        biases = (
            vk.GaussianBias(0.5 + index),
            vk.ToeplitzBias(dense[0], stat="map_max"),
            vk.DenseBias(dense, stat="none"),
            None,
        )
        qkv = inputs(1 + index % 3, frames, 2, head_dim, seed=index)
        more = {"return_map": index % 2 == 0, "backend": backends[index % len(backends)]}
        jobs.append((qkv, biases[index % 4], more))
    return jobs


def test_the_operation_from_many_threads():
    jobs = operations()

    def run(job):
        qkv, bias, more = job
        out = vk.tar_attention(*qkv, bias, **more)
        return out if isinstance(out, tuple) else (out,)

    alone = [run(job) for job in jobs]
    start = threading.Barrier(8)

    def all_jobs(first):
        start.wait(WAIT)
        order = jobs[first:] + jobs[:first]
        found = [run(job) for job in order]
        return found[len(jobs) - first :] + found[: len(jobs) - first]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(all_jobs, range(0, 24, 3), timeout=2 * WAIT):
            for one, other in zip(found, alone, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_import_and_first_calls_from_several_threads():
    child = run_python(
        """
import threading
start, outs = threading.Barrier(8), []
def first():
    start.wait(60)
    import vstar_kernels as vk
    import torch
    x = torch.ones(1, 5, 2, 8)
    outs.append(vk.tar_attention(x, x, x, vk.GaussianBias(1.0)))
threads = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in threads]; [t.join(60) for t in threads]
print(len(outs), all(bool(((out - 1).abs() < 1e-5).all()) for out in outs))
"""
    )
    assert child.stdout.split() == ["8", "True"], child.stderr


# What belongs to one model of one process.


@everywhere
def test_a_pickled_model_is_stock_and_says_so(name):
    model = make(name)
    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None), extend_positions=True):
        out = call(model, name)
        twin = pickle.loads(pickle.dumps(model))
        assert type(twin) is type(make(name))
        with pytest.raises(RuntimeError, match="copy of one under apply_tar"):
            call(twin, name)
        with vk.apply_tar(twin, vk.TARConfig(1.0, steps=None)):
            assert torch.equal(call(twin, name), out)
    assert_stock(twin)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_handle_says_why_it_cannot_be_pickled(way):
    model = make(UNET)
    for apply in (
        lambda: vk.apply_tar(model, "64D1"),
        lambda: vk.capture_maps(model),
        lambda: vk.condition_frames(model, noise(6, TOKENS, TEXT)),
    ):
        with (
            apply() as handle,
            pytest.raises(TypeError, match=f"a {type(handle).__name__} cannot be pickled or cop"),
        ):
            way(handle)


@pytest.fixture
def few_objects():
    """The garbage collector looks at what is made from now on, and at nothing else."""
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("few_objects")
def test_nothing_of_a_forward_pass_is_kept():
    """Of the samples and the maps, whatever many forward passes with gradients leave behind."""
    model = make(LATTE)
    with (
        vk.apply_tar(model, vk.TARConfig(1.0, steps=None), backend="reference"),
        vk.capture_maps(model, differentiable=True) as capture,
        vk.condition_frames(model, noise(6, TOKENS, TEXT)),
    ):
        counts = []
        for _ in range(3):
            call(model.requires_grad_(True), LATTE).sum().backward()
            capture.clear()
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] == counts[2]
    assert sys.getrefcount(model) < 10
