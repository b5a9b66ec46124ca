"""Fused kernels for VSTAR's temporal attention regularization (arXiv 2403.13501).

>>> import torch, vstar_kernels as vk
>>> query, key, value = torch.randn(3, 2, 16, 5, 64)  # (batch, frames, heads, head_dim) each
>>> out = vk.tar_attention(query, key, value, vk.GaussianBias(sigma=1.0))
"""

from vstar_kernels import analysis, backends
from vstar_kernels._version import __version__
from vstar_kernels.attention import reference
from vstar_kernels.attention.bias import DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.attention.columns.operation import column_attention
from vstar_kernels.attention.dispatch import SlowBackendWarning
from vstar_kernels.attention.frames.layout import Frames, Layout, Text
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.attention.temporal import tar_attention
from vstar_kernels.cli.info import info
from vstar_kernels.methods.grid.data import Clip, TripleData, frame_indices
from vstar_kernels.methods.grid.filtering import clip_scores, filter_by_score
from vstar_kernels.methods.grid.training import grid_loss
from vstar_kernels.methods.grid.video import GridVideo
from vstar_kernels.methods.starvid.config import GuidanceConfig
from vstar_kernels.methods.starvid.guidance import GuidanceHandle, guide_latents
from vstar_kernels.methods.starvid.starvid import GuidedVideo, StarVid
from vstar_kernels.methods.starvid.tokens import find_tokens
from vstar_kernels.methods.starvid.trajectory import Subject, Trajectory
from vstar_kernels.methods.starvid.writer import TrajectoryWriter
from vstar_kernels.methods.vstar.embeddings import interpolate_embeddings
from vstar_kernels.methods.vstar.noise import NoisePrior
from vstar_kernels.methods.vstar.optimize import OptimizedNoise, optimize_noise
from vstar_kernels.methods.vstar.real_videos import RealVideoMaps, capture_real_maps, encode_frames
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.vstar import VSTAR
from vstar_kernels.methods.vstar.writer import SynopsisWriter
from vstar_kernels.models.apply import TARHandle, apply_tar
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.columns import ColumnCapture, capture_columns
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.frame_prompts import condition_frames
from vstar_kernels.models.full3d.apply import FramesHandle, apply_frames
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.models.grid.apply import GridHandle, apply_grid
from vstar_kernels.models.grid.embedding import FPSEmbedding, GridEmbedding
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.positions import randomize_positions
from vstar_kernels.models.progress import Cancelled, StepWatch, watch_steps
from vstar_kernels.models.sharded.apply import ShardedHandle, shard_frames
from vstar_kernels.models.sharded.ranks import RankFailure

__all__ = [
    "VSTAR",
    "Cancelled",
    "Clip",
    "ColumnCapture",
    "DenseBias",
    "FPSEmbedding",
    "FrameRule",
    "FrameTAR",
    "Frames",
    "FramesHandle",
    "GaussianBias",
    "GridEmbedding",
    "GridHandle",
    "GridVideo",
    "GuidanceConfig",
    "GuidanceHandle",
    "GuidedVideo",
    "Layout",
    "MapCapture",
    "NoisePrior",
    "OptimizedNoise",
    "RankFailure",
    "RealVideoMaps",
    "ShardedHandle",
    "SlowBackendWarning",
    "StarVid",
    "StepWatch",
    "Subject",
    "Synopsis",
    "SynopsisWriter",
    "TARConfig",
    "TARHandle",
    "Text",
    "ToeplitzBias",
    "Trajectory",
    "TrajectoryWriter",
    "TripleData",
    "__version__",
    "analysis",
    "apply_frames",
    "apply_grid",
    "apply_tar",
    "backends",
    "capture_columns",
    "capture_maps",
    "capture_real_maps",
    "clip_scores",
    "column_attention",
    "condition_frames",
    "encode_frames",
    "filter_by_score",
    "find_tokens",
    "frame_attention",
    "frame_indices",
    "grid_loss",
    "guide_latents",
    "info",
    "interpolate_embeddings",
    "optimize_noise",
    "randomize_positions",
    "reference",
    "shard_frames",
    "tar_attention",
    "watch_steps",
]
