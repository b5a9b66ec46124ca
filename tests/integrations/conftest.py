import importlib
import sys

import pytest
import torch

from tests.integrations import comfy

NODES = "vstar_kernels.integrations.comfyui"


@pytest.fixture(scope="session")
def nodes():
    """The nodes, imported into stand-ins for ComfyUI, which are gone afterwards."""
    before = dict(sys.modules)
    sys.modules.update(comfy.modules())
    yield importlib.import_module(NODES)
    for name in [*comfy.modules(), *(x for x in sys.modules if x.startswith(NODES))]:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture
def run(nodes):
    """Runs a node as ComfyUI does: by its id, with the defaults of what it is not given."""

    def run(node_id, **inputs):
        node = next(x for x in nodes.NODES if x.define_schema().node_id == node_id)
        defaults = {x.id: x.default for x in node.define_schema().inputs if hasattr(x, "default")}
        return node.execute(**{**defaults, **inputs}).args

    return run


@pytest.fixture(params=[comfy.SpatialVideoTransformer, comfy.VanillaTemporalModule])
def unet(request):
    torch.manual_seed(0)
    return comfy.UNetModel(request.param, frames=FRAMES).eval()


FRAMES = 6
