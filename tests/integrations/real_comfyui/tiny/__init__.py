"""A node pack for tests alone: ComfyUI's loaders return tiny random models, and two nodes watch.

A model file of no bytes stands for a tiny model; its name says of which kind. So the workflows that
users open run as they are, without a gigabyte of weights: everything but the numbers in the weights
is ComfyUI's own. ``integrations/comfyui/check.py`` makes the files and starts the server.
"""

from .loaders import replace_loaders
from .watch import NODE_CLASS_MAPPINGS

replace_loaders()

__all__ = ["NODE_CLASS_MAPPINGS"]
