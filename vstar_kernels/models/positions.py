"""Position embeddings that end: how many frames a model takes, longer ones, and drawn ones."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vstar_kernels.attention.bias import shown
from vstar_kernels.models.classes import ClassChange
from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import (
    find_front_end,
    models_with_temporal_attention,
    temporal_layers,
)
from vstar_kernels.models.hooks import (
    CopiedHook,
    Handle,
    Hooks,
    is_compiled,
    put_back,
    take_off,
)
from vstar_kernels.models.layers import TemporalLayer

MOST_POSITIONS = 2**16  # to draw from: a table of 1,280 channels has 320 MiB
FRAMES_DIM = 2  # of the samples of the models that have such embeddings
_TABLES, _PART = "_vstar_kernels_tables", "_vstar_kernels_part"
Tables = dict[int, Tensor]  # by the number of channels


class Positions:
    """The frame positions of ``UNetMotionModel``, ``SparseControlNetModel`` and Latte.

    The other models have none, or compute them for any length. Longer ones are sinusoidal too, so
    they are computed. They are never put into the model: while a forward pass needs longer ones,
    the thread in which it runs reads those in the place of the model's own.

    Args:
        model: The model.
        extend: Whether to make them as long as each sample, rather than to refuse it.
        tables: Gives the longer positions of the forward pass that runs in this thread; none where
            the model's own will do.
    """

    def __init__(
        self, model: nn.Module, *, extend: bool, tables: Callable[[], Tables | None]
    ) -> None:
        self._model = model
        self._extend = extend
        self._tables = tables
        self._embeddings: dict[str, _Embedding] = {}
        self._longer: dict[Any, Tensor] = {}

    def find(self, layers: list[TemporalLayer]) -> None:
        """Finds the embeddings in the blocks of these layers, for :meth:`fit`.

        Raises:
            ValueError: Another handle changes them already.
        """
        names = dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers)
        found = {}
        for name in names:
            block = self._model.get_submodule(name)
            if hasattr(getattr(block, "pos_embed", None), "pe"):
                found[name] = _Embedding(block.pos_embed, "pe", block)  # type: ignore[arg-type]
        if hasattr(self._model, "temp_pos_embed"):
            found[""] = _Embedding(self._model, "temp_pos_embed", None)
        for name, embedding in list(self._embeddings.items()):
            if name not in found or found[name].owner is not embedding.owner:
                self._put_back(name)
        if self._extend:
            for embedding in found.values():
                lookup = embedding.owner.__dict__.get(_TABLES)
                if lookup is not None and lookup.tables is not self._tables:
                    raise ValueError(
                        f"the frame positions of this {type(self._model).__name__} are changed by "
                        "another handle (apply_tar with extend_positions, randomize_positions): "
                        "remove() that first"
                    )
        self._embeddings |= found  # before anything is changed
        if self._extend:
            for embedding in found.values():
                embedding.owner.__dict__[_TABLES] = _Lookup(self._tables)
                _CHANGES[embedding.buffer].put_on(embedding.owner)

    def restore(self) -> None:
        """Lets the model read its own positions again; nothing happens the second time."""
        for name in list(self._embeddings):
            self._put_back(name)

    def fit(self, sample: Tensor) -> Tables:
        """Returns the longer positions that a sample needs, none where the model's own will do.

        Raises:
            ValueError: There are too many frames and they are not to be extended; or they are not
                sinusoidal, so that they cannot be.
        """
        tables: Tables = {}
        for buffer, limit, frames in self._short(sample):
            if not self._extend:
                raise ValueError(
                    f"{type(self._model).__name__} has positions for {buffer.shape[1]} frames "
                    f"({limit}), got {frames}: use that many, or apply_tar(…, "
                    "extend_positions=True)"
                )
            table = self._sinusoidal(buffer, frames)
            channels = table.shape[2]
            if channels not in tables or table.shape[1] > tables[channels].shape[1]:
                tables[channels] = table
        return tables

    @property
    def are_there(self) -> bool:
        """Whether the model has any that end."""
        return bool(self._embeddings)

    def at(self, drawn: Tensor, longest: int) -> Tables:
        """Returns the positions of frames that have places of their own, of ``longest`` places.

        Raises:
            ValueError: The positions are not sinusoidal.
        """
        buffers: list[Any] = [x.owner._buffers[x.buffer] for x in self._embeddings.values()]
        tables: Tables = {}
        for buffer in buffers:
            table = self._sinusoidal(buffer, longest)
            tables[table.shape[2]] = table[:, drawn.to(table.device)]
        return tables

    def _put_back(self, name: str) -> None:
        embedding = self._embeddings[name]
        _drop(embedding.owner, embedding.buffer, _TABLES)
        self._embeddings.pop(name, None)

    def _short(self, sample: Tensor) -> Iterator[tuple[Tensor, str, int]]:
        """Yields each embedding that is too short, what limits it, and the frames it needs."""
        num_frames = sample.shape[FRAMES_DIM]
        for embedding in list(self._embeddings.values()):
            buffer: Any = embedding.owner._buffers[embedding.buffer]
            if embedding.block is not None:
                # FreeNoise's blocks see one window at a time.
                frames = min(num_frames, getattr(embedding.block, "context_length", num_frames))
                if frames > buffer.shape[1]:
                    yield buffer, "at most: motion_max_seq_length", frames
            # Latte adds the whole of it, and nothing to a single frame.
            elif num_frames not in (1, buffer.shape[1]):
                yield buffer, "exactly: video_length", num_frames

    def _sinusoidal(self, buffer: Tensor, frames: int) -> Tensor:
        """Returns the embedding, ``(1, length, channels)``, for another number of frames."""
        key = (frames, buffer.shape[2], buffer.dtype, buffer.device)
        if key not in self._longer:
            make = _latte_table if hasattr(self._model, "temp_pos_embed") else _motion_table
            with torch.device("cpu"):  # whatever is the default: it is kept for other calls
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


@dataclass(frozen=True)
class _Embedding:
    """A position embedding: the module that has it, its name there, and the block it is in."""

    owner: nn.Module
    buffer: str
    block: nn.Module | None


class _Lookup:
    """Finds the positions that a module is to read; a copy of the module reads its own."""

    def __init__(self, tables: Callable[[], Tables | None]) -> None:
        self.tables = tables

    def find(self, channels: int) -> Tensor | None:
        """Returns the longer positions of the forward pass that runs, None for the module's."""
        tables = self.tables()
        return None if tables is None else tables.get(channels)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes None, which the copy of a module has no use for."""
        return _nothing, ()


def _nothing() -> None:
    pass


class Part(Protocol):
    """Which frames of a forward pass this process has."""

    frames: int  # of the whole video
    first: int
    count: int


class _PartLookup:
    """Finds the positions of the frames that this process has; a copy of the module has all."""

    def __init__(self, model: nn.Module, running: Callable[[], Part | None]) -> None:
        self._name, self._running = type(model).__name__, running

    def of(self, table: Tensor) -> Tensor:
        """Returns those of a table ``(1, frames, channels)``, all where no pass runs."""
        part = self._running()
        if part is None:
            return table
        if table.shape[1] != part.frames:
            raise ValueError(
                f"{self._name} has positions for {table.shape[1]} frames (exactly: video_length), "
                f"got {part.frames}: use that many, or apply_tar(…, extend_positions=True)"
            )
        return table[:, part.first : part.first + part.count]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes None, which the copy of a module has no use for."""
        return _nothing, ()


