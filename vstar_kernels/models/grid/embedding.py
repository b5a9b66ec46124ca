"""What tells a grid image's tokens their place, their frame and the video's speed (ETC)."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vstar_kernels.analysis.grids import (
    THETA,
    EmbeddingIndex,
    Order,
    cell_size,
    mixed_embedding,
)
from vstar_kernels.attention.bias import check_finite
from vstar_kernels.attention.frames.layout import Numbers, check_count
from vstar_kernels.files import write_atomically
from vstar_kernels.reading import read_bytes, shorten

Where = Literal["noise", "time"]
IMAGE_SET_FPS = 0  # of a clip of different images with one label
REPEATED_FPS = 120  # of a clip that repeats one image
LARGEST_EMBEDDING = 2**28  # bytes
_SETTINGS = "vstar_kernels.GridEmbedding"  # of a file's metadata
PERIOD = 10000.0  # of the sinusoids, as of the model's timesteps


class FPSEmbedding(nn.Module):
    """The embedding of a video's speed in frames per second (ETC, its training's TDT).

    The sinusoid that the model has for its timestep, then three linear layers: ``hidden`` times as
    wide, back, and to the output. The last layer starts at zero, so that a pretrained model is what
    it was until it is trained.

    Args:
        embedding_dim: Of the sinusoid, at least 2.
        out_dim: The latents' channels where it is added to the noise, the width of the model's time
            embedding where it is added to that.
        hidden: How many times wider the first layer is.
        flip_sin_to_cos, freq_shift: Of the model's ``time_proj``.

    Raises:
        ValueError, TypeError: A number is bad.
    """

    def __init__(
        self,
        embedding_dim: int,
        out_dim: int,
        hidden: int = 4,
        *,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0.0,
    ) -> None:
        super().__init__()
        check_count(embedding_dim, "embedding_dim", 2)
        check_count(out_dim, "out_dim", 1)
        check_count(hidden, "hidden", 1)
        self.embedding_dim = embedding_dim
        self.out_dim = out_dim
        self._flip = flip_sin_to_cos
        self._shift = freq_shift
        self.settings = {
            "embedding_dim": embedding_dim,
            "out_dim": out_dim,
            "hidden": hidden,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
        }
        wide = hidden * embedding_dim
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, wide),
            nn.SiLU(),
            nn.Linear(wide, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, out_dim),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    @classmethod
    def for_unet(cls, unet: nn.Module, where: Where = "noise", hidden: int = 4) -> FPSEmbedding:
        """Returns one for a ``UNet2DConditionModel``, with the sinusoid of its own timesteps.

        Args:
            unet: The model.
            where: ``"noise"``: as wide as the latents, to be added to them, as in the paper.
                ``"time"``: as wide as the time embedding, to be added to that.
            hidden: See the class.

        Raises:
            ValueError: ``where`` is neither.
        """
        _check_where(where)
        config: Any = unet.config
        last: Any = unet.time_embedding
        out_dim = config.in_channels if where == "noise" else last.linear_2.out_features
        embedding = cls(
            config.block_out_channels[0],
            out_dim,
            hidden,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        parameter = next(unet.parameters())
        return embedding.to(parameter.device)

    def forward(self, fps: Tensor) -> Tensor:
        """Returns ``(batch, out_dim)`` of ``(batch,)`` frames per second."""
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        return self.layers(self.sinusoid(fps.to(weight.device)).to(weight.dtype))

    def sinusoid(self, fps: Tensor) -> Tensor:
        """Returns ``(batch, embedding_dim)`` in float32, as diffusers' ``Timesteps``."""
        half = self.embedding_dim // 2
        place = torch.arange(half, dtype=torch.float32, device=fps.device)
        rates = torch.exp(-math.log(PERIOD) * place / (half - self._shift))
        angle = fps.float()[:, None] * rates
        parts = (angle.cos(), angle.sin()) if self._flip else (angle.sin(), angle.cos())
        return nn.functional.pad(torch.cat(parts, -1), (0, self.embedding_dim % 2))


