"""Models on the meta device, as they are while only their shapes are of interest."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import vstar_kernels as vk
from tests.models.models import KINDS, flat, make, noise
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.positions import Positions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("error::vstar_kernels.SlowBackendWarning")
def test_a_model_on_the_meta_device_runs_under_tar_where_it_runs_without(name):
    model = make(name).to("meta")
    inputs = {**KINDS[name].inputs(noise(1, 4, 6, 8, 8))}
    inputs["timesteps" if name == "lvdm" else "timestep"] = torch.tensor([10])
    inputs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), inputs)
    try:
        expected = flat(model(**inputs))
    except Exception as error:  # whatever a model does with the numbers themselves
        pytest.skip(f"{name} needs numbers: {error}")
    with vk.apply_tar(model, vk.TARConfig(1.0, steps=None)):
        out = flat(model(**inputs))
    assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)


@pytest.mark.parametrize("name", ["UNetMotionModel", "LatteTransformer3DModel"])
def test_longer_positions_do_not_depend_on_the_default_device(name):
    """As where a part of a pipeline is built on the meta device meanwhile."""
    found = []
    for device in ("cpu", "meta"):
        model = make(name)
        positions = Positions(model, extend=True, tables=lambda: None)
        positions.find(temporal_layers(model))
        sample = torch.zeros(1, 4, 17, 8, 8)
        with torch.device(device):
            found.append(positions.fit(sample))
    assert found[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
