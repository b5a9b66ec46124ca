"""The cross-attention maps of chosen words while a model samples.

A word's map is the column of its tokens in the attention of each frame's positions to the text. The
layers that are captured compute their attention by :func:`vstar_kernels.column_attention`, which
gives the output and these maps in one pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_kernels.analysis.maps import Place, find_maps
from vstar_kernels.models.conditional import has_equal_halves, in_conditional_passes
from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import (
    cross_layers,
    find_front_end,
    models_with_temporal_attention,
)
from vstar_kernels.models.hooks import Hooks, ModelCall, is_compiled, put_back
from vstar_kernels.models.layers import (
    CrossLayer,
    LayerChoice,
    WatchedCrossAttention,
    layer_chooser,
)
from vstar_kernels.models.schedule import (
    ChosenSteps,
    FindScheduler,
    SteppedHandle,
    as_indices,
    scheduler_of,
    timestep_value,
)
from vstar_kernels.models.text import share_text, unshare_text

Columns = Sequence[Sequence[int]] | Tensor
Size = int | tuple[int, int]
NO_TEXT = "cross-attention to a text that is known here"


@dataclass
class ColumnMap:
    """The maps of some words in one layer at one step.

    Attributes:
        layer, level, place: The layer's name and where it is, as of :class:`TemporalLayer`.
        step: The index of the denoising step; None where it is not known.
        timestep: What the model was given.
        map: ``(batch, frames, words, height, width)``, float32: of each position's attention to the
            text, mean over heads, what the word's tokens get, their mean. The batch is that with
            the prompt. On the CPU unless the capture is differentiable.
        grid: The height and width of level 0's feature maps.
        calls: Of how many forward passes it is the mean: FreeInit, for one, repeats its steps.
    """

    layer: str
    level: int
    place: Place
    step: int | None
    timestep: float
    map: Tensor
    grid: tuple[int, int]
    calls: int = 1


def capture_columns(
    pipe_or_model: Any,
    columns: Columns,
    *,
    layers: LayerChoice = None,
    steps: Collection[int] | None = None,
    scheduler: Any = None,
    guidance: bool | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> ColumnCapture:
    """Collects the cross-attention maps of some words while a model runs.

    >>> words = [find_tokens(pipe.tokenizer, prompt, word) for word in ("cat", "runs")]
    >>> with vk.capture_columns(pipe, words, steps=[0, 10]) as capture:
    ...     video = pipe(prompt).frames
    >>> capture.mean(step=10)  # (1, 16, 2, 20, 32): both words in 16 frames, at level 1's size

    It works on diffusers' ``UNet3DConditionModel`` (ModelScope, Zeroscope), ``I2VGenXLUNet``,
    ``UNetMotionModel`` (AnimateDiff, PIA) and ``LatteTransformer3DModel``, and on the ``UNetModel``
    of ``lvdm``. In a captured layer at a captured step :func:`vstar_kernels.column_attention` is
    what computes the attention, so that the model's output may differ by rounding.

    Memory is ``layers × steps × batch × frames × words × height × width × 4`` bytes.

    Args:
        pipe_or_model: The model, or a pipeline with it; not compiled.
        columns: The tokens of each word, such as :func:`find_tokens` gives; or weights ``(tokens,
            words)`` for all videos, or ``(batch, tokens, words)`` for each of those with a prompt.
        layers: Whether to capture a :class:`CrossLayer`; or levels and names of layers, ``[1, 2]``;
            None is all.
        steps: Indices of denoising steps; None is all.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it for ``steps``, unless :attr:`ColumnCapture.step` is set.
        guidance: Whether the first half of the model's batch is without the prompt, and left out.
            None: where both halves have the same latents.
        differentiable: Keep the maps on the model's device and in autograd's graph, wherever
            gradients are enabled. Call ``backward()`` before the handle is removed: a model with
            gradient checkpointing then runs its layers again.
        backend: As for :func:`vstar_kernels.column_attention`.

    Returns:
        A handle: a context manager, with ``remove()``, which keeps its maps afterwards.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The model has no text (Stable Video Diffusion) or is compiled, a layer's
            attention cannot be replaced (IP adapters), ``columns`` are no tokens or of the wrong
            shape, or ``layers`` chooses none or names what there is not. At a forward pass: a token
            is not in the text, or the step cannot be known.
        RuntimeError: At a forward pass: a layer was not called, or with a part of the video only.
    """
    model = text_model(pipe_or_model)
    check_columns(columns)
    for name, value in (("guidance", guidance), ("differentiable", differentiable)):
        if not isinstance(value, bool) and not (name == "guidance" and value is None):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return ColumnCapture(
        model,
        columns,
        layer_chooser(layers, cross_layers(model)),
        as_indices("steps", steps, "indices of denoising steps or None"),
        scheduler_of(pipe_or_model, scheduler),
        guidance=guidance,
        differentiable=differentiable,
        backend=backend,
    )


class LeftEarly(Exception):  # noqa: N818, as it is no error
    """The model was left after the last layer that was wanted; no error."""


class _WatchedPass(ForwardPass):
    """One forward pass of a model, and the column maps that it has given so far.

    Args:
        call: The facts of the call.
        step: The index of the denoising step, if it is known.
        guided: Whether only the second half of the batch is with the prompt.
        wanted: The names of the layers that are captured.
        keeps_graph: Whether the maps are in autograd's graph.
    """

    def __init__(
        self, call: ModelCall, step: int | None, guided: bool, wanted: set[str], keeps_graph: bool
    ) -> None:
        super().__init__()
        self.batch, self.frames = call.sample.shape[0], call.sample.shape[2]
        patch = call.sample.shape[-1] // call.width
        self.grid = (call.sample.shape[-2] // patch, call.width)
        self.step, self.guided, self.wanted, self.keeps_graph = step, guided, wanted, keeps_graph
        self.timestep = timestep_value(call.timestep)
        self.uncalled = set(wanted)
        self.maps: list[ColumnMap] = []

    def end(self) -> None:
        """Lets go of the maps."""
        super().end()
        self.maps = []

    def is_like(self, other: Any) -> bool:
        """Returns whether a layer that is called again attends in the same way in both."""
        return bool(
            (self.batch, self.frames, self.guided, self.wanted, self.keeps_graph)
            == (other.batch, other.frames, other.guided, other.wanted, other.keeps_graph)
        )


class ColumnCapture(SteppedHandle):
    """The maps that :func:`capture_columns` captures: a context manager, with :meth:`remove`.

    Args:
        model: The model.
        columns, layers, steps, guidance, differentiable, backend: See :func:`capture_columns`.
        find_scheduler: See :func:`vstar_kernels.models.schedule.scheduler_of`.
        leaves: Whether to leave the model, by raising :class:`LeftEarly`, as soon as all layers
            that are wanted have given their maps. Such passes are the owner's: within
            :func:`vstar_kernels.models.conditional.conditional_passes`.
    """

    def __init__(
        self,
        model: nn.Module,
        columns: Columns,
        layers: Callable[[CrossLayer], bool],
        steps: Collection[int] | None,
        find_scheduler: FindScheduler,
        *,
        guidance: bool | None,
        differentiable: bool,
        backend: str | None,
        leaves: bool = False,
    ) -> None:
        self._model = model
        self._front_end = find_front_end(model)
        self._chosen = [layer for layer in cross_layers(model) if layers(layer)]
        if not self._chosen:
            raise ValueError("layers chooses none of the cross-attention layers")
        self._columns = columns
        self._steps = ChosenSteps(steps, find_scheduler)
        super().__init__(self._steps.announced)
        self._guidance = guidance
        self._differentiable = differentiable
        self._backend = backend
        self._leaves = leaves
        self._maps: dict[tuple[Any, ...], ColumnMap] = {}
        self._passes: ForwardPasses[_WatchedPass] = ForwardPasses()
        self._hooks = Hooks()
        self._lock = threading.RLock()  # of the maps, and of what is installed
        self._removed = False
        self._replaced: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        try:
            self._install_attentions()
            watch(model, self._passes)
            share_text(model, self)
            self._hooks.before(model, self._begin)
            self._hooks.after(model, self._end)
        except BaseException:
            self.remove()
            raise

    @property
    def maps(self) -> list[ColumnMap]:
        """The maps captured so far, in the order of the layers' first calls.

        Warns where there are none because the model was called at no step that ``steps`` names.
        """
        if not self._maps:
            self._steps.warn_without_maps()
        return list(self._maps.values())

    def mean(
        self,
        *,
        step: int | None = None,
        level: int | None = None,
        place: Place | None = None,
        size: Size = 1,
    ) -> Tensor:
        """Returns the mean of the maps of a step, level and place, each None for all.

        Args:
            step, level, place: Which maps.
            size: To which the maps are brought first: a level's, the coarsest if the model has none
                so coarse; or a height and a width. See :func:`resize_maps`.

        Returns:
            ``(batch, frames, words, height, width)``.

        Raises:
            ValueError: There is none.
        """
        maps = find_maps(self._maps.values(), step=step, level=level, place=place)
        height, width = self.size(maps[0].grid, size)
        return torch.stack([resize_maps(m.map, height, width) for m in maps]).mean(0)

    def size(self, grid: tuple[int, int], size: Size) -> tuple[int, int]:
        """Returns the height and width of a level, or those given."""
        if not isinstance(size, int):
            return size
        coarsest = max(layer.level for layer in cross_layers(self._model))
        return level_size(grid, min(size, coarsest))

    def clear(self) -> None:
        """Forgets the maps captured so far."""
        with self._lock:
            self._maps = {}
            self._steps.forget()

    def remove(self) -> None:
        """Puts the layers' attention back and keeps the maps; nothing happens the second time."""
        super().remove()
        with self._lock:
            put_back(
                self._close,
                self._hooks.remove,
                self._put_attentions_back,
                lambda: unshare_text(self._model, self),
                lambda: unwatch(self._model, self._passes),
            )

    def columns(self, layer: str, query: Tensor, keys: int) -> Tensor | None:
        """Returns the columns for a layer's call, see :class:`ColumnController`.

        Raises:
            ValueError: A token is not among the keys.
            RuntimeError: The layer is called with a part of the video, or a second time.
        """
        forward = self._passes.current()
        if forward is None or self._removed or layer not in forward.wanted:
            return None
        rows, is_running = len(query), forward.ended is None
        if rows != forward.batch * forward.frames or (is_running and layer not in forward.uncalled):
            raise RuntimeError(
                f"{layer} was called with a part of the video (split inference), and "
                "capture_columns cannot put the parts together"
            )
        weights = self._weights(keys)
        if weights.ndim == 3:
            videos = forward.batch // (1 + forward.guided)
            if len(weights) != videos:
                raise ValueError(
                    f"columns are of a batch of {len(weights)}, and the model was called with "
                    f"{videos} videos with a prompt"
                )
            weights = weights.repeat(1 + forward.guided, 1, 1)
            weights = weights.repeat_interleave(forward.frames, dim=0)
        return weights.to(query.device)

    def add(self, layer: str, maps: Tensor) -> None:
        """Keeps the maps of a layer's call until the forward pass has ended well."""
        forward = self._passes.current()
        if forward is None or forward.ended is not None:
            return  # gradient checkpointing, which wants the operations again, not their result
        found = next(item for item in self._chosen if item.name == layer)
        height, width = level_size(forward.grid, found.level)
        if maps.shape[1] != height * width:
            raise RuntimeError(
                f"{layer} was called with {maps.shape[1]} positions, and level {found.level} of "
                f"this sample has {height} × {width}"
            )
        maps = maps.unflatten(0, (forward.batch, forward.frames))
        if forward.guided:
            maps = maps.chunk(2)[1]
        maps = maps.unflatten(2, (height, width)).permute(0, 1, 4, 2, 3)
        if not forward.keeps_graph:
            maps = maps.detach()
        if not self._differentiable:
            maps = maps.cpu()
        forward.uncalled.remove(layer)
        forward.maps.append(
            ColumnMap(
                layer,
                found.level,
                found.place,
                forward.step,
                forward.timestep,
                maps,
                forward.grid,
            )
        )
        if self._leaves and not forward.uncalled:
            self._keep(forward.maps)
            raise LeftEarly

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is None:  # another thread has just taken the hook off
            return
        call = self._front_end.read_call(model, args, kwargs)
        is_ours = self._leaves or not in_conditional_passes()
        step = self._steps.find(model, call.timestep, call.step) if is_ours else None
        wanted = is_ours and self._steps.wants(step)
        in_turns = self._front_end.guides_in_turns
        if in_turns:
            scheduler = self._steps.find_scheduler(self._model)
            branch = self._passes.turns.branch(call.timestep, call.sample, scheduler)
            wanted = wanted and branch == 0
        guided = False
        if wanted:
            self._install_attentions()
            guided = self._is_guided(call.sample) and not in_turns
        names = {layer.name for layer in self._chosen} if wanted else set()
        keeps_graph = self._differentiable and torch.is_grad_enabled()
        self._passes.begin(_WatchedPass(call, step, guided, names, keeps_graph))

    def _end(self, *_: object) -> None:
        forward = self._passes.current()
        if forward is None or forward.is_cut:
            return
        if forward.uncalled:
            raise RuntimeError(
                f"{min(forward.uncalled)} was not called in this forward pass: give "
                "capture_columns layers= that leave it out"
            )
        self._keep(forward.maps)

    def _is_guided(self, sample: Tensor) -> bool:
        if in_conditional_passes():
            return False
        if self._guidance is None:
            return has_equal_halves(sample)
        if self._guidance and len(sample) % 2:
            raise ValueError(f"guidance=True needs an even batch, got {len(sample)}")
        return self._guidance

    def _weights(self, keys: int) -> Tensor:
        """Returns the weights of all keys, of which an image's, after the text's, have none."""
        weights = self._columns
        if not isinstance(weights, Tensor):
            weights = token_weights(weights)
        if weights.shape[-2] > keys:
            raise ValueError(
                f"columns are of {weights.shape[-2]} tokens, and the text that the model was "
                f"called with has {keys}"
            )
        return F.pad(weights, (0, 0, 0, keys - weights.shape[-2]))

    def _keep(self, found: list[ColumnMap]) -> None:
        """Keeps the maps of a forward pass, or takes each into the mean of its kind."""
        with self._lock:
            maps = dict(self._maps)
            for new in found:
                key = (new.layer, new.step, new.timestep)
                if (old := maps.get(key)) is not None:
                    if old.map.shape != new.map.shape:
                        raise ValueError(
                            f"the maps of {new.layer} have been {tuple(old.map.shape)} (batch, "
                            f"frames, words, height, width) and are now {tuple(new.map.shape)}: "
                            "clear() the capture between videos of other sizes"
                        )
                    calls = old.calls + 1
                    mean = old.map + (new.map - old.map) / calls
                    new = replace(new, map=mean, calls=calls)
                maps[key] = new
            self._maps = maps  # all of them, or where something is raised none

    def _install_attentions(self) -> None:
        with self._lock:
            if self._removed:
                return
            for layer in self._chosen:
                found = self._front_end.get_attention(layer.module)
                if isinstance(found, WatchedCrossAttention) and found.controller is self:
                    continue
                if isinstance(found, WatchedCrossAttention) and not self._leaves:
                    raise ValueError(
                        f"{layer.name} is under capture_columns already: remove() that handle first"
                    )
                if reason := self._front_end.why_not_watch(found):
                    raise ValueError(f"{layer.name} cannot be captured: {reason}")
                # Noted before it is done, so that it can be undone at any time.
                self._replaced[layer.module] = found
                ours = self._front_end.watch_cross_attention(self, layer, self._backend)
                self._front_end.set_attention(layer.module, ours)

    def _put_attentions_back(self) -> None:
        for module, previous in list(self._replaced.items()):
            found = self._front_end.get_attention(module)
            if isinstance(found, WatchedCrossAttention) and found.controller is self:
                self._front_end.set_attention(module, previous)

    def _close(self) -> None:
        self._removed = True
        self._passes.close()


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Returns maps of another size: the mean of areas down, bilinear up, each side by itself.

    Args:
        maps: ``(…, height, width)``, any number of dimensions before.
        height, width: Of the result, in cells.
    """
    cells = maps.reshape(maps.shape[:-2].numel(), 1, *maps.shape[-2:])
    smaller = (min(height, maps.shape[-2]), min(width, maps.shape[-1]))
    cells = F.interpolate(cells, smaller, mode="area")
    if smaller != (height, width):
        cells = F.interpolate(cells, (height, width), mode="bilinear", align_corners=False)
    return cells.reshape(*maps.shape[:-2], height, width)


def level_size(grid: tuple[int, int], level: int) -> tuple[int, int]:
    """Returns the height and width of a level's feature maps: each halves them, rounding up."""
    height, width = (-(-side // 2**level) for side in grid)
    return height, width


def token_weights(words: Sequence[Sequence[int]]) -> Tensor:
    """Returns columns in which each word is the mean of its tokens: ``(tokens, words)``."""
    count = max(max(tokens) for tokens in words) + 1
    weights = torch.zeros(count, len(words), dtype=torch.float32)
    for index, tokens in enumerate(words):
        weights[list(tokens), index] = 1 / len(tokens)
    return weights


def check_columns(columns: Any) -> None:
    """Raises TypeError or ValueError unless they are columns for :func:`capture_columns`."""
    if isinstance(columns, Tensor):
        if columns.dtype != torch.float32 or columns.ndim not in (2, 3) or not columns.numel():
            raise ValueError(
                "columns as weights must be torch.float32 (tokens, words) or (batch, tokens, "
                f"words), none of them 0, got {columns.dtype} of shape {tuple(columns.shape)}"
            )
        if not columns.isfinite().all():
            raise ValueError("columns must be finite")
        return
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise TypeError(
            f"columns must be lists of tokens or a tensor of weights, got {type(columns).__name__}"
        )
    if not columns:
        raise ValueError("columns must be of at least one word, got none")
    for index, tokens in enumerate(columns):
        if isinstance(tokens, str) or not isinstance(tokens, Sequence):
            kind = type(tokens).__name__
            raise TypeError(f"columns[{index}] must be a list of tokens, got {kind}")
        if not tokens or len(set(tokens)) != len(tokens):
            raise ValueError(f"columns[{index}] must be tokens, each once, got {list(tokens)}")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"columns[{index}] must be indices of tokens, got {token!r}")


def text_model(pipe_or_model: Any) -> nn.Module:
    """Returns the model with the text; of several in a pipeline the first.

    Raises:
        TypeError, ValueError: There is none, or it is compiled.
    """
    models = models_with_temporal_attention(pipe_or_model)
    for name, model in models.items():
        if type(model).__name__ != "SparseControlNetModel" and cross_layers(model):
            if is_compiled(pipe_or_model, name, model):
                kind = type(model).__name__
                raise ValueError(f"columns of a compiled {kind} cannot be captured")
            return model
    given = ", ".join(type(model).__name__ for model in models.values())
    is_image = "UNetSpatioTemporalConditionModel" in given
    raise ValueError(
        f"{given} has no {NO_TEXT}"
        + (": it is conditioned on an image and has no text" if is_image else "")
    )
