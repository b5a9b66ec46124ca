"""Fused kernels for VSTAR's temporal attention regularization (arXiv 2403.13501).

>>> import torch, vstar_kernels as vk
>>> query, key, value = torch.randn(3, 2, 16, 5, 64)  # (batch, frames, heads, head_dim) each
>>> out = vk.tar_attention(query, key, value, vk.GaussianBias(sigma=1.0))
"""

from vstar_kernels import analysis, backends
from vstar_kernels._version import __version__
from vstar_kernels.analysis.capture import capture_maps
from vstar_kernels.attention import tar_attention
from vstar_kernels.backends import reference
from vstar_kernels.backends.selection import SlowBackendWarning
from vstar_kernels.bias import DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.environment import info
from vstar_kernels.nursing.config import TARConfig
from vstar_kernels.nursing.embeddings import interpolate_embeddings
from vstar_kernels.nursing.noise import NoisePrior
from vstar_kernels.nursing.optimize import OptimizedNoise, optimize_noise
from vstar_kernels.nursing.synopsis import Synopsis
from vstar_kernels.nursing.vstar import VSTAR
from vstar_kernels.nursing.writer import SynopsisWriter
from vstar_kernels.processors.apply import TARHandle, apply_tar
from vstar_kernels.processors.frames import condition_frames

__all__ = [
    "VSTAR",
    "DenseBias",
    "GaussianBias",
    "NoisePrior",
    "OptimizedNoise",
    "SlowBackendWarning",
    "Synopsis",
    "SynopsisWriter",
    "TARConfig",
    "TARHandle",
    "ToeplitzBias",
    "__version__",
    "analysis",
    "apply_tar",
    "backends",
    "capture_maps",
    "condition_frames",
    "info",
    "interpolate_embeddings",
    "optimize_noise",
    "reference",
    "tar_attention",
]
