import pytest


@pytest.fixture
def wide_terminal(monkeypatch):
    """Keeps a command's messages on one line each."""
    monkeypatch.setenv("COLUMNS", "300")
