"""``apply_grid`` has an image UNet see a grid of frames as a video (ETC)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vstar_kernels.analysis.grids import Order, check_order, grid_shape
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.bias import check_flag
from vstar_kernels.models.apply import RegularizedHandle
from vstar_kernels.models.config import TARConfig, checked_tar
from vstar_kernels.models.front_end import modules_of, temporal_layers
from vstar_kernels.models.grid.embedding import GridEmbedding, check_fps
from vstar_kernels.models.grid.model import (
    IMAGE_MODEL,
    AnnouncedSpeed,
    Grid,
    GridModel,
    is_image_model,
)
from vstar_kernels.models.regularized import check_keys
from vstar_kernels.models.schedule import StepGate, scheduler_of


def apply_grid(
    pipe_or_model: Any,
    frames: int,
    *,
    rows: int | None = None,
    config: TARConfig | str | None = None,
    embedding: bool | GridEmbedding = True,
    fps: float | Tensor | None = None,
    order: Order = "column",
    scheduler: Any = None,
    backend: str | None = None,
    stock_elsewhere: bool = False,
) -> GridHandle:
    """Has an image UNet see its latents as a grid of frames: a video in one image (ETC).

    >>> with vk.apply_grid(pipe, 16, config=vk.TARConfig(sigma=2.0)):
    ...     image = pipe(prompt, height=4 * 256, width=4 * 256).images[0]

    The UNet's own spatial self-attention is then full attention over space and time. All of it,
    ``attn1`` of every level, goes through :func:`vstar_kernels.frame_attention`, with temporal
    attention regularization between frames of tokens where ``config`` asks for it. Cross-attention
    and convolutions are the model's own. It survives what :func:`vstar_kernels.apply_tar` survives.

    Args:
        pipe_or_model: A ``UNet2DConditionModel`` (Stable Diffusion 1.5, 2.1, XL) or a pipeline that
            holds one, compiled or not.
        frames: Number of frames of the video.
        rows: Of the grid; None takes the most square one, see
            :func:`vstar_kernels.analysis.grid_shape`.
        config: TAR, or a preset; widths are those of one frame's latents. None regularizes nothing.
        embedding: Whether to add the mixed embedding to the latents, or what to add.
        fps: The video's speed, 0 to 120, one or one for each of the batch, for an embedding with an
            :class:`FPSEmbedding`; :attr:`GridHandle.fps` changes it. Where guidance doubles the
            batch, half of it will do; several images for a prompt need its speed as often.
        order: How frames count: ``"column"``, down the columns, as in the paper's eq. 1; ``"row"``.
        scheduler: As for :func:`vstar_kernels.apply_tar`.
        backend: As for :func:`vstar_kernels.frame_attention`.
        stock_elsewhere: Leave the layers and steps that are not regularized to the model's own
            attention, which is the same but for rounding.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: There is no such model or it has temporal attention of its own; ``rows`` does
            not divide ``frames``; no layer has one of the levels; the model is under ``apply_grid``
            already, or has processors that would have to be discarded. At a forward pass: the
            latents do not divide into the grid, frames would not stay apart at all levels, or there
            are neither one nor as many speeds as latents.
    """
    config = None if config is None else checked_tar("config", config)
    check_order(order)
    check_flag(stock_elsewhere, "stock_elsewhere")
    grid = Grid(*grid_shape(frames, rows=rows), order)
    dispatch.FRAME_ATTENTION.check_name(backend)
    models = _image_models(pipe_or_model)
    speed = AnnouncedSpeed()
    gate = StepGate(
        None if config is None else config.steps, scheduler_of(pipe_or_model, scheduler)
    )
    found = [
        GridModel(
            name,
            model,
            grid,
            config,
            gate,
            embedding=_embedding(embedding, model),
            fps=speed,
            backend=backend,
            stock_elsewhere=stock_elsewhere,
        )
        for name, model in models.items()
    ]
    if config is not None and config.key == "level":
        check_keys(config.regularizations, found, "level")
    if fps is not None:
        speed.set(check_speed(fps, found))
    return GridHandle(config, grid, gate, speed, found)


class GridHandle(RegularizedHandle):
    """A model that sees a grid of frames, from :func:`apply_grid`: a context manager.

    Attributes:
        config: The regularization; None where there is none.
        rows, cols, order: Of the grid.
    """

    def __init__(
        self,
        config: TARConfig | None,
        grid: Grid,
        gate: StepGate,
        speed: AnnouncedSpeed,
        models: list[GridModel],
    ) -> None:
        self.config = config
        self.rows, self.cols, self.order = grid
        self._speed = speed
        self._grid_models = models
        super().__init__(gate, models)

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.rows * self.cols

    @property
    def fps(self) -> Tensor | None:
        """The speed in frames per second, ``(batch,)``, of the thread that set it; None of none."""
        return self._speed.get()

    @fps.setter
    def fps(self, fps: float | Tensor | None) -> None:
        if fps is None:
            self._speed.set(None)
        else:
            self._speed.set(check_speed(fps, self._grid_models))

    def describe(self) -> str:
        """Returns what the grid is, and a line for each regularized layer."""
        count = sum(len(model.layers) for model in self._models)
        grid = f"{self.frames} frames in {self.rows} rows and {self.cols} columns, by {self.order}"
        if self.config is None:
            return f"{grid}: {count} spatial self-attention layers, no TAR"
        return f"{grid}\n{self.describe_tar(self.config)}"


def grid_model_of(model: nn.Module) -> GridModel | None:
    """Returns what :func:`apply_grid` put on a model or on a part of it, None where it has not."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, GridModel):
                return hook
    return None


