"""One image UNet whose latents are a grid of frames: its layers, its attention and its hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.grids import Order, cell_size, grid_layout
from vstar_kernels.attention.bias import Bias, GaussianBias
from vstar_kernels.attention.frames.layout import Frames, Layout
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.attention_processor import ProcessorFrontEnd, TARAttnProcessor
from vstar_kernels.models.conditional import has_equal_halves
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.grid.embedding import GridEmbedding
from vstar_kernels.models.hooks import Argument, ModelCall
from vstar_kernels.models.layers import CrossLayer, Regularization, TemporalLayer, Traced
from vstar_kernels.models.positions import Tables
from vstar_kernels.models.regularized import RegularizedModel, RegularizedPass
from vstar_kernels.models.schedule import Announced, StepGate
from vstar_kernels.models.unet import level_of

_LAYER = re.compile(
    r"(?P<place>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\."
    r"attentions\.\d+\.transformer_blocks\.\d+\.attn1"
)
IMAGE_MODEL = "UNet2DConditionModel"


class Grid(NamedTuple):
    """How frames are laid out in an image."""

    rows: int
    cols: int
    order: Order

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.rows * self.cols

    def layout(self, h: int, w: int) -> Layout:
        """Returns the layout of an image's tokens whose frames have h × w of them."""
        return grid_layout(self.rows, self.cols, h, w, self.order)


class GridFrontEnd(ProcessorFrontEnd):
    """The spatial self-attention of diffusers' image UNet, whose latents are a grid of frames."""

    models = f"{IMAGE_MODEL} of diffusers (Stable Diffusion 1.5, 2.1, XL)"

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields every ``attn1`` in the model's order; none of another model."""
        if not is_image_model(model):
            return
        levels = len(model.down_blocks)  # type: ignore[arg-type]
        for name, plain_name, module in self.self_attentions(model):
            if match := _LAYER.fullmatch(plain_name):
                level = level_of(match, levels)
                yield TemporalLayer(name, level, match["place"], module)  # type: ignore[arg-type]

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields none: a grid image has one text, not one for each frame."""
        return iter(())

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call; the width is that of one frame."""
        call = super().read_call(model, args, kwargs)
        height, width = call.sample.shape[-2:]
        h, w = cell_size(height, width, self.grid.rows, self.grid.cols)
        halvings = len(model.down_blocks) - 1  # type: ignore[arg-type]
        if h % 2**halvings or w % 2**halvings:
            raise ValueError(
                f"a frame's latents must be multiples of {2**halvings}, so that frames stay apart "
                f"at all {halvings + 1} levels of the UNet, got {h} × {w}"
            )
        return ModelCall(call.sample, call.timestep, w)

    def make_attention(self, module: nn.Module, backend: str | None) -> GridAttnProcessor:
        """Makes a processor for the module, plain until it is given a layout."""
        return GridAttnProcessor(backend=backend)


def is_image_model(model: nn.Module) -> bool:
    """Returns whether it is diffusers' image UNet, or of a class derived from it."""
    return any(cls.__name__ == IMAGE_MODEL for cls in type(model).__mro__)


@dataclass(frozen=True)
class GridRegularization(Regularization):
    """What changes the attention of one layer over a grid of frames.

    Attributes:
        layout: Which frame each of the layer's tokens belongs to; None where it does not matter.
        rule: What the bias does between frames of tokens.
    """

    layout: Layout | None = None
    rule: FrameRule | None = None


class GridAttnProcessor(TARAttnProcessor):
    """An attention processor for self-attention over a grid image of frames.

    It takes ``(batch, tokens, channels)``, the tokens in the image's order: the kernels find each
    frame's where they are, so that nothing is copied.
    """

    def operate(
        self, query: Tensor, key: Tensor, value: Tensor, change: Regularization, scale: float
    ) -> Tensor:
        """Computes attention over all tokens; ``(batch, tokens, heads, head_dim)``."""
        layout = rule = None
        if isinstance(change, GridRegularization):
            layout, rule = change.layout, change.rule
        if layout is None:  # without a rule, frames do not matter
            layout = Layout(Frames(1, query.shape[1]))
        return frame_attention(query, key, value, layout, rule, scale=scale, backend=self.backend)


def frame_rule(bias: Bias, layout: Layout) -> FrameRule:
    """Returns the rule between frames of tokens that a bias between frames stands for.

    Raises:
        ValueError: The bias is of another number of frames, or its statistic is of whole maps.
    """
    if bias.stat == "map_max":
        raise ValueError(
            "stat='map_max' is of the map between single tokens of frames, which attention over "
            "frames of tokens does not have: use 'row_max' or 'none'"
        )
    weight = (bias.strength, bias.stat, bias.clamp_negative)
    if isinstance(bias, GaussianBias):
        return FrameRule.tar(bias.sigma, *weight)
    times = [int(time) for time in layout.coordinates]  # of frames as the layout numbers them
    matrix = bias.matrix(layout.frames)
    return FrameRule.bias(matrix[..., times, :][..., times], *weight)


class AnnouncedSpeed(Announced[Tensor]):
    """The speed that the caller announces, by the thread that announces it."""

    name = "fps"


