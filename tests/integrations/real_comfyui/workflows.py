"""The pack's example workflows: as users open them, and as the web API takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .server import LOADERS, PACK, Prompt

FOLDER = PACK / "example_workflows"
NOTES = ("Note", "MarkdownNote")  # of the page alone
AFTER = ("fixed", "increment", "decrement", "randomize")  # what becomes of a seed after a run


def examples() -> list[Path]:
    """Returns the workflows' files."""
    return sorted(FOLDER.glob("*.json"))


def read(file: Path) -> dict[str, Any]:
    """Returns a workflow as it was saved by the page."""
    return dict(json.loads(file.read_text(encoding="utf-8")))


def as_prompt(workflow: dict[str, Any], nodes: dict[str, Any]) -> Prompt:
    """Returns what the page sends for a workflow, with ``nodes`` as ``/object_info`` has them.

    Raises:
        ValueError: The workflow has what these examples do not need, such as a muted node.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in nodes:
            raise ValueError(f"no node is called {node['type']}")
        if node.get("mode"):
            raise ValueError(f"{node['type']} is muted or bypassed")
        known = nodes[node["type"]]["input"]
        options = {**known.get("required", {}), **known.get("optional", {})}
        values = list(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        for place in node.get("inputs", []):
            if "widget" in place:
                value = values.pop(0)
                if place["name"] not in options:  # a button of the page
                    continue
                inputs[place["name"]] = value
                settings = options[place["name"]][1:]
                if settings and settings[0].get("control_after_generate") and values[:1]:
                    if values[0] not in AFTER:
                        raise ValueError(f"{node['type']}.{place['name']} is followed by {values}")
                    values.pop(0)
            if place.get("link") is not None:
                inputs[place["name"]] = sources[place["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def files(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """Yields the model files that a prompt loads: folder and name."""
    for node in prompt.values():
        if node["class_type"] in LOADERS:
            name, folder = LOADERS[node["class_type"]]
            yield folder, node["inputs"][name]


def media(prompt: Prompt) -> Iterator[str]:
    """Yields the pictures and videos that a prompt loads."""
    names = {"LoadImage": "image", "LoadVideo": "file"}
    for node in prompt.values():
        if node["class_type"] in names:
            yield node["inputs"][names[node["class_type"]]]


def shrink(prompt: Prompt, size: int = 64) -> Prompt:
    """Returns the prompt at a size in pixels that a processor can do; all else is as it was."""
    small = {"width": size, "height": size}
    return {
        name: node
        | {"inputs": node["inputs"] | {k: small[k] for k in small if k in node["inputs"]}}
        for name, node in prompt.items()
    }
