"""What real interrupts do, in a process of its own; test_signals.py reads what it prints.

Where a shell has started the tests in the background, they and their children have interrupts
ignored: here they are not.
"""

import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import diffusers
import torch

import vstar_kernels as vk
from examples import tiny
from tests.models.models import TEXT, TOKENS, call, make, noise
from tests.models.test_signals import FRAMES, LATTE, MOTION, state
from vstar_kernels.cli.main import main
from vstar_kernels.models.front_end import temporal_layers


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)  # Python runs the handler before its next statement


def interrupted(job):
    try:
        job()
    except KeyboardInterrupt:
        return True
    return False


def in_a_forward_pass():
    return {name: _in_a_forward_pass(name) for name in (MOTION, LATTE)}


def _in_a_forward_pass(name):
    model = make(name)
    stock, before = call(model, name), state(model)
    layer = temporal_layers(model)[-1].module

    def run():
        return call(model, name, frames=FRAMES[name])

    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None), extend_positions=True):
        during = state(model)
        expected = run()
        hook = layer.register_forward_pre_hook(interrupt)
        ok = [interrupted(run)]
        hook.remove()
        ok.append(state(model) == during)
        ok.append(torch.equal(run(), expected))
        hook = layer.register_forward_pre_hook(interrupt)
        ok.append(interrupted(run))
        hook.remove()
    ok.append(state(model) == before and torch.equal(call(model, name), stock))
    return ok


def in_optimize_noise():
    name = "UNet3DConditionModel"
    model = make(name).requires_grad_(True)
    before, stock = state(model), call(model, name)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    layer = temporal_layers(model)[5].module.to_q
    calls, at = [], []

    def count(*_):
        calls.append(1)
        if len(calls) in at:
            interrupt()

    def optimise():
        return vk.optimize_noise(
            model,
            torch.eye(6),
            (1, 4, 6, 8, 8),
            {"encoder_hidden_states": noise(1, TOKENS, TEXT, seed=1)},
            scheduler=scheduler,
            iterations=2,
            progress=False,
            generator=torch.Generator().manual_seed(0),
        )

    hook = layer.register_forward_pre_hook(count)
    expected = optimise()
    ok, total = [], len(calls)
    # In the forward pass, in the layers that the backward pass calls again, and at the very end.
    for place in range(1, total + 1):
        calls.clear()
        at[:] = [place]
        ok.append(interrupted(optimise))
        hook.remove()
        ok.append(state(model) == before)
        ok.append(all(p.requires_grad and p.grad is None for p in model.parameters()))
        hook = layer.register_forward_pre_hook(count)
    hook.remove()
    ok.append(torch.equal(optimise().noise, expected.noise))
    ok.append(torch.equal(call(model, name), stock))
    return [total, ok]


def in_a_whole_call():
    pipe = tiny.animatediff()
    pipe.set_progress_bar_config(disable=True)
    before, encoder = state(pipe.unet), sorted(vars(pipe.text_encoder))
    vstar = vk.VSTAR(pipe, vk.TARConfig(1.0), extend_positions=True)
    seeds = torch.get_rng_state()

    def make_video():
        return vstar(
            "a cat",
            num_frames=40,
            seed=1,
            maps=True,
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="pt",
        ).frames

    expected, ok = make_video(), []
    for place in (pipe.text_encoder, pipe.unet.conv_in, pipe.unet.conv_out, pipe.vae.decoder):
        hook = place.register_forward_pre_hook(interrupt)
        ok.append(interrupted(make_video))
        hook.remove()
        ok += [state(pipe.unet) == before, sorted(vars(pipe.text_encoder)) == encoder]
        ok.append(torch.equal(torch.get_rng_state(), seeds))
    ok.append(torch.equal(make_video(), expected))
    return ok


def in_generate():
    folder = Path(tempfile.mkdtemp())
    tiny.text_to_video().save_pretrained(str(folder / "model"))
    forward, calls = diffusers.UNet3DConditionModel.forward, []

    def run(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(1)
        interrupt()
        return out

    diffusers.UNet3DConditionModel.forward = run
    status = main(
        [
            "generate",
            "--model",
            str(folder / "model"),
            "--output",
            str(folder / "output"),
            "--frames",
            "3",
            "--steps",
            "2",
            "--prompt",
            "a kite",
        ]
    )
    diffusers.UNet3DConditionModel.forward = forward
    left = [path.name for path in folder.iterdir()]
    shutil.rmtree(folder)
    return [status, len(calls), left]


def while_another_thread_runs_the_model():
    name = LATTE
    model = make(name)
    before = state(model)
    inside, go_on = threading.Event(), threading.Event()
    results = []

    def stop(*_):
        if threading.current_thread() is threading.main_thread():
            inside.wait(60)
            interrupt()
        else:
            inside.set()
            go_on.wait(60)

    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None), extend_positions=True):
        expected = call(model, name, frames=9)
        hook = model.temporal_transformer_blocks[0].register_forward_pre_hook(stop)
        thread = threading.Thread(target=lambda: results.append(call(model, name, frames=9)))
        thread.start()
        ok = [interrupted(lambda: call(model, name, frames=7))]
        go_on.set()
        thread.join(60)
        ok.append(torch.equal(results[0], expected))
        hook.remove()
    ok.append(state(model) == before)
    return ok


JOBS = (
    in_a_forward_pass,
    while_another_thread_runs_the_model,
    in_optimize_noise,
    in_a_whole_call,
    in_generate,
)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    results = {job.__name__: job() for job in JOBS}
    print()
    print(json.dumps(results))
