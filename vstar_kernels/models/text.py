"""A text that several frames share is projected once for them, not once for each.

diffusers' video models repeat a text for each frame, and every cross-attention projects all copies.
While a handle of this package is on such a model, it knows which rows of the text are equal: those
of a video's frames, or with frame prompts those of neighbouring frames that have the same one. A
projection to keys or values is then given each of them once, and its result repeated, without a
copy where it is one for all. That needs no processor of ours: those of the model, LoRA layers and
IP adapters call the same projections.

Where it is not known that rows are equal, nothing changes: in compiled code; where the ``forward``
of the model is not diffusers' own; where others have put another text in the place of the model's,
or normalised it; in fused projections; where a projection drops out at random, or is called with
more than the text; and for texts of few tokens, of which a product saves nothing and may round
otherwise.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import cross_layers, find_front_end
from vstar_kernels.models.hooks import Argument, Hooks, put_back, take_off

# Whose forward repeats the text of each video for its frames, and calls the blocks with it.
REPEATING = ("UNet3DConditionModel", "I2VGenXLUNet", "LatteTransformer3DModel")
FEWEST_ROWS = 64  # of a product; those of fewer are computed by routines of their own
_RUNS, _GIVEN_ONCE = "_vstar_kernels_runs", "_vstar_kernels_given_once"


@dataclass(frozen=True)
class _Runs:
    """How many neighbouring rows of a text are equal each time, as long as nobody changes it."""

    lengths: tuple[int, ...]
    version: int


def mark_equal_rows(text: Tensor, lengths: Iterable[int]) -> None:
    """Notes at a text ``(rows, tokens, channels)`` that its rows are equal in runs of such lengths.

    Not at one of ``torch.inference_mode``, at which nobody could see that it has been changed.

    Args:
        text: The tensor object that the blocks of the model will be given.
        lengths: The numbers of neighbouring rows that are equal, in order; they add up to the rows.
    """
    runs = tuple(lengths)
    if torch.compiler.is_compiling():
        return
    assert sum(runs) == len(text)
    version = _version(text)
    if version is None:
        return
    if len(runs) < len(text) and len(runs) * text.shape[1] >= FEWEST_ROWS:
        setattr(text, _RUNS, _Runs(runs, version))


def equal_rows(text: Tensor) -> tuple[int, ...]:
    """Returns the lengths of the runs in which a text's rows are known to be equal."""
    runs: _Runs | None = getattr(text, _RUNS, None)
    is_known = runs is not None and runs.version == _version(text)
    return runs.lengths if runs is not None and is_known else (1,) * len(text)


class EqualFrames:
    """Which neighbouring frames have equal embeddings, as long as nobody changes those in place.

    Args:
        embeddings: ``([batch,] frames, tokens, channels)``, or None.
    """

    def __init__(self, embeddings: Tensor | None) -> None:
        self._embeddings = embeddings
        self._videos: list[list[int]] = []
        if embeddings is None or embeddings.is_meta:
            return
        self._version = _version(embeddings)
        videos = embeddings.detach()
        videos = videos if videos.ndim == 4 else videos[None]
        changes = (videos[:, 1:] != videos[:, :-1]).flatten(2).any(-1)
        for starts in changes.tolist():  # the one synchronisation of a handle
            ends = [*(frame + 1 for frame, is_new in enumerate(starts) if is_new), len(starts) + 1]
            self._videos.append([b - a for a, b in itertools.pairwise([0, *ends])])

    def rows(self, videos_per_prompt: int) -> list[int]:
        """Returns the lengths of the runs of equal frames of all videos, one after the other."""
        embeddings = self._embeddings
        if embeddings is None:
            return []
        frames, prompts = embeddings.shape[-3], embeddings.shape[:-3].numel()
        version = _version(embeddings)
        if not self._videos or version is None or version != self._version:
            return [1] * (frames * prompts * videos_per_prompt)
        return [length for video in self._videos for length in video * videos_per_prompt]


def text_blocks(model: Any) -> list[nn.Module]:
    """Returns the blocks whose ``encoder_hidden_states`` are the text of each frame."""
    return find_front_end(model).text_blocks(model)


def share_text(model: nn.Module, owner: object) -> None:
    """Has a model project equal texts once until :func:`unshare_text`, for one of its handles."""
    if _forward_class(model) is None and not _takes_marks(model):
        return
    with _LOCK:
        sharing = _find(model) or _begin_sharing(model)
        sharing.owners.add(id(owner))


def _begin_sharing(model: nn.Module) -> _Sharing:
    sharing = _Sharing(model)
    try:
        sharing.install()
    except BaseException:
        sharing.remove()
        raise
    return sharing


def unshare_text(model: nn.Module, owner: object) -> None:
    """Undoes :func:`share_text` for a handle; nothing happens the second time."""
    with _LOCK:
        sharing = _find(model)
        if sharing is not None:
            sharing.owners.discard(id(owner))
            if not sharing.owners:
                sharing.remove()


def _find(model: nn.Module) -> _Sharing | None:
    """Returns what has a model project equal texts once, if anything has."""
    hooks = (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Hook))
    owners = (getattr(hook.call, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, _Sharing)), None)


class _TextPass(ForwardPass):
    """One forward pass of a model that repeats its texts.

    Args:
        finish: Is called at its end. Nothing else may hold what that belongs to.
        rows: batch · frames; 0 where it is not known that the model repeats the texts.
        frames: For how many rows each text is repeated.
    """

    def __init__(self, finish: Callable[[], None], rows: int, frames: int) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish
        self.rows, self.frames = rows, frames

    def end(self) -> None:
        """Ends it; what is removed goes with the last that runs."""
        super().end()
        finish, self._finish = self._finish, None  # or what is known of it would keep the model
        if finish is not None:
            finish()


