"""A GPU that is none, and processes of the benchmarks on it, whose peers misbehave as told.

What is made "on cuda" is made on the CPU and computed there; torch.cuda counts time and memory as a
GPU would. A capture that fails stays open, as PyTorch leaves it, so that all later ones fail; and
after a fault of memory access nothing runs any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import threading
import time
import traceback
import types
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from benchmarks import measure, peers
from benchmarks.peers import PEERS
from vstar_kernels.attention import triton

LAUNCH = 1e-6  # seconds that a graph takes to start


class OnTheCpu(TorchFunctionMode):
    """Makes and moves tensors on the CPU where a GPU is asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(x):
            is_gpu = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
            return "cpu" if is_gpu and func is not torch.device else x

        return func(*map(here, args), **{name: here(x) for name, x in (kwargs or {}).items()})


class FakeGpu:
    """What stands for torch.cuda. ``seconds`` of a call, by how it is found; else as on the CPU."""

    free = 2**32  # bytes

    def __init__(self, seconds=None):
        self.now = 0.0  # its own clock
        self.seconds = seconds
        self.capturing = self.broken = False
        self.replays = 0

    # ---- misbehaviour ----

    def synchronize(self, device=None):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def misbehave(self, how):
        """Does to the process what a peer may do to it."""
        if how == "raise":
            raise RuntimeError("no kernel for it")
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 999 GiB")
        if how == "hang":
            time.sleep(600)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "access":
            self.broken = True
            self.synchronize()
        if how == "capture" and self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    # ---- torch.cuda ----

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        if self.capturing:
            raise RuntimeError("a capture is open")
        self.capturing = True
        began = time.perf_counter()
        yield
        graph.seconds = time.perf_counter() - began if self.seconds is None else self.seconds()
        self.capturing = False

    def replay(self, graph):
        self.synchronize()
        self.now += LAUNCH + graph.seconds
        self.replays += 1

    def event(self, enable_timing):
        event = types.SimpleNamespace(at=0.0, synchronize=self.synchronize)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def graph_of(self):
        graph = types.SimpleNamespace(seconds=0.0)
        graph.replay = lambda: self.replay(graph)
        return graph

    @contextlib.contextmanager
    def installed(self):
        """A context in which torch has this GPU, and this package's kernels run on the CPU."""
        properties = types.SimpleNamespace(
            name="Fake GPU", L2_cache_size=2**16, multi_processor_count=4, total_memory=2**33
        )
        found = {
            "is_available": lambda: True,
            "synchronize": self.synchronize,
            "Event": self.event,
            "CUDAGraph": self.graph_of,
            "graph": self.graph,
            "graph_pool_handle": lambda: 0,
            "_sleep": lambda cycles: None,
            "get_device_properties": lambda *args: properties,
            "get_device_name": lambda *args: properties.name,
            "get_device_capability": lambda *args: (9, 0),
            "device_count": lambda: 1,
            "mem_get_info": lambda *args: (self.free, properties.total_memory),
            "memory_allocated": lambda *args: 0,
            "max_memory_allocated": lambda *args: 2**20,
            "reset_peak_memory_stats": lambda *args: None,
            "empty_cache": lambda: None,
        }
        with contextlib.ExitStack() as stack:
            for name, fake in found.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            stack.enter_context(mock.patch.dict(measure.MATRIX_SIZE, {"cuda": 64}))
            # It keeps its answer, which later tests in this process would be told.
            stack.enter_context(mock.patch.object(triton, "unavailable", list))
            stack.enter_context(OnTheCpu())
            yield self


def misbehaving(gpu, name, faults):
    """Returns a peer that misbehaves in the cases of ``faults``, {frames: how}."""
    peer = PEERS[name]

    def build(inputs):
        attention = peer.build(inputs)

        def call(query, key, value):
            gpu.misbehave(faults.get(query.shape[1]))
            return attention(query, key, value)

        return call

    return dataclasses.replace(peer, build=build, trial=peer.trial or peer.build)


class Worker:
    """A process of ``benchmarks.measure`` on a fake GPU, forked from this one, which is faster."""

    started = itertools.count()

    def __init__(self, path, allocator, seconds, faults):
        self.returncode = None
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                # tqdm's is shared with all forks, and stays taken where one is killed that has it.
                tqdm.set_lock(threading.RLock())
                gpu = FakeGpu()
                changed = {name: misbehaving(gpu, name, x) for name, x in faults.items()}
                with gpu.installed(), mock.patch.dict(peers.PEERS, changed):
                    status = measure.main(path, allocator, seconds)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self):
        if self.returncode is None:
            os.kill(self._pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait(60)
