"""A running ComfyUI as the checks use it, and what they hold its results to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels import testing

from . import graphs
from .graphs import Graph, Patch
from .server import FailedError, Server

SAME = 1e-4  # of the largest value: two computations of one thing, through all steps
Made = tuple[Graph, list[str]]


class NotHereError(Exception):
    """A check that needs what is not there."""


class Run:
    """A running ComfyUI, and what several checks ask of it."""

    def __init__(self, server: Server, pictures: Path | None = None) -> None:
        self.server, self.pictures = server, pictures
        self.nodes: dict[str, Any] = server.get("/object_info")
        self.ours = {n: v for n, v in self.nodes.items() if v["category"].startswith("video/VSTAR")}
        self.number = count()
        self.plain = cache(self._plain)

    def versions(self) -> str:
        """Returns the versions of what is checked."""
        system = self.server.get("/system_stats")["system"]
        versions = {
            "vstar-kernels": vk.__version__,
            "ComfyUI": system["comfyui_version"],
            "torch": system["pytorch_version"],
            "Python": system["python_version"].split()[0],
        }
        for package in ("comfyui-frontend-package", "comfy-cli", "playwright"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return ", ".join(f"{name} {number}" for name, number in versions.items())

    def latents(self, made: Made) -> list[Tensor]:
        """Runs a graph and returns the latents that it saves."""
        graph, savers = made
        outputs = self.server.run(graph)
        return [self.server.latents(outputs, node) for node in savers]

    def fails(self, made: Made) -> str:
        """Runs a graph that must fail, and returns its error."""
        try:
            self.server.run(made[0])
        except FailedError as error:
            return str(error)
        raise AssertionError("the graph ran, and should have failed")

    def _plain(self, make: Callable[[Patch], Made]) -> Tensor:
        """Returns the latents of a graph without our nodes."""
        return self.latents(make(graphs.plain))[0]

    def node(self, name: str, /, **inputs: Any) -> Patch:
        """Returns what puts one of our nodes behind a model, its other inputs at their defaults."""
        known = self.nodes[name]["input"]
        values = {
            key: spec[1]["default"] if "default" in spec[1] else spec[1]["options"][0]
            for key, spec in known.get("required", {}).items()
            if key not in ("model", *inputs) and len(spec) > 1
        }
        return lambda graph, model: graph.add(name, model=model, **values, **inputs)

    def tar(self, **inputs: Any) -> Patch:
        """Returns what puts VSTAR Apply TAR behind a model."""
        return self.node("VSTARApplyTAR", **inputs)

    def watched(self, patch: Patch = graphs.plain) -> tuple[Patch, Path]:
        """Returns the patch with a recorder behind it, and the folder that this will write."""
        name = f"record{next(self.number)}"
        folder = self.server.folder / "output" / name
        return both(patch, self.node("VSTARTestRecord", name=name)), folder


def both(first: Patch, second: Patch) -> Patch:
    """Returns one patch behind the other."""
    return lambda graph, model: second(graph, first(graph, model))


def difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def assert_same(a: Tensor, b: Tensor) -> str:
    """Asserts that two results are of one computation, done twice; returns how near they are."""
    off = difference(a, b)
    assert off <= SAME, f"they differ by {off:.1e} of the largest value"
    return "bit for bit" if off == 0 else f"to {off:.0e}"


def assert_differ(a: Tensor, b: Tensor) -> str:
    """Asserts that two results are of different computations; returns how far they are apart."""
    off = difference(a, b)
    assert off > 10 * SAME, f"they differ by {off:.1e} of the largest value only"
    return f"by {off:.1%}"


# ---- what was recorded, against the formula ----


def level_of(layer: str) -> int:
    """Returns the resolution level of a layer, from the block numbers of a UNet of four levels."""
    side, number = layer.split(".")[:2]
    levels = {"input_blocks": int(number) // 3, "output_blocks": 3 - int(number) // 3}
    return levels.get(side, 3)


def records(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, list[Tensor]]]]:
    """Yields each recorded forward pass: its facts, and query, key, value and result by layer."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            facts = json.loads(tensors.metadata()["facts"])
            yield (
                facts,
                {
                    layer: [
                        tensors.get_tensor(f"{layer}:{part}").unflatten(-1, (heads, -1))
                        for part in ("q", "k", "v", "out")
                    ]
                    for layer, heads in facts["heads"].items()
                },
            )


