import contextlib
import os

import pytest
import torch
from filelock import FileLock

from benchmarks import measure, run, suites
from benchmarks.cases import Case, Use
from benchmarks.results import Plan, Task
from tests.helpers import on_threads

USES = (Use("a-model", "0", full_batch=40, calls=10), Use("b-model", "1", full_batch=4, calls=2))
PEERS = ("vstar_kernels", "eager", "sdpa-bias", "flex", "xformers-bias", "without-map",
         "strength-0", "sdpa", "flash-attn", "composed", "ultravico")  # fmt: skip


def small_cases():
    """One of each suite, and two numbers of frames where that matters."""
    sizes = {"batch": 4, "heads": 2, "head_dim": 16}
    for frames in (3, 8):
        yield Case("short", "forward", "float32", frames=frames, uses=USES, **sizes)
    yield Case("short", "forward", "bfloat16", frames=8, uses=USES, **sizes)
    yield Case("long", "forward", "float32", frames=200, **sizes)
    yield Case("backward", "backward", "float32", frames=8, **sizes)
    yield Case("maps", "map", "float32", frames=8, **sizes)
    yield Case("overhead", "call", "float32", frames=4, **sizes)
    for threads in (1, 2):
        yield Case("threads", "forward", "float32", frames=8, threads=threads, **sizes)
    layout = {"layout": (2, 3, 4, 1), "uses": (Use("c-model", "3 × 40", 1, 10, measured=0.01),)}
    for rule in ("tar", "window"):
        yield Case("frames", "frames", "float32", 1, 15, 2, 16, rule=rule, **layout)
    yield Case("unet", "step", "float32", 32, 2, 1, 32, latents=(4, 4))


def a_plan(cases, **changes):
    tasks = suites.tasks(list(cases), "cpu", ("warm", "default"))
    options = {"device": "cpu", "threads": 1, "isa": None, "peers": PEERS, "rounds": 5,
               "seconds": 0.02, "unet_width": 32, "tasks": tasks}  # fmt: skip
    return Plan(**{**options, **changes})


@pytest.fixture
def task():
    return Task(next(small_cases()), "warm")


@pytest.fixture
def plan():
    return a_plan(small_cases())


@contextlib.contextmanager
def no_workers():
    """What workers do is done in this process, which has imported everything."""

    def work(path, allocator, seconds, patience):
        with on_threads(torch.get_num_threads()):  # whatever a worker sets
            return measure.main(path, allocator, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_work", work)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The file of a run of all small cases.

    Where tests run side by side, the first process that needs it measures for all of them. The file
    has its name only when it is finished, so that none of them reads a part of a run that failed.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "run.jsonl"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = folder / "unfinished.jsonl"
            unfinished.unlink(missing_ok=True)
            run.begin(unfinished, a_plan(small_cases()))
            with no_workers():
                run.measure(unfinished)
            unfinished.rename(path)
    return path
