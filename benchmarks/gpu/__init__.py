"""Measures the Triton kernels on a GPU: ``python -m benchmarks.gpu tile|stream|plot``."""
