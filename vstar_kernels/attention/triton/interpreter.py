"""What Triton's interpreter lacks that these kernels need; nothing of it is used on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def take_masks_of_numbers() -> None:
    """Makes the interpreter take masks that the comparison of two numbers is part of.

    It stores such a one as integers when it is spread over a block, and from Triton 3.9 on its
    loads and stores refuse a mask of integers.
    """
    builder: Any = InterpreterBuilder
    builder.create_masked_load = _with_mask_at(1, builder.create_masked_load)  # pointers, mask, …
    builder.create_masked_store = _with_mask_at(2, builder.create_masked_store)  # …, values, mask


def _with_mask_at(place: int, method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that has its mask, which comes at a place, as truth values."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        mask = arguments[place]
        if isinstance(mask, TensorHandle):  # descriptors have truth values by themselves
            mask.data = mask.data.astype(bool, copy=False)
        return method(self, *arguments, **named)

    return run
