"""The backends of the operations, and what is against each of them."""

from vstar_kernels.attention.dispatch import (
    SlowBackendWarning,
    available,
    why_not,
    why_not_columns,
    why_not_frames,
)
from vstar_kernels.attention.export import decompositions, native_library

__all__ = [
    "SlowBackendWarning",
    "available",
    "decompositions",
    "native_library",
    "why_not",
    "why_not_columns",
    "why_not_frames",
]
