"""The VSTAR method around the kernel: where and when attention is regularized."""