def put_part_on(module: nn.Module, buffer: str, running: Callable[[], Part | None]) -> None:
    """Has a module read, in a forward pass, the positions of the frames that this process has.

    Args:
        module: Has the position embedding.
        buffer: The embedding's name there.
        running: Returns which frames those are; None outside of a forward pass.
    """
    module.__dict__[_PART] = _PartLookup(module, running)
    _CHANGES[buffer].put_on(module)


def take_part_off(module: nn.Module, buffer: str) -> None:
    """Undoes :func:`put_part_on`; nothing happens the second time."""
    if _PART in module.__dict__:
        _drop(module, buffer, _PART)


def _drop(module: nn.Module, buffer: str, lookup: str) -> None:
    """Takes off one of the two that change what a module reads, and the change with the last."""
    if not {_TABLES, _PART} - {lookup} & module.__dict__.keys():
        _CHANGES[buffer].take_off(module)
    module.__dict__.pop(lookup, None)


def _read(buffer: str) -> ClassChange:
    """Returns the change to a class that reads a buffer through :class:`_Lookup`."""

    def read(module: nn.Module) -> Any:
        own: Any = module._buffers[buffer]
        lookup = module.__dict__.get(_TABLES)
        longer = None if lookup is None else lookup.find(own.shape[2])
        # Offloading may have moved the module since the forward pass began.
        table = own if longer is None else longer.to(own.device, own.dtype)
        part = module.__dict__.get(_PART)
        return table if part is None else part.of(table)

    return ClassChange(lambda base: {buffer: property(read)})


