"""What older versions lack of what is tested: `make test-oldest` runs with the oldest of them."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.version import Version


def diffusers_before(version: str) -> bool:
    """Returns whether the diffusers that is installed is older than that."""
    return Version(metadata.version("diffusers")) < Version(version)


offloads_to_the_cpu = pytest.mark.skipif(
    diffusers_before("0.41"), reason="before 0.41 diffusers offloads groups on accelerators alone"
)
