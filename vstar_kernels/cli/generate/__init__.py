"""``vstar-kernels generate``: a video from a prompt by the whole method, in a folder.

``options`` is its command line, ``run`` does it, ``files`` writes the folder.
"""
