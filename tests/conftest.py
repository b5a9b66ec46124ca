import gc
import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import on_threads
from vstar_kernels.attention import dispatch, native

# Cases that hypothesis draws: `make test` makes the same ones every time, so that what fails there
# has been broken by the change at hand; `make fuzz` looks for new ones, and for more of them.
usual = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", **usual, max_examples=60)
settings.register_profile("ci", **usual, max_examples=60, derandomize=True)
settings.register_profile("fuzz", **usual, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config):
    """Gives the run a cache of torch.compile of its own, whatever the environment names.

    An earlier version's code is not found there, as it would be in torch's usual folder. Without a
    cache each process would compile Inductor's probes for vector instructions anew, for seconds.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist's workers, which start later, inherit it
        made = tempfile.TemporaryDirectory(prefix="compiled-by-tests-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = made.name
        config.add_cleanup(made.cleanup)


@pytest.hookimpl(trylast=True)  # where -m and -k have left out what does not run
def pytest_collection_modifyitems(items):
    """Long tests come first: one that is left in the end keeps a single processor busy.

    With ``--dist worksteal`` every worker begins with as many tests in a row, and with its part of
    the long ones among them.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    total = len(items)
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    items.clear()
    for worker in range(workers):
        begin = long[worker::workers]
        share = (total - len(items)) // (workers - worker)
        others = max(0, share - len(begin))
        items += [*begin, *short[:others]]
        del short[:others]


def pytest_collection_finish():
    """What is imported and collected is not garbage, and takes long to look through."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _forgotten_calls():
    """No test finds what another one was given, and may have replaced what runs it."""
    for operation in (dispatch.TAR_ATTENTION, dispatch.FRAME_ATTENTION, dispatch.COLUMN_ATTENTION):
        operation.calls.clear()


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


@pytest.fixture
def isa_in_turn(request):
    """One of the instruction sets, another for each number that the test has as its parameter."""
    library = native.load()
    if library.problems:
        pytest.skip("; ".join(library.problems))
    before = library.isa
    library.select_isa(library.isas[request.param % len(library.isas)])
    yield
    library.select_isa(before)


@pytest.fixture(scope="module")
def one_thread():
    """For sizes that gain nothing from more, and lose much where the processor is busy."""
    with on_threads(1):
        yield


@pytest.fixture(scope="module")
def several_threads():
    """For what threads may change, also where the environment gives a process only one."""
    with on_threads(2):
        yield
