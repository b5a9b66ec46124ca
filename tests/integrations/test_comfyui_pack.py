"""What ComfyUI and its registry read of the pack."""

import asyncio
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import vstar_kernels as vk

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
NAMES = {
    "VSTARApplyTAR": "VSTAR Apply TAR",
    "VSTARTARConfig": "VSTAR TAR Config",
    "VSTARSynopsis": "VSTAR Synopsis",
    "VSTARWriteSynopsis": "VSTAR Write Synopsis",
    "VSTARBiasFromFrames": "VSTAR Bias from Frames",
    "VSTARCaptureMaps": "VSTAR Capture Maps",
    "VSTARShowMaps": "VSTAR Show Maps",
    "VSTARShowSimilarity": "VSTAR Show Similarity",
    "VSTARApplyFrameRule": "VSTAR Apply Frame Rule",
    "VSTARApplyPrompts": "VSTAR Apply Prompts over Time",
}


def test_the_pack_gives_comfyui_all_nodes(nodes):
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert (PACK / pack.WEB_DIRECTORY).is_dir()
    extension = asyncio.run(pack.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    schemas = [node.define_schema() for node in found]
    assert {schema.node_id: schema.display_name for schema in schemas} == NAMES
    assert {schema.category for schema in schemas} == {"video/VSTAR"}
    assert all(schema.description for schema in schemas)


def test_every_input_has_a_help_and_an_argument(nodes):
    for node in nodes.NODES:
        schema = node.define_schema()
        code = node.execute.__func__.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        takes_any = bool(code.co_flags & 0x08)
        for socket in schema.inputs:
            is_plain = socket.io_type in ("CLIP", "IMAGE", "VSTAR_MAPS") or socket.id == "stages"
            assert is_plain or socket.tooltip, (schema.node_id, socket.id)
            assert takes_any or socket.id in names, (schema.node_id, socket.id)


@pytest.mark.parametrize("node_id", NAMES)
def test_every_node_has_a_page_of_help(nodes, node_id):
    page = (PACK / "web" / "docs" / f"{node_id}.md").read_text()
    assert page.startswith(f"# {NAMES[node_id]}\n")
    schema = next(x.define_schema() for x in nodes.NODES if x.define_schema().node_id == node_id)
    for socket in (*schema.inputs, *schema.outputs):
        name = getattr(socket, "display_name", None) or socket.id
        told = re.sub(r" level \d", " level", name)
        assert f"**{name}**" in page or f"**{told}" in page, name


def test_the_registrys_file_says_what_it_must():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert project["project"]["version"] == vk.__version__
    assert project["project"]["license"]
    assert any(x.startswith("vstar-kernels[") for x in project["project"]["dependencies"])
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= project["tool"]["comfy"].keys()


def test_the_package_does_not_need_comfyui():
    assert "comfy" not in sys.modules or hasattr(sys.modules["comfy_api.latest"], "io")
    for path in (Path(vk.__file__).parent).rglob("*.py"):
        if "integrations" not in path.parts:
            assert not re.search(r"^\s*(import|from) comfy", path.read_text(), re.M), path
