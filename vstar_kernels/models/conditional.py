"""Which forward passes, and which part of one, are with the prompt (classifier-free guidance)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def has_equal_halves(sample: Tensor) -> bool:
    """Returns whether a batch is some latents twice, as pipelines call a model under guidance.

    The second half is then the one with the prompt.
    """
    if len(sample) % 2:
        return False
    first, second = sample.chunk(2)
    return bool(torch.equal(first, second))


class _Here(threading.local):
    def __init__(self) -> None:  # each thread calls it
        self.active = False


_HERE = _Here()


@contextmanager
def conditional_passes() -> Iterator[None]:
    """Tells handles that the forward passes of this thread are of the half with the prompt alone.

    They are a method's own, between those of the pipeline, and nobody else's to capture.
    """
    before = _HERE.active
    _HERE.active = True
    try:
        yield
    finally:
        _HERE.active = before


def in_conditional_passes() -> bool:
    """Returns whether this thread is within :func:`conditional_passes`."""
    return _HERE.active