class _Sharing:
    """The hooks of one model.

    Those on the projections belong together. Where another thread runs the model while they are
    removed, those that come after a projection are left until it has ended.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners: set[int] = set()
        self._model = model
        self._sample = Argument(model, 0)
        self._passes: ForwardPasses[_TextPass] = ForwardPasses()
        self._before, self._after = Hooks(), Hooks()
        self._removed = False

    def install(self) -> None:
        """Puts the hooks in."""
        model, blocks = self._model, text_blocks(self._model)
        for module in (model, *blocks):
            take_off(module, lambda hook: isinstance(hook, _Hook) and hook.call is None)
        watch(model, self._passes)
        self._before.before(model, _Hook(self._begin))
        for block in blocks:
            mark = _Marking(self._passes, Argument(block, "encoder_hidden_states"))
            # Before what others put in the place of the model's text.
            self._before.before(block, _Hook(mark), first=True)
        for layer in cross_layers(model):
            for project in (layer.module.to_k, layer.module.to_v):
                take_off(project, lambda hook: hook in (_give_once, _repeat))  # that were copied
                self._after.after(project, _repeat)
                self._before.before(project, _give_once)

    def remove(self) -> None:
        """Takes the hooks off, in the end."""
        self._removed = True
        put_back(
            self._before.remove,
            self._passes.close,
            self.finish,
            lambda: unwatch(self._model, self._passes),
        )

    def finish(self) -> None:
        """Takes the last hooks off once they are removed and nothing runs."""
        if self._removed and not self._passes.are_running:
            self._after.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, rows, frames = self._sample.get(args, kwargs), 0, 1
        if isinstance(sample, Tensor) and sample.ndim == 5 and _forward_class(model) is not None:
            frames = sample.shape[2]
            rows = sample.shape[0] * frames
        self._passes.begin(_TextPass(self.finish, rows, frames))


class _Marking:
    """What runs before a block: notes that the text which the model gives it is repeated."""

    def __init__(self, passes: ForwardPasses[_TextPass], argument: Argument) -> None:
        self._passes, self._argument = passes, argument

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._passes.running()
        text = self._argument.get(args, kwargs)
        text = text[0] if isinstance(text, tuple) else text  # and the images of IP adapters
        if forward is None or not isinstance(text, Tensor) or hasattr(text, _RUNS):
            return
        if forward.rows and len(text) == forward.rows and text.ndim == 3:
            mark_equal_rows(text, [forward.frames] * (forward.rows // forward.frames))


class _Hook:
    """A hook that is not traced, and does nothing in a copy of the model."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # Without kwargs where another thread has just taken the hook off.
        if self.call is not None and kwargs is not None and not torch.compiler.is_compiling():
            self.call(module, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Hook, (None,)


def _give_once(
    project: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Runs before a projection: gives it the distinct rows of a text."""
    if kwargs is None or kwargs or len(args) != 1 or torch.compiler.is_compiling():
        return None
    if not hasattr(args[0], _RUNS):
        return None
    lengths = equal_rows(args[0])
    if len(lengths) == len(args[0]) or _drops_out(project):
        return None
    once = _distinct(args[0], lengths)
    setattr(once, _GIVEN_ONCE, lengths)
    return (once,), kwargs


def _repeat(
    project: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    output: Any = None,
) -> Tensor | None:
    """Runs after a projection: repeats its rows if it was given the distinct ones."""
    if torch.compiler.is_compiling() or not args:
        return None
    lengths = getattr(args[0], _GIVEN_ONCE, None)
    if lengths is None:
        return None
    # Another thread that has just taken the hook off has it called without kwargs.
    return _repeated(kwargs if output is None else output, lengths)


def _distinct(text: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the first row of each run."""
    if len(set(lengths)) == 1:
        return text[:: lengths[0]]
    starts = itertools.accumulate(lengths[:-1], initial=0)
    return torch.cat([text[start : start + 1] for start in starts])


def _repeated(rows: Any, lengths: Sequence[int]) -> Tensor:
    """Returns each row as often as its run is long; a view where there is one run."""
    if len(set(lengths)) == 1:
        return rows.unsqueeze(1).expand(-1, lengths[0], -1, -1).flatten(0, 1)
    pairs = zip(rows.split(1), lengths, strict=True)
    return torch.cat([row.expand(length, -1, -1) for row, length in pairs])


def _version(tensor: Tensor) -> int | None:
    """Returns how often a tensor was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _drops_out(project: nn.Module) -> bool:
    """Returns whether a projection, such as one with a LoRA, treats equal rows differently."""
    return any(
        isinstance(module, nn.Dropout) and module.training and module.p > 0
        for module in project.modules()
    )


def _forward_class(model: nn.Module) -> type | None:
    """Returns the class of diffusers whose forward a model runs, if it repeats the texts."""
    is_offloaded = hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook")
    if "forward" in vars(model) and not is_offloaded:
        return None
    found = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    is_known = found.__name__ in REPEATING and found.__module__.startswith("diffusers.")
    return found if is_known else None


def _takes_marks(model: nn.Module) -> bool:
    """Returns whether frame prompts, which know their own rows, are all that is known to repeat."""
    return type(model).__name__ == "UNetMotionModel"


_LOCK = threading.RLock()  # of which models have hooks
