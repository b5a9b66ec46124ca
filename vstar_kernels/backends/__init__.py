"""What can run a call: each backend is a module with ``why_not``, ``run`` and ``unavailable``."""

from vstar_kernels.backends.selection import available

__all__ = ["available"]
