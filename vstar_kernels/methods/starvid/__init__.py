"""StarVid (arXiv 2409.15259): subjects and their motions, bound through cross-attention maps."""
