"""The kernels from threads, forked and spawned processes, and at the interpreter's end.

What may hang or abort runs in a process of its own, with a time limit.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import vstar_kernels as vk
from tests.helpers import run_python
from vstar_kernels.attention import native
from vstar_kernels.testing import inputs

pytestmark = [
    pytest.mark.usefixtures("several_threads"),
    pytest.mark.skipif(bool(native.load().problems), reason="no native library"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def call(index: int) -> torch.Tensor:
    """One of several calls large enough for threads, with tensors too small for torch's own."""
    q, k, v = inputs(1 + index % 2, 128, 2, 40 + index % 3, seed=index)
    return vk.tar_attention(q, k, v, vk.GaussianBias(1.0), backend="cpu")


def call_frames(_: int) -> torch.Tensor:
    """A call of frame_attention that is large enough for threads."""
    layout = vk.Layout(vk.Frames(4, 100))
    q, k, v = inputs(1, layout.tokens, 2, 32)
    return vk.frame_attention(q, k, v, layout, vk.FrameRule.tar(1.0), backend="cpu")


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    header = """
import os, sys, torch
from tests.attention.test_cpu_processes import call, call_frames
torch.set_num_threads(2)
"""
    return run_python(header + code)


class Calls(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return call(index)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_in_data_loader_workers(start, workers):
    """After the parent's use, which leaves it threads that a fork does not have."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    expected = [call(i) for i in range(6)]
    loader = DataLoader(
        Calls(), batch_size=None, num_workers=workers, multiprocessing_context=start, timeout=100
    )
    for out, wanted in zip(loader, expected, strict=True):
        assert torch.equal(out, wanted)


FORK = """
import multiprocessing, signal, threading
torch.set_num_threads(3)

def compute(i):
    return call(i).numpy().tobytes()

for operation in (call, call_frames):
    expected = operation(0)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        outs = [operation(0) for _ in range(5)]
        # A new thread of the child has a team of its own.
        thread = threading.Thread(target=lambda: outs.append(operation(0)))
        thread.start()
        thread.join()
        os._exit(0 if all(torch.equal(out, expected) for out in outs) else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"{operation.__name__}: {status} (-14: hung)"
    assert torch.equal(operation(0), expected)  # the parent keeps its threads
    assert len(os.listdir("/proc/self/task")) >= 3 or sys.platform != "linux"

expected = [compute(i) for i in range(6)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(compute, range(6)).get(60) == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child():
    """A fork copies the thread that calls it but not its team of OpenMP threads."""
    run = run_script(FORK)
    assert run.returncode == 0, run.stderr


FORK_AFTER_TORCH = """
import os, signal, torch
import vstar_kernels as vk
from vstar_kernels.attention import native

def short():
    q = torch.ones(1, 128, 2, 40)
    vk.tar_attention(q, q, q, vk.GaussianBias(1.0), backend="cpu")

def block_sums():
    q = torch.ones(1, 600, 1, 8, requires_grad=True)
    out, m = vk.tar_attention(
        q, q, q, vk.GaussianBias(1.0), backend="cpu", return_map=True, map_block=200
    )
    m.square().sum().backward()
    assert abs(m.sum().item() - 600) < 0.01

def fork(name, compute):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        compute()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"{name}: {status} (-14: hung)"

torch.set_num_threads(3)
torch.rand(1000, 1000).exp()  # torch's threads
assert native.load.cache_info().currsize == 0
fork("library not loaded", short)
fork("block sums, library not loaded", block_sums)
native.load()
fork("library loaded", short)
short()
fork("block sums after a call", block_sums)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_child_of_a_process_that_used_threads():
    """Torch's own operators hang there; nothing in a call of a CPU kernel does."""
    run = run_python(FORK_AFTER_TORCH)  # not run_script, which loads the library
    assert run.returncode == 0, run.stderr


def test_in_a_thread_pool():
    expected = [call(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            outs = list(pool.map(call, range(12)))
            assert all(torch.equal(out, e) for out, e in zip(outs, expected, strict=True))


POOL = """
from concurrent.futures import ThreadPoolExecutor
import threading
torch.set_num_threads({threads})
meet = threading.Barrier(5)
def work(i):
    torch.set_num_threads({threads})
    meet.wait()
    for _ in range(300):
        call(i)
    meet.wait()  # so that four threads work, not one quick one
count = lambda: len(os.listdir("/proc/self/task"))
before = most = count()
with ThreadPoolExecutor(4) as pool:
    futures = [pool.submit(work, i) for i in range(4)]
    meet.wait()
    while meet.n_waiting < 4:
        most = max(most, count())
    most = max(most, count())
    meet.wait()
    for future in futures:
        future.result()
print(most - before)
"""


@linux
@pytest.mark.parametrize(("threads", "extra"), [(1, 0), (3, 8)])
def test_no_threads_beside_the_callers_own(threads, extra):
    """Four callers with torch.set_num_threads(1) stay four threads; with 3 they get 2 more each."""
    run = run_script(POOL.format(threads=threads))
    assert run.stdout.strip() == str(4 + extra), run.stdout + run.stderr


EXIT = """
import threading
torch.set_num_threads(2)
done = threading.Event()
def work():
    for i in range(5):
        call(i)
    done.set()
    threading.Event().wait()  # for ever
threading.Thread(target=work, daemon=True).start()
done.wait()
call(1)
"""


def test_nothing_is_left_at_exit():
    """A daemon thread that has used the kernels, its OpenMP threads, and the interpreter's end.

    One that is inside an operator at that moment aborts the process before Python 3.14, whichever
    operator of torch it is.
    """
    run = run_script(EXIT)
    assert (run.returncode, run.stderr) == (0, "")
