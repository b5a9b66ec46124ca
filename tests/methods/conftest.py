import os

import pytest


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """Nobody's key, address or cache; and the client does not wait before it asks again."""
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    for name in [*os.environ]:
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VSTAR_KERNELS_CACHE", str(tmp_path / "cache"))
