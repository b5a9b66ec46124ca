"""Models on the meta device, as they are while only their shapes are of interest."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import vstar_kernels as vk
from tests.models.models import KINDS, flat, make, noise

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