def assert_formula(folder: Path, biases: Mapping[int, Any], end: float) -> str:
    """Asserts the paper's formula for every layer of every forward pass that was recorded.

    Args:
        folder: Of the records.
        biases: By level; the other levels must be plain attention.
        end: The share of the steps with a bias.
    """
    layers = regularized = 0
    frames = set()
    for facts, found in records(folder):
        on = facts["step"] < math.ceil(end * facts["steps"])
        for layer, (query, key, value, out) in found.items():
            bias = biases.get(level_of(layer)) if on else None
            try:
                testing.assert_exact(out, query, key, value, bias)
            except AssertionError as error:
                raise AssertionError(f"step {facts['step']}, {layer}: {error}") from None
            layers, regularized = layers + 1, regularized + (bias is not None)
            frames.add(query.shape[1])
    assert regularized, "no layer was recorded with a bias"
    lengths = " and ".join(map(str, sorted(frames)))
    return f"{regularized} of {layers} attentions over {lengths} frames under TAR"


def assert_rule(folder: Path, rule: vk.FrameRule, end: float) -> tuple[int, int]:
    """Asserts a rule's formula for every recorded attention; returns how many were under it."""
    total = ruled = 0
    for facts, found in records(folder):
        frames, height, width = facts["grid"]
        on = facts["step"] < math.ceil(end * facts["steps"])
        for name, (query, key, value, out) in found.items():
            if name.startswith("cross"):
                continue
            parts: list[Any] = [vk.Frames(frames, height * width)]
            if text := query.shape[1] - frames * height * width:
                parts.insert(0, vk.Text(text))
            arguments = (query, key, value, vk.Layout(*parts), rule if on else None)
            try:
                testing.assert_frames(out, *arguments)
            except AssertionError as error:
                raise AssertionError(f"step {facts['step']}, {name}: {error}") from None
            total, ruled = total + 1, ruled + on
    assert 0 < ruled < total, f"{ruled} of {total} attentions were under the rule"
    return ruled, total


def assert_relay(folder: Path, rule: vk.FrameRule, tokens: Sequence[int], end: float) -> int:
    """Asserts a rule between frames and stages for all recorded attention to the text.

    It is to be on in the rows of the positive side, and these alone.

    Args:
        folder: Of the records.
        rule: The rule.
        tokens: How many each stage has.
        end: The share of the steps with it.

    Returns:
        How many sequences were under it.
    """
    texts = vk.Layout(*(vk.Frames(1, n, first=stage) for stage, n in enumerate(tokens)))
    ruled = other = 0
    for facts, found in records(folder):
        _, height, width = facts["grid"]
        video = vk.Layout(*(vk.Frames(1, height * width, first=time) for time in facts["times"]))
        for name, parts in found.items():
            if not name.startswith("cross"):
                continue
            rows = zip(*(part.split(1) for part in parts), facts["sides"], strict=True)
            for query, key, value, out, side in rows:
                on = side == 0 and facts["step"] < math.ceil(end * facts["steps"])
                lay = {"key_layout": texts if on else vk.Layout(vk.Text(key.shape[1]))}
                try:
                    testing.assert_frames(
                        out, query, key, value, video, rule if on else None, **lay
                    )
                except AssertionError as error:
                    raise AssertionError(f"step {facts['step']}, {name}: {error}") from None
                ruled, other = ruled + on, other + (not on)
    assert ruled, "no attention to the stages was recorded"
    assert other, "no attention to other texts was recorded"
    return ruled