class GridEmbedding(nn.Module):
    """What is added to a grid image of latents before the model's first layer (ETC).

    That is gain · ME, the :func:`vstar_kernels.analysis.mixed_embedding`, and the FPS embedding
    where there is one. Train it with the model and keep its ``state_dict()``.

    Args:
        channels: The latents' channels.
        theta, index: Of the mixed embedding.
        gain: A number, 1 as in the paper; or ``"learned"``, a parameter that starts at 0, so that a
            pretrained image model is what it was until it is trained.
        fps: The embedding of the speed, or None.
        where: ``"noise"``: it is added to the latents, as in the paper; ``"time"``: to the model's
            time embedding.

    Raises:
        ValueError, TypeError: An argument is bad.
    """

    def __init__(
        self,
        channels: int = 4,
        *,
        theta: float = THETA,
        index: EmbeddingIndex = "paper",
        gain: float | Literal["learned"] = 1.0,
        fps: FPSEmbedding | None = None,
        where: Where = "noise",
    ) -> None:
        super().__init__()
        mixed_embedding(1, 1, 1, 1, channels, theta=theta, index=index)  # checks them
        if fps is not None and not isinstance(fps, FPSEmbedding):
            raise TypeError(f"fps must be an FPSEmbedding or None, got {type(fps).__name__}")
        _check_where(where)
        if fps is not None and where == "noise" and fps.out_dim != channels:
            raise ValueError(
                f"an FPSEmbedding that is added to latents of {channels} channels must have that "
                f"out_dim, got {fps.out_dim}"
            )
        self.channels = channels
        self.theta = theta
        self.index: EmbeddingIndex = index
        self.where = where
        self.fps = fps
        self.gain: float | nn.Parameter
        if gain == "learned":
            self.gain = nn.Parameter(torch.zeros(()))
        else:
            check_finite(gain, "gain")
            self.gain = float(gain)

    def forward(
        self,
        sample: Tensor,
        rows: int,
        cols: int,
        order: Order = "column",
        fps: Tensor | None = None,
    ) -> Tensor:
        """Returns the latents with what is added to them.

        Args:
            sample: ``(batch, channels, rows · h, cols · w)``.
            rows, cols, order: Of the grid.
            fps: ``(batch,)`` frames per second; needed where the embedding of them is added here.

        Raises:
            ValueError: The channels or the size do not fit.
        """
        if sample.shape[1] != self.channels:
            raise ValueError(
                f"the embedding is of {self.channels} channels, the latents have {sample.shape[1]}"
            )
        h, w = cell_size(sample.shape[2], sample.shape[3], rows, cols)
        sizes = (rows, cols, h, w, self.channels)
        mixed = _kept(*sizes, float(self.theta), self.index, order).tensor().to(sample)
        gain = self.gain.to(sample) if isinstance(self.gain, Tensor) else self.gain
        out = sample + gain * mixed
        if self.fps is not None and self.where == "noise" and fps is not None:
            out = out + self.fps(fps).to(sample)[:, :, None, None]
        return out

    def save(self, path: str | Path) -> None:
        """Writes the embedding, its settings and its parameters, as safetensors.

        Raises:
            ImportError: ``safetensors`` is not installed (diffusers brings it).
            OSError: The file cannot be written.
        """
        from safetensors.torch import save

        learned = isinstance(self.gain, Tensor)
        settings = {
            "channels": self.channels,
            "theta": self.theta,
            "index": self.index,
            "where": self.where,
            "gain": "learned" if learned else self.gain,
            "fps": None if self.fps is None else self.fps.settings,
        }
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        write_atomically(path, save(state, metadata={_SETTINGS: json.dumps(settings)}))

    @classmethod
    def load(cls, path: str | Path) -> GridEmbedding:
        """Reads what :meth:`save` wrote.

        Raises:
            ImportError: ``safetensors`` is not installed.
            OSError: The file cannot be read.
            ValueError: It holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = read_bytes(path, LARGEST_EMBEDDING)
        try:
            # Eight bytes of its length, then a header in JSON, with metadata that load leaves out.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = header.get("__metadata__", {})
            if _SETTINGS not in metadata:
                raise ValueError("its metadata is of something else, or there is none")
            settings = json.loads(metadata[_SETTINGS])
            fps = settings.pop("fps")
            embedding = cls(**settings, fps=None if fps is None else FPSEmbedding(**fps))
            embedding.load_state_dict(load(data))
        # Of JSON with other things in it: whatever is done with them.
        except (SafetensorError, ArithmeticError, LookupError, AttributeError, TypeError,
                ValueError, RuntimeError) as error:  # fmt: skip
            reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0])
            raise ValueError(f"{path} holds no GridEmbedding: {reason}") from None
        return embedding

    def extra_repr(self) -> str:
        return f"{self.channels}, theta={self.theta}, index={self.index!r}, where={self.where!r}"


@functools.lru_cache(maxsize=16)
def _kept(
    rows: int, cols: int, h: int, w: int, channels: int, theta: float, index: Any, order: Order
) -> Numbers:
    """Returns the mixed embedding, which is kept for later calls."""
    with _disable_current_modes():
        found = mixed_embedding(rows, cols, h, w, channels, theta=theta, index=index, order=order)
        return Numbers.of(found)


def check_fps(fps: Any) -> Tensor:
    """Returns frames per second as ``(batch,)`` float32.

    Raises:
        TypeError: It is neither a number nor a tensor of numbers.
        ValueError: A value is outside of 0 to 120, the embedding's range.
    """
    if not isinstance(fps, Tensor):
        check_finite(fps, "fps")
    values = torch.as_tensor(fps, dtype=torch.float32).flatten()
    bad = values[~((values >= IMAGE_SET_FPS) & (values <= REPEATED_FPS))]
    if not len(values):
        raise ValueError("fps must have a value, got an empty tensor")
    if len(bad):
        raise ValueError(
            f"fps must be from {IMAGE_SET_FPS} (images of one label) to {REPEATED_FPS} (one image "
            f"repeated), got {float(bad[0]):g}"
        )
    return values


def _check_where(where: Any) -> None:
    if where not in get_args(Where):
        raise ValueError(f"where must be 'noise' or 'time', got {where!r}")
