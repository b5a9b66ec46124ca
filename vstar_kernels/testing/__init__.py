"""The oracle and the tolerances: one formula and one set of bounds for tests, demo and benchmarks.

The formula of each operation is one PyTorch operation after the other in the inputs' type; in
float64 it is the oracle. It shares nothing with the package's references, which are checked against
it as the kernels are; both are checked against plain loops over numbers in the tests. The bounds
compare a result's error with that of the same formula computed by PyTorch, and say how much more
they allow and why.
"""

from __future__ import annotations

from vstar_kernels.testing.bounds import CELL, EPS, ROW_SUM, largest_error
from vstar_kernels.testing.columns import assert_columns, eager_columns
from vstar_kernels.testing.frames import assert_frames, eager_frames
from vstar_kernels.testing.gradients import assert_gradients
from vstar_kernels.testing.temporal import (
    assert_as_exact_as_eager,
    assert_exact,
    assert_map,
    eager,
    eager_weights,
    inputs,
    oracle,
    sensitivity,
)

if not __debug__:
    raise ImportError("vstar_kernels.testing checks by assert, which python -O leaves out")

__all__ = [
    "CELL",
    "EPS",
    "ROW_SUM",
    "assert_as_exact_as_eager",
    "assert_columns",
    "assert_exact",
    "assert_frames",
    "assert_gradients",
    "assert_map",
    "eager",
    "eager_columns",
    "eager_frames",
    "eager_weights",
    "inputs",
    "largest_error",
    "oracle",
    "sensitivity",
]
