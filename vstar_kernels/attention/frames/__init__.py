"""Attention over frames of tokens: ``vstar_kernels.frame_attention``, one folder for the idea."""
