"""What is imported when: each in turn, in one process that has imported nothing before."""

import json

import pytest

from tests.helpers import run_python

# The optional packages, what they bring, and what compiles; torch itself brings tqdm.
OPTIONAL = (
    *("accelerate", "av", "cpuinfo", "diffusers", "jinja2", "matplotlib", "openai", "PIL"),
    *("psutil", "pydantic", "transformers", "triton", "tyro"),
    *("anyio", "httpx2", "matplotlib.pyplot", "torch._dynamo"),
)
CODE = f"""
import json, sys
found = {{}}

def note(when):
    found[when] = [name for name in {OPTIONAL} if name in sys.modules]

import vstar_kernels as vk
from vstar_kernels.attention import native
assert vk.optimize_noise and vk.NoisePrior and vk.analysis.plot_maps
note("the package")
assert native.load.cache_info().currsize == 0
vk.SynopsisWriter.from_file("synopsis.json")
note("a writer that asks no model")
sys.modules["pydantic"] = None
found["without pydantic"] = []
for read in (vk.SynopsisWriter.from_file, vk.Synopsis.from_json):
    try:
        read(vk.Synopsis("A rose.", ["A bud.", "A rose."]).to_json())
    except ImportError as error:
        found["without pydantic"].append(str(error))
del sys.modules["pydantic"]
try:
    import matplotlib
except ImportError:
    pass
else:
    vk.analysis.plot_deltas(vk.analysis.delta_matrices([1], 4))
    note("a plot")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    child = run_python(CODE)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_importing_is_light(found):
    """None of the optional packages, nor the native library, comes with the package."""
    assert found["the package"] == []


def test_the_client_comes_only_with_an_endpoint(found):
    assert found["a writer that asks no model"] == ["pydantic"]


def test_without_pydantic_it_says_what_to_install(found):
    assert len(found["without pydantic"]) == 2
    assert all("pip install 'vstar_kernels[synopsis]'" in x for x in found["without pydantic"])


def test_only_plotting_imports_matplotlib_and_no_windows(found):
    if "a plot" not in found:
        pytest.skip("matplotlib is not installed")
    assert "matplotlib" in found["a plot"]
    assert not {"matplotlib.pyplot", "diffusers", "transformers", "triton"} & {*found["a plot"]}
