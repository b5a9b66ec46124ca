"""Looking at what temporal attention does."""

from vstar_kernels.analysis.capture import MapCapture, capture_maps
from vstar_kernels.analysis.maps import AttentionMap

__all__ = ["AttentionMap", "MapCapture", "capture_maps"]
