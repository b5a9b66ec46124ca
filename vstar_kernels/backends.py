"""The backends of :func:`vstar_kernels.tar_attention`, and what is against each of them."""

from vstar_kernels.attention.dispatch import SlowBackendWarning, available, why_not

__all__ = ["SlowBackendWarning", "available", "why_not"]