_CHANGES = {name: _read(name) for name in ("pe", "temp_pos_embed")}


def _motion_table(frames: int, channels: int) -> Tensor:
    """Returns what diffusers' ``SinusoidalPositionalEmbedding`` holds in float32."""
    position = torch.arange(frames, dtype=torch.float32, device="cpu").unsqueeze(1)
    even = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu")
    angles = position * torch.exp(even * (-math.log(10000.0) / channels))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


def _latte_table(frames: int, channels: int) -> Tensor:
    from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

    grid = torch.arange(frames).unsqueeze(1)
    return get_1d_sincos_pos_embed_from_grid(channels, grid, output_type="pt").float()[None]


# ---- positions that are drawn, for training ----


def randomize_positions(
    pipe_or_model: Any, longest: int, *, generator: torch.Generator | None = None
) -> Handle:
    """Gives the frames of each forward pass positions that are drawn from a longer range.

    VSTAR (arXiv 2403.13501, §5) suggests randomized positions for training models that are to make
    longer videos than their clips. How they are drawn is Ruoss et al.'s (arXiv 2305.16843): as many
    of 0 … ``longest`` − 1 as there are frames, none twice, in ascending order, anew each time. That
    the whole batch and all layers have the same, and that the tables are the model's own sinusoids,
    is our choice. So have a pipeline's models that are called one after another, each once, with as
    many frames at the same timesteps: a UNet and its SparseCtrl.

    >>> with vk.randomize_positions(unet, longest=64):
    ...     predicted = unet(noisy, timestep, text).sample  # of 16 frames
    ...     F.mse_loss(predicted, noise).backward()

    It works on models with tables of positions: diffusers' ``UNetMotionModel`` (AnimateDiff),
    ``SparseControlNetModel`` and ``LatteTransformer3DModel``. ``apply_tar(…,
    extend_positions=True)`` samples beyond the table's length afterwards.

    Args:
        pipe_or_model: A pipeline, whose every model with such positions is treated, or one model,
            not compiled.
        longest: How many positions there are to draw from, at least the frames of each call, at
            most 65,536.
        generator: Of the draws; None is torch's own.

    Returns:
        A handle: a context manager, with ``remove()``. Call ``backward()`` before it is removed
        where the model has gradient checkpointing.

    Raises:
        TypeError: ``pipe_or_model``, ``longest`` or ``generator`` is of the wrong kind.
        ValueError: ``longest`` is out of its range, there are no such positions, the model is
            compiled, or another handle changes its positions. At a forward pass: it has more
            frames, or the positions are not sinusoidal.
    """
    if isinstance(longest, bool) or not isinstance(longest, int):
        raise TypeError(f"longest must be an integer, got {type(longest).__name__}")
    if not 1 <= longest <= MOST_POSITIONS:
        raise ValueError(
            f"longest must be from 1 to {MOST_POSITIONS} positions, got {shown(longest)}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    models = models_with_temporal_attention(pipe_or_model)
    draws = _Draws(longest, generator)
    found = []
    for name, model in models.items():
        drawn = _DrawnPositions(model, draws)
        if drawn.positions.are_there:
            if is_compiled(pipe_or_model, name, model):
                raise ValueError(f"positions of a compiled {type(model).__name__} cannot be drawn")
            found.append(drawn)
    if not found:
        names = ", ".join(type(model).__name__ for model in models.values())
        raise ValueError(
            f"{names} has no table of frame positions: known are those of UNetMotionModel, "
            "SparseControlNetModel and LatteTransformer3DModel"
        )
    return DrawnPositionsHandle(found)


class DrawnPositionsHandle(Handle):
    """Drawn positions on some models: a context manager, with :meth:`remove`."""

    def __init__(self, models: list[_DrawnPositions]) -> None:
        self._models = models
        self._install_all(models)

    def remove(self) -> None:
        """Lets the models read their own positions again; nothing happens the second time."""
        super().remove()
        put_back(*(model.remove for model in self._models))


class _DrawnPass(ForwardPass):
    """The positions that were drawn for one forward pass."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.tables = tables


class _Draws:
    """Draws the positions of frames, by thread: the same for each model of one call of them all."""

    def __init__(self, longest: int, generator: torch.Generator | None) -> None:
        self.longest = longest
        self._generator = generator
        self._thread = threading.local()

    def take(self, model: nn.Module, frames: int, timestep: Any) -> Tensor:
        """Returns the positions of a forward pass, in ascending order.

        What was drawn last is what a model has, too, that has not had it yet, with as many frames
        at the same timesteps.

        Raises:
            ValueError: There are more frames than positions.
        """
        if frames > self.longest:
            raise ValueError(
                f"longest must be at least the {frames} frames of a call, got {self.longest}"
            )
        models: set[int]
        values = _values(timestep)
        drawn, of, models = getattr(self._thread, "last", (torch.empty(0), None, set()))
        if id(model) in models or len(drawn) != frames or of != values:
            device = None if self._generator is None else self._generator.device
            every = torch.randperm(self.longest, generator=self._generator, device=device)
            drawn, models = every[:frames].sort().values, set()
        models.add(id(model))
        self._thread.last = drawn, values, models
        return drawn


def _values(timestep: Any) -> set[float]:
    """Returns the timesteps of a call, however often it has each."""
    values = torch.as_tensor([] if timestep is None else timestep).flatten()
    return set(values.tolist())  # a GPU is waited for once


class _DrawnPositions:
    """One model whose positions are drawn; itself the hook that runs before each forward pass."""

    def __init__(self, model: nn.Module, draws: _Draws) -> None:
        self.positions = Positions(model, extend=False, tables=lambda: None)
        self.positions.find(temporal_layers(model))
        self._model = model
        self._draws = draws
        self._front_end = find_front_end(model)
        self._hooks = Hooks()
        self._passes: ForwardPasses[_DrawnPass] = ForwardPasses(
            f"randomize_positions was removed from this {type(model).__name__} while it ran, in "
            "another thread: a part of its layers had the positions that were drawn"
        )

    def install(self) -> None:
        """Has the model read what is drawn."""
        self.positions = Positions(self._model, extend=True, tables=self._tables)
        take_off(self._model, lambda hook: isinstance(hook, CopiedHook))
        watch(self._model, self._passes)
        self._hooks.before(self._model, self)
        self.positions.find(temporal_layers(self._model))

    def remove(self) -> None:
        """Has it read its own again."""
        put_back(
            self._passes.close,
            self._hooks.remove,
            self.positions.restore,
            lambda: unwatch(self._model, self._passes),
        )

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Draws the positions of a forward pass."""
        if kwargs is None:  # another thread has just taken the hook off
            return
        call = self._front_end.read_call(model, args, kwargs)
        drawn = self._draws.take(model, call.sample.shape[FRAMES_DIM], call.timestep)
        self._passes.begin(_DrawnPass(self.positions.at(drawn, self._draws.longest)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes a hook that refuses to run in a copy of the model."""
        return CopiedHook, ("randomize_positions",)

    def _tables(self) -> Tables | None:
        forward = self._passes.current()
        return None if forward is None else forward.tables