def _image_models(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Returns the image UNets of a pipeline by their names."""
    parts = modules_of(pipe_or_model)
    models = {name: part for name, part in parts.items() if is_image_model(part)}
    if models:
        return models
    for part in parts.values():
        try:
            temporal_layers(part)
        except ValueError:
            continue
        raise ValueError(
            f"{type(part).__name__} has temporal attention of its own, which apply_tar is for; "
            f"apply_grid is for diffusers' {IMAGE_MODEL}"
        )
    raise ValueError(
        f"{type(pipe_or_model).__name__} is or holds no {IMAGE_MODEL} of diffusers, which "
        "apply_grid is for"
    )


def _embedding(embedding: Any, model: nn.Module) -> GridEmbedding | None:
    channels: int = model.config.in_channels  # type: ignore[union-attr, assignment]
    if embedding is True:
        return GridEmbedding(channels)
    if embedding is False:
        return None
    if not isinstance(embedding, GridEmbedding):
        raise TypeError(
            f"embedding must be True, False or a GridEmbedding, got {type(embedding).__name__}"
        )
    if embedding.channels != channels:
        raise ValueError(
            f"the embedding is of {embedding.channels} channels, the model's latents have "
            f"{channels}"
        )
    if embedding.fps is not None and embedding.where == "time":
        time: Any = model.time_embedding
        width = time.linear_2.out_features
        if embedding.fps.out_dim != width:
            raise ValueError(
                f"an FPSEmbedding that is added to a time embedding of width {width} must have "
                f"that out_dim, got {embedding.fps.out_dim}"
            )
    return embedding


def check_speed(fps: Any, models: Iterable[GridModel]) -> Tensor:
    """Returns the speed of videos, ``(batch,)``, that models are told.

    Raises:
        TypeError: It is neither a number nor a tensor of numbers.
        ValueError: A value is out of range, or no model has an embedding of it.
    """
    values = check_fps(fps)
    if not any(model.embedding is not None and model.embedding.fps for model in models):
        raise ValueError(
            "fps needs an embedding that was trained with it: "
            "embedding=GridEmbedding(fps=FPSEmbedding.for_unet(unet))"
        )
    return values
