"""Chooses the GPU kernels' launch configurations: ``python -m benchmarks.tune``."""
