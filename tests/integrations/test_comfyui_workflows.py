"""The example workflows, held to the nodes' inputs where no ComfyUI is."""

import pytest

from tests.integrations.real_comfyui import workflows

ARE_WIDGETS = ("COMBO", "STRING", "INT", "FLOAT", "BOOLEAN")


@pytest.fixture
def schemas(nodes):
    return {schema.node_id: schema for schema in (x.define_schema() for x in nodes.NODES)}


@pytest.mark.parametrize("file", workflows.examples(), ids=lambda file: file.stem)
def test_an_example_fits_the_nodes(schemas, file):
    workflow = workflows.read(file)
    ours = [node for node in workflow["nodes"] if node["type"].startswith("VSTAR")]
    assert ours
    for node in ours:
        schema = schemas[node["type"]]
        widgets = [socket for socket in schema.inputs if socket.io_type in ARE_WIDGETS]
        names = [place["name"] for place in node["inputs"] if "widget" in place]
        assert names == [socket.id for socket in widgets], node["type"]
        assert len(node.get("widgets_values", [])) == len(widgets), node["type"]
        for socket, value in zip(widgets, node.get("widgets_values", []), strict=True):
            if socket.io_type == "COMBO":
                assert value in socket.options, socket.id
        sockets = {place["name"] for place in node["inputs"]} - set(names)
        assert sockets == {socket.id for socket in schema.inputs} - set(names), node["type"]


def test_the_examples_show_the_nodes(schemas):
    shown = {
        node["type"] for file in workflows.examples() for node in workflows.read(file)["nodes"]
    }
    assert set(schemas) - shown == {"VSTARTARConfig", "VSTARWriteSynopsis"}


def test_samplers_repeat_their_seeds():
    for file in workflows.examples():
        for node in workflows.read(file)["nodes"]:
            if node["type"] == "KSampler":
                assert node["widgets_values"][:2] == [42, "fixed"], file.stem
