"""Fused kernels for VSTAR's temporal attention regularization (arXiv 2403.13501).

>>> import torch, vstar_kernels as vk
>>> query, key, value = torch.randn(3, 2, 16, 5, 64)  # (batch, frames, heads, head_dim) each
>>> out = vk.tar_attention(query, key, value, vk.GaussianBias(sigma=1.0))
"""

from vstar_kernels import backends
from vstar_kernels._version import __version__
from vstar_kernels.attention import tar_attention
from vstar_kernels.backends import reference
from vstar_kernels.backends.selection import SlowBackendWarning
from vstar_kernels.bias import DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.environment import info

__all__ = [
    "DenseBias",
    "GaussianBias",
    "SlowBackendWarning",
    "ToeplitzBias",
    "__version__",
    "backends",
    "info",
    "reference",
    "tar_attention",
]
