"""ComfyUI: the front end of its video UNets, and TAR around single calls of them.

The UNets are Stable Video Diffusion's, and any UNet into which AnimateDiff-Evolved has injected
motion modules. Nothing of ComfyUI is imported: it hands a :class:`TARWrapper`, which a node adds to
a model, each call of the diffusion model (``WrappersMP.DIFFUSION_MODEL``). Attention is exchanged
for that call alone and put back however it ends, so that branches of a graph, which share one UNet,
do not see each other, and a sampler that fails leaves the model plain.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from vstar_kernels.models.config import TARConfig, check_present
from vstar_kernels.models.hooks import Argument, ModelCall
from vstar_kernels.models.layers import (
    PLAIN,
    CrossLayer,
    Regularization,
    RegularizedAttention,
    TemporalLayer,
    override_map,
)
from vstar_kernels.models.lvdm import LvdmFrontEnd, blocks_by_level
from vstar_kernels.models.replaced_forward import TARForward
from vstar_kernels.models.schedule import StepGate

LOGGER = logging.getLogger(__name__)
_SVD_LAYER = re.compile(r"(?:.*\.)?time_stack\.\d+\.attn1")  # attn2 attends to the image
_MOTION_ATTENTION = "VersatileAttention"  # of AnimateDiff-Evolved
# A sigma between two steps is of the first of them, but in the last quarter of the way, in
# logarithms, of the second: some samplers add noise before a step, and others round its sigma.
_BEFORE = 0.25


class ComfyTARForward(TARForward):
    """The ``forward`` of a temporal ``CrossAttention`` of Stable Video Diffusion, regularized.

    It takes and returns ``(rows, frames, channels)``, rows being batch × height × width.

    Attributes:
        is_called: Whether it has been called.
    """

    def __init__(self, module: nn.Module, *, backend: str | None = None) -> None:
        super().__init__(module, backend=backend)
        self.is_called = False

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        transformer_options: Any = None,
        **unknown: Any,
    ) -> Tensor:
        """Attends over the frames of each row, projections included.

        ``context`` and ``value`` are what others' patches (``attn1_patch``) have made of ``x``.

        Raises:
            ValueError: The call asks for more than temporal self-attention.
        """
        self.is_called = True
        change = self.regularization()
        if change.stock:
            more = (
                {} if transformer_options is None else {"transformer_options": transformer_options}
            )
            return self.previous(x, context=context, value=value, mask=mask, **more, **unknown)
        module: Any = self.module
        context = x if context is None else context
        value = context if value is None else value
        _refuse(module, mask, unknown)
        if context.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"TAR in {type(module).__name__} does not support cross-attention, from "
                f"{tuple(x.shape)} to a context of {tuple(context.shape)}"
            )
        query, key, values = module.to_q(x), module.to_k(context), module.to_v(value)
        return module.to_out(_attend(self, query, key, values, module.heads, change))


class ComfyTARFunction(RegularizedAttention):
    """The ``actual_attention`` of an AnimateDiff-Evolved motion module, regularized.

    Its projections, the scale of its keys and its positions stay the module's own. It takes and
    returns ``(rows, frames, channels)``.
    """

    def __init__(self, module: nn.Module, *, backend: str | None = None) -> None:
        super().__init__(backend=backend)
        self.module = module

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Attends over the frames of each row.

        Raises:
            ValueError: The call asks for more than temporal self-attention.
        """
        change = self.regularization()
        if change.stock:
            return self.previous(query, key, value, heads, mask, **unknown)
        _refuse(self.module, mask, unknown)
        return _attend(self, query, key, value, heads, change)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies what was there before, as nothing controls the copy of a model under TAR."""
        return _same, (self.previous,)


def _same(value: Any) -> Any:
    return value


def _refuse(module: Any, mask: Tensor | None, unknown: dict[str, Any]) -> None:
    reasons = [] if mask is None else [f"a mask, got shape {tuple(mask.shape)}"]
    reasons += [f"the arguments {', '.join(unknown)}"] if unknown else []
    if reasons:
        raise ValueError(f"TAR in {type(module).__name__} does not support {'; '.join(reasons)}")


def _attend(
    attention: RegularizedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    change: Regularization,
) -> Tensor:
    """Attends over frames between the projections; all ``(rows, frames, channels)``."""
    if change.override is not None:
        return override_map(value, change.override)
    q, k, v = (projected.unflatten(-1, (heads, -1)) for projected in (query, key, value))
    return attention.operate(q, k, v, change, q.shape[-1] ** -0.5).flatten(-2)


class ComfyFrontEnd(LvdmFrontEnd):
    """TAR in ComfyUI's ``UNetModel``: Stable Video Diffusion, and AnimateDiff-Evolved's modules."""

    guides_in_turns = False
    models = (
        "UNetModel of ComfyUI (Stable Video Diffusion, or with motion modules that "
        "AnimateDiff-Evolved has injected)"
    )

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the temporal self-attention modules in the model's order."""
        for block_name, level, place, block in blocks_by_level(model):
            for name, module in block.named_modules(prefix=block_name):
                is_svd = _SVD_LAYER.fullmatch(name) is not None
                if is_svd or (_is_motion(module) and not module.is_cross_attention):
                    yield TemporalLayer(name, level, place, module)

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields nothing: column maps are not captured in ComfyUI."""
        yield from ()

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call, whose sample is ``(videos, frames, channels, h, w)``."""
        rows = Argument(model, 0).get(args, kwargs)
        sampling = Sampling.of_call(model, args, kwargs)
        frames = kwargs.get("num_video_frames") or len(rows) // max(1, len(sampling.sides))
        sample = rows.unflatten(0, (-1, frames))
        timestep = Argument(model, 1).get(args, kwargs)
        branch = min(sampling.sides, default=0)  # 1 where no part of the batch is with the prompt
        return ModelCall(sample, timestep, rows.shape[-1], sampling.step, branch)

    def get_attention(self, module: nn.Module) -> Any:
        """Returns a motion module's attention function, and the forward of other modules."""
        return module.actual_attention if _is_motion(module) else module.forward

    def logit_factors(
        self, module: nn.Module, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Returns queries, keys and the scale; a motion module's own ``scale`` is of its keys."""
        return query, key, float(query.shape[-1] ** -0.5)

    def set_attention(self, module: nn.Module, attention: Any) -> None:
        """Gives a module what :meth:`get_attention` returned, or ours."""
        if _is_motion(module):
            module.actual_attention = attention
        else:
            super().set_attention(module, attention)

    def make_attention(self, module: nn.Module, backend: str | None) -> Any:
        """Makes what computes the module's attention, plain until it is given a bias."""
        made = ComfyTARFunction if _is_motion(module) else ComfyTARForward
        return made(module, backend=backend)

    def why_not_replace(self, attention: Any) -> str | None:
        """Returns why what a module has cannot make way for TAR, or None."""
        owner = getattr(attention, "__self__", None)
        is_own_forward = owner is not None and attention.__func__ is type(owner).forward
        # ComfyUI's functions, of which motion modules have one: all compute plain attention.
        is_function = getattr(attention, "__name__", "").startswith("attention_")
        if is_own_forward or is_function or isinstance(attention, RegularizedAttention):
            return None
        return f"its attention is {attention!r}, which TAR would replace"


def layers_of(front_end: ComfyFrontEnd, model: nn.Module) -> list[TemporalLayer]:
    """Returns the temporal attention layers of a diffusion model.

    Raises:
        ValueError: There are none.
    """
    layers = list(front_end.layers(model))
    if not layers:
        raise ValueError(
            f"VSTAR finds no temporal attention in this {type(model).__name__}: TAR and its maps "
            "are for Stable Video Diffusion and for models to which AnimateDiff-Evolved has "
            "applied a motion module; Wan, HunyuanVideo and LTX take VSTAR Apply Frame Rule"
        )
    return layers


def _is_motion(module: nn.Module) -> bool:
    return type(module).__name__ == _MOTION_ATTENTION


@dataclass(frozen=True)
class Sampling:
    """Where in a run of a sampler a call of a diffusion model is.

    Attributes:
        sigmas: Of the steps that the sampler runs, without the last, which is no step.
        sigma: Of the call; None where it is not known.
        sides: The side of guidance of each part of the batch: 0 with the prompt, 1 without.
        in_window: Whether the call is of some of the video's frames (context windows).
    """

    sigmas: tuple[float, ...]
    sigma: float | None
    sides: tuple[int, ...]
    in_window: bool

    @classmethod
    def of_call(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Sampling:
        """Reads a call of the diffusion model, of whatever class."""
        options = Argument(model, "transformer_options").get(args, kwargs) or {}
        sigmas = options.get("sample_sigmas")
        sigma = options.get("sigmas")
        windows = (options.get("ad_params") or {}).get("sub_idxs")
        return cls(
            () if sigmas is None else tuple(sigmas[:-1].tolist()),
            None if sigma is None else float(sigma.flatten()[0]),
            tuple(options.get("cond_or_uncond") or ()),
            windows is not None or options.get("context_window") is not None,
        )

    @property
    def step(self) -> int | None:
        """The index of the step among those that the sampler runs; None where it is not known.

        It is never counted: samplers call the model several times in a step. At a sigma between
        two, where solvers of second and third order do so, the step is the one that has begun;
        shortly before a step's own sigma it is that step. A solver's second call that is at the
        next step's sigma, as Heun's and those of ancestral ones at eta 1, is taken for the next.
        """
        if not self.sigmas or self.sigma is None:
            return None
        here, *places = (math.log(max(x, 1e-12)) for x in (self.sigma, *self.sigmas))
        for step, (this, following) in enumerate(pairwise(places)):
            if here > following + _BEFORE * (this - following):
                return step
        return len(places) - 1


class ComfyGate:
    """Says at which steps of a sampler attention is regularized.

    Args:
        steps: As of a :class:`TARConfig`; a share is of the steps that the sampler runs.
        start: The share of those steps before the first one that is regularized.
        what: What regularizes, and counts the frames of each context window from 0, for the log;
            None where it counts those of the whole video.

    Raises:
        ValueError: ``start`` is not in [0, 1).
    """

    def __init__(self, steps: Any, start: float, what: str | None) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), the share of steps before it, got {start}")
        self._start = start
        self._steps = steps
        self._what = what
        self._has_told_of_windows = False

    def is_on(self, model: nn.Module, sampling: Sampling) -> bool:
        """Returns whether the step of a call is regularized; once logs what windows mean for it.

        Raises:
            ValueError: It cannot be known, or no step of the sampler is regularized.
        """
        if not self._is_on(model, sampling):
            return False
        if sampling.in_window and self._what and not self._has_told_of_windows:
            self._has_told_of_windows = True
            LOGGER.info(
                "VSTAR: the frames of %s are counted within each context window", self._what
            )
        return True

    def _is_on(self, model: nn.Module, sampling: Sampling) -> bool:
        if self._steps is None and self._start == 0:
            return True
        step, count = sampling.step, len(sampling.sigmas)
        if step is None:
            raise ValueError(
                "the sampler does not say at which step it is (transformer_options has no "
                "sample_sigmas): regularize all steps, start 0 and end 1"
            )
        gate = StepGate(self._steps, lambda _: SimpleNamespace(timesteps=list(range(count))))
        first = round(self._start * count, 6)  # 0.56 × 25 is a little more than 14

        def is_regularized(index: int) -> bool:
            return index >= first and gate.is_on(model, sampling.sigmas[index], index)

        if not any(map(is_regularized, range(count))):
            raise ValueError(
                f"VSTAR is off at each of the {count} steps that this sampler runs, from the share "
                f"{self._start:g} of them on with steps={self._steps!r}: let it start earlier or "
                "end later"
            )
        return is_regularized(step)


class TARWrapper:
    """TAR around the calls of a diffusion model, for ``ModelPatcher.add_wrapper_with_key``.

    Args:
        config: What to do; a share of steps is of those that the sampler runs.
        start: The share of steps before the first one that is regularized.
        backend: As for :func:`vstar_kernels.tar_attention`.

    Raises:
        ValueError: An argument is wrong.
    """

    def __init__(
        self, config: TARConfig, *, start: float = 0.0, backend: str | None = None
    ) -> None:
        self.config = config
        self._gate = ComfyGate(config.steps, start, "TAR")
        self._backend = backend
        self._front_end = ComfyFrontEnd()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, regularized where it is to be.

        Raises:
            ValueError: There is no temporal attention, or none at a level or width that is named;
                the step cannot be known, or TAR is off at each of them.
            RuntimeError: A layer was not called, but something in its place.
        """
        model = executor.class_obj
        sampling = Sampling.of_call(model, args, kwargs)
        if not self._gate.is_on(model, sampling):
            return executor(*args, **kwargs)
        width = Argument(model, 0).get(args, kwargs).shape[-1]
        with exchanged(self._front_end, self._attentions(model, width)) as attentions:
            out = executor(*args, **kwargs)
        for attention in attentions:
            if isinstance(attention, ComfyTARForward) and not attention.is_called:
                raise RuntimeError(
                    f"{attention.layer} was not called: a patch of attn1 in its block (perturbed "
                    "attention guidance, for one) computes it, and TAR cannot be part of that"
                )
        return out

    def _attentions(self, model: nn.Module, width: int) -> list[tuple[nn.Module, Any]]:
        """Returns the modules that are to be regularized, and what is to compute them."""
        layers = layers_of(self._front_end, model)
        config, wanted = self.config, self.config.regularizations
        keys = {layer.name: config.key_of(layer, width) for layer in layers}
        present = {key for key in keys.values() if key is not None}
        check_present(wanted, present, config.key, "temporal attention")
        changed: list[tuple[nn.Module, Any]] = []
        for layer in layers:
            change = wanted.get(keys[layer.name], PLAIN)  # type: ignore[arg-type]
            if change is PLAIN:
                continue
            found = self._front_end.get_attention(layer.module)
            if reason := self._front_end.why_not_replace(found):
                raise ValueError(f"{layer.name} cannot be regularized: {reason}")
            attention = self._front_end.make_attention(layer.module, self._backend)
            attention.bias, attention.override = change.bias, change.override
            attention.layer, attention.previous = layer.name, found
            changed.append((layer.module, attention))
        return changed


@contextmanager
def exchanged(
    front_end: ComfyFrontEnd, attentions: list[tuple[nn.Module, Any]]
) -> Iterator[list[Any]]:
    """Gives modules their attentions, and in the end what they had, whatever is raised."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, attention in attentions:
            before.append((module, front_end.get_attention(module)))
            front_end.set_attention(module, attention)
        yield [attention for _, attention in attentions]
    finally:
        for module, attention in reversed(before):
            front_end.set_attention(module, attention)
