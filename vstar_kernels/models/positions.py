"""Position embeddings that end: how many frames a model takes, and longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.models.layers import TemporalLayer

FRAMES_DIM = 2  # of the samples of the models that have such embeddings


class Positions:
    """The frame positions of ``UNetMotionModel``, ``SparseControlNetModel`` and Latte.

    The other models have none, or compute them for any length.

    Args:
        model: The model.
        extend: Make them as long as each sample, for the time of the forward pass, rather than
            refuse it. They are sinusoidal, so longer ones are computed.
    """

    def __init__(self, model: nn.Module, *, extend: bool) -> None:
        self._model = model
        self._extend = extend
        self._blocks: list[nn.Module] = []
        self._extended: list[tuple[Tensor, Tensor]] = []  # a buffer, its own content
        self._longer: dict[Any, Tensor] = {}

    def find(self, layers: list[TemporalLayer]) -> None:
        """Finds the embeddings in the blocks of these layers, for :meth:`fit`."""
        names = dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers)
        blocks = (self._model.get_submodule(name) for name in names)
        self._blocks = [b for b in blocks if hasattr(getattr(b, "pos_embed", None), "pe")]

    def fit(self, sample: Tensor) -> None:
        """Extends them, before a forward pass, where the sample has more frames, or raises.

        Raises:
            ValueError: There are too many frames and they are not to be extended; or they are not
                sinusoidal, so that they cannot be.
        """
        for buffer, name, frames in self._short(sample):
            if not self._extend:
                raise ValueError(
                    f"{type(self._model).__name__} has positions for {buffer.shape[1]} frames "
                    f"({name}), got {frames}: use that many, or apply_tar(…, extend_positions=True)"
                )
            self._extended.append((buffer, buffer.data))
            buffer.data = self._sinusoidal(buffer, frames)

    def restore(self, *_: object) -> None:
        """Undoes, after the forward pass, what :meth:`fit` did."""
        for buffer, content in self._extended:
            buffer.data = content
        self._extended.clear()

    def _short(self, sample: Tensor) -> Iterator[tuple[Tensor, str, int]]:
        """Yields each buffer that is too short, what limits it, and the frames it needs."""
        num_frames = sample.shape[FRAMES_DIM]
        for block in self._blocks:
            # FreeNoise's blocks see one window at a time.
            frames = min(num_frames, getattr(block, "context_length", num_frames))
            buffer: Any = block.pos_embed.pe  # type: ignore[union-attr]
            if frames > buffer.shape[1]:
                yield buffer, "at most: motion_max_seq_length", frames
        buffer = getattr(self._model, "temp_pos_embed", None)
        # Latte adds the whole of it, and nothing to a single frame.
        if buffer is not None and num_frames not in (1, buffer.shape[1]):
            yield buffer, "exactly: video_length", num_frames

    def _sinusoidal(self, buffer: Tensor, frames: int) -> Tensor:
        """Returns the embedding, ``(1, length, channels)``, for another number of frames."""
        key = (frames, buffer.shape[2], buffer.dtype, buffer.device)
        if key not in self._longer:
            make = _latte_table if hasattr(self._model, "temp_pos_embed") else _motion_table
            table = make(max(frames, buffer.shape[1]), buffer.shape[2]).to(buffer)
            same = table[:, : buffer.shape[1]]
            if not torch.allclose(same.float(), buffer.float(), atol=1e-2):
                raise ValueError(
                    f"the positions of {type(self._model).__name__} are not sinusoidal (learned?): "
                    f"they cannot be extended from {buffer.shape[1]} to {frames} frames"
                )
            # Latte takes exactly as many as there are frames.
            self._longer[key] = table[:, :frames]
        return self._longer[key]


def _motion_table(frames: int, channels: int) -> Tensor:
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    table: Any = SinusoidalPositionalEmbedding(channels, max_seq_length=frames).pe
    return table


def _latte_table(frames: int, channels: int) -> Tensor:
    from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

    grid = torch.arange(frames).unsqueeze(1)
    return get_1d_sincos_pos_embed_from_grid(channels, grid, output_type="pt").float()[None]
