import atexit
import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

from vstar_kernels.attention.triton import launches

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.attention import interpreter

    interpreter.leave_out_the_needless()

if architecture := os.environ.get("EMULATED_GPU"):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "kernels are emulated or interpreted: unset EMULATED_GPU or TRITON_INTERPRET"
        )
    from benchmarks.emulator.driver import EmulatedGPU

    entered = contextlib.ExitStack()
    folder = entered.enter_context(tempfile.TemporaryDirectory(prefix="emulated-"))
    entered.enter_context(EmulatedGPU(architecture).installed(Path(folder)))
    atexit.register(entered.close)


@pytest.fixture
def poison(monkeypatch):
    """What kernels fill starts as NaN or −1, so that an element left unwritten shows."""
    for name in ("empty_like", "empty"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


@pytest.fixture
def launched(monkeypatch):
    """The launches of Triton's kernels that there are, in order."""
    found = []
    launch = launches.Launch._launch

    def recorded(self, tensors):
        found.append(self)
        launch(self, tensors)

    monkeypatch.setattr(launches.Launch, "_launch", recorded)
    return found


def _poisoned(allocate):
    def run(*args, **options):
        tensor = allocate(*args, **options)
        with torch.no_grad():  # or a leaf could not be written in
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    return run
