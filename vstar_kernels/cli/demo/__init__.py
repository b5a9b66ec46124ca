"""``vstar-kernels demo``: a real video UNet denoises three ways, from the same noise.

With diffusers' own attention, with temporal attention regularization (TAR) in eager PyTorch, and
with this package's kernels: the same result as eager TAR, in less time.
"""
