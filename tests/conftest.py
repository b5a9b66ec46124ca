import pytest

from vstar_kernels import native


def executable_isas() -> list[str]:
    return native.load().isas


@pytest.fixture(params=executable_isas() or ["none"])
def isa(request):
    """Each instruction set that this processor can execute, in use for the test."""
    library = native.load()
    if library.problems:
        pytest.skip("; ".join(library.problems))
    before = library.isa
    library.select_isa(request.param)
    yield request.param
    library.select_isa(before)
