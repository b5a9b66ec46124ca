"""The temporal attention maps of a model, from the queries and keys of a few of its positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.backends import reference
from vstar_kernels.bias import Bias
from vstar_kernels.processors.diffusers import TemporalAttention

POSITIONS = 32  # of a layer's batch × height × width, at equal distances: it bounds the memory


class MapCapture:
    """Keeps queries and keys of each layer while in use (``with``)."""

    def __init__(self, layers: Iterable[TemporalAttention]) -> None:
        self._layers = list(layers)
        self._handles: list[Any] = []
        self._projected: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> MapCapture:
        for layer in self._layers:
            self._keep(layer.module.to_q, (layer.name, "query"))
            self._keep(layer.module.to_k, (layer.name, "key"))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, projection: nn.Module, name: tuple[str, str]) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            rows = torch.linspace(0, len(output) - 1, min(POSITIONS, len(output))).long()
            self._projected[name] = output[rows.to(output.device)].float()

        # Before any timer's hook, so that the copy counts to the projection, not to the core.
        self._handles.append(projection.register_forward_hook(hook, prepend=True))

    def mean_map(self, level: int, bias: Bias | None) -> Tensor:
        """A′ of one level, the mean over its layers, heads and kept positions: ``(N, N)``."""
        maps = []
        for layer in self._layers:
            if layer.level == level:
                query, key = (
                    self._projected[layer.name, kind].unflatten(-1, (layer.module.heads, -1))
                    for kind in ("query", "key")
                )
                _, maps_of_rows = reference.tar_attention(
                    query, key, key, bias, scale=layer.module.scale, return_map=True
                )
                maps.append(maps_of_rows.mean(dim=0))
        return torch.stack(maps).mean(dim=0).cpu()


def band_share(attention_map: Tensor, half_width: int = 1) -> float:
    """The share of the attention that goes to frames at most ``half_width`` away; of 1."""
    frame = torch.arange(len(attention_map))
    near = (frame[:, None] - frame).abs() <= half_width
    return float((attention_map * near).sum(dim=-1).mean())