class GridPass(RegularizedPass):
    """One forward pass over a grid image.

    Args:
        layers, tables, traced: Of the :class:`RegularizedPass`.
        fps: Frames per second; None where no embedding needs them. Of each of the batch, once the
            latents are known.
    """

    def __init__(
        self,
        layers: Mapping[str, Regularization],
        tables: Tables,
        traced: Mapping[str, Traced],
        fps: Tensor | None,
    ) -> None:
        super().__init__(layers, tables, traced)
        self.fps = fps


class GridModel(RegularizedModel):
    """An image UNet whose latents are a grid of frames; itself the hook before its forward passes.

    Args:
        name, model, config, gate: Of the :class:`RegularizedModel`.
        grid: How the frames are laid out.
        embedding: What is added to the latents; None adds nothing.
        fps: The speed that the caller announces.
        backend, stock_elsewhere: See :func:`vstar_kernels.apply_grid`.
    """

    applied_by = "apply_grid"
    attention = "spatial self-attention"

    def __init__(
        self,
        name: str,
        model: nn.Module,
        grid: Grid,
        config: TARConfig | None,
        gate: StepGate,
        *,
        embedding: GridEmbedding | None,
        fps: AnnouncedSpeed,
        backend: str | None,
        stock_elsewhere: bool,
    ) -> None:
        super().__init__(
            name,
            model,
            config,
            gate,
            front_end=GridFrontEnd(grid),
            backend=backend,
            stock_elsewhere=stock_elsewhere,
            extend_positions=False,
        )
        self.grid = grid
        self.embedding = embedding
        self.fps = fps
        self._sample = Argument(model, 0)
        self._made_for_sizes: dict[tuple[Any, ...], Regularization] = {}
        for change in self._regularizations.values():  # now, rather than at the first forward pass
            if change.bias is not None:
                frame_rule(change.bias, grid.layout(1, 1))

    def install(self) -> None:
        """Puts the attentions and the hooks in."""
        super().install()
        if self.embedding is not None and self.embedding.where == "time":
            self._hooks.after(self.model.time_embedding, _AfterTimeEmbedding(self))  # type: ignore[arg-type]

    def _before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        super()._before(args, kwargs)
        forward = self._passes.current()
        if self.embedding is None or not isinstance(forward, GridPass):
            return None
        sample = self._sample.get(args, kwargs)
        rows, cols, order = self.grid
        forward.fps = _of_batch(forward.fps, sample)
        changed = self.embedding(sample, rows, cols, order, forward.fps)
        return self._sample.replace(args, kwargs, changed)

    def _changes(self, call: ModelCall) -> dict[str, Regularization]:
        """Returns the change to each layer's attention, with the layout of the layer's tokens."""
        height, width = call.sample.shape[-2:]
        size = (height // self.grid.rows, width // self.grid.cols)
        changes = super()._changes(call)
        return {
            layer.name: self._on_grid(changes[layer.name], layer, size) for layer in self.layers
        }

    def _on_grid(
        self, change: Regularization, layer: TemporalLayer, size: tuple[int, int]
    ) -> Regularization:
        """Returns a change with a layer's layout: the same object for the same size."""
        assert layer.level != "init"
        key = (id(change), layer.level, size)  # a change lives as long as this
        made = self._made_for_sizes.get(key)
        if made is None:
            h, w = (side // 2**layer.level for side in size)
            layout = self.grid.layout(h, w)
            rule = None if change.bias is None else frame_rule(change.bias, layout)
            made = GridRegularization(
                change.bias, change.override, change.stock, layout=layout, rule=rule
            )
            self._made_for_sizes[key] = made
        return made

    def _make_pass(self, layers: Mapping[str, Regularization], tables: Tables) -> GridPass:
        fps = None
        if self.embedding is not None and self.embedding.fps is not None:
            fps = self.fps.get()
            if fps is None:
                raise ValueError(
                    "fps must be given to apply_grid, or set by handle.fps: the embedding has an "
                    "FPSEmbedding"
                )
        return GridPass(layers, tables, self._traced(), fps)

    def add_speed(self, emb: Tensor) -> Tensor:
        """Returns the time embedding ``(batch, width)`` with that of the speed."""
        forward = self._passes.current()
        if not isinstance(forward, GridPass) or self.embedding is None:
            return emb
        speed, fps = self.embedding.fps, forward.fps
        return emb if speed is None or fps is None else emb + speed(fps).to(emb)


class _AfterTimeEmbedding:
    """The hook after a UNet's ``time_embedding``; a copy of the model has one that does nothing."""

    def __init__(self, model: GridModel | None) -> None:
        self._model = model
        self._add = None if model is None else torch.compiler.disable(model.add_speed)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        return None if self._add is None or output is None else self._add(output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _AfterTimeEmbedding, (None,)


def _of_batch(fps: Tensor | None, sample: Tensor) -> Tensor | None:
    """Returns the speed of each of a batch of latents, which guidance may have doubled."""
    if fps is None or len(fps) == len(sample):
        return fps
    if len(fps) == 1:
        return fps.expand(len(sample))
    if 2 * len(fps) == len(sample) and has_equal_halves(sample):
        return fps.repeat(2)
    raise ValueError(
        f"fps must be one, or one for each of the batch of {len(sample)}, or of half of it where "
        f"guidance has the same latents twice, got {len(fps)}; several images for a prompt need "
        "the prompt's speed as often"
    )
