import pytest
import torch

from vstar_kernels.attention import native


@pytest.fixture(params=native.load().isas or ["none"])
def isa(request):
    """Each instruction set that this processor can execute, in use for the test."""
    library = native.load()
    if library.problems:
        pytest.skip("; ".join(library.problems))
    before = library.isa
    library.select_isa(request.param)
    yield request.param
    library.select_isa(before)


@pytest.fixture(scope="module")
def one_thread():
    """For sizes that gain nothing from more, and lose much where the processor is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
