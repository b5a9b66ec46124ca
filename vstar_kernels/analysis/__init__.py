"""Looking at what temporal attention does, and at the videos that come of it.

Every function returns data; those named ``plot_…`` draw it, and need Matplotlib.
"""

from vstar_kernels.analysis.frames import (
    DreamSimEmbedder,
    Embedder,
    JointSimilarity,
    SimilarityHistogram,
    as_frames,
    bias_from_frames,
    frame_similarity,
    normalize_jointly,
    similarity_histogram,
    structural_similarity,
)
from vstar_kernels.analysis.maps import (
    AttentionMap,
    MapFigures,
    MeanMap,
    band_share,
    band_width,
    delta_matrices,
    diagonalness,
    map_figures,
    map_penalty,
    mean_maps,
    min_max,
)
from vstar_kernels.analysis.metrics import CLIPVL, MTScore, clip_vl, mt_score
from vstar_kernels.analysis.plots import (
    plot_deltas,
    plot_figures,
    plot_frame_maps,
    plot_histogram,
    plot_losses,
    plot_maps,
    plot_similarities,
)

__all__ = [
    "CLIPVL",
    "AttentionMap",
    "DreamSimEmbedder",
    "Embedder",
    "JointSimilarity",
    "MTScore",
    "MapFigures",
    "MeanMap",
    "SimilarityHistogram",
    "as_frames",
    "band_share",
    "band_width",
    "bias_from_frames",
    "clip_vl",
    "delta_matrices",
    "diagonalness",
    "frame_similarity",
    "map_figures",
    "map_penalty",
    "mean_maps",
    "min_max",
    "mt_score",
    "normalize_jointly",
    "plot_deltas",
    "plot_figures",
    "plot_frame_maps",
    "plot_histogram",
    "plot_losses",
    "plot_maps",
    "plot_similarities",
    "similarity_histogram",
    "structural_similarity",
]
