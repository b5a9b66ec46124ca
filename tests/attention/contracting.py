"""Triton's interpreter with multiply-adds, which GPUs make of a product and a sum.

A multiply-add rounds once. What is right only if products are rounded too is wrong on a GPU alone.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def contracting():
    """A context in which the interpreter adds to float32 products before it rounds them."""
    plain = InterpreterBuilder.binary_op

    def exact(handle):
        return getattr(handle, "exact", handle.data)

    def binary_op(self, lhs, rhs, op):
        found = plain(self, lhs, rhs, op)
        if found.data.dtype != np.float32:
            return found
        if op is np.multiply:
            found.exact = lhs.data.astype(np.float64) * rhs.data.astype(np.float64)
        elif op in (np.add, np.subtract) and (hasattr(lhs, "exact") or hasattr(rhs, "exact")):
            # One of two products is rounded nevertheless.
            other = rhs.data if hasattr(lhs, "exact") else exact(rhs)
            found.data = op(exact(lhs), other, dtype=np.float64).astype(np.float32)
        return found

    with mock.patch.object(InterpreterBuilder, "binary_op", binary_op), np.errstate(over="ignore"):
        yield
