"""Softmax by one number for each row, the logarithm of its sum of exponentials.

That is enough for logits without a bias, as in columns, and over frames, where biases are of usual
sizes or less the largest of their row (:func:`frames_plan.rule_tables`). For any bias there are the
two numbers of :class:`primitives.Normalizer`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sum(b_max, b_total, exp2_scale):
    """Returns the logarithms of rows' sums of exponentials, as what :func:`exponentials` subtract.

    That is never less than the maximum.
    """
    return b_max + tl.log2(b_total) / exp2_scale


@triton.jit
def probabilities(b_s, b_lse, exp2_scale, AXIS: tl.constexpr = 1):
    """Returns A′ of logits and the :func:`log_sum` of their rows, with ``AXIS`` 0 their columns."""
    return capped_exp2((b_s - tl.expand_dims(b_lse, AXIS)) * exp2_scale)


@triton.jit
def capped_exp2(b_log2):
    """Returns the numbers of these binary logarithms, none beyond 1, which exact ones would not be.

    Of huge logits a rounding is many powers of two: those here that were computed again, in blocks
    of another shape, may be larger than what their rows' sums are of.
    """
    return tl.exp2(tl.minimum(b_log2, 0.0, propagate_nan=tl.PropagateNan.ALL))
