"""What older versions lack of what is tested: `make test-oldest` runs with the oldest of them."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.version import Version


def is_before(package: str, version: str) -> bool:
    """Returns whether the package is installed, and older than that."""
    try:
        return Version(metadata.version(package)) < Version(version)
    except metadata.PackageNotFoundError:
        return False


offloads_to_the_cpu = pytest.mark.skipif(
    is_before("diffusers", "0.41"),
    reason="before 0.41 diffusers offloads groups on accelerators alone",
)
