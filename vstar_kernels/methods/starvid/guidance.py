"""``guide_latents``: while a pipeline samples, its latents are drawn towards a plan.

Two places of the pipeline are used. The scheduler is given the latents before every evaluation of
the model, and notes them (scheduler.py). The model is then called with all that it needs, the text
among it: a hook before that call updates the latents, by gradients of forward passes of its own,
and hands the new ones to the model; the scheduler's ``step`` gets the same in the place of the old
ones. So no pipeline has to be known, nor what else its model takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vstar_kernels.methods.gradients import checkpointed, exclusive, frozen
from vstar_kernels.methods.starvid.config import GuidanceConfig
from vstar_kernels.methods.starvid.losses import mass_inside, spatial_loss, syntax_loss
from vstar_kernels.methods.starvid.running import PipelineRun, running_call
from vstar_kernels.methods.starvid.scheduler import GuidedScheduler, Noted
from vstar_kernels.methods.starvid.trajectory import Trajectory
from vstar_kernels.methods.starvid.words import PlanTargets, PlanWords, plan_targets, plan_words
from vstar_kernels.models.columns import ColumnCapture, LeftEarly, text_model, token_weights
from vstar_kernels.models.conditional import (
    conditional_passes,
    has_equal_halves,
    in_conditional_passes,
)
from vstar_kernels.models.front_end import cross_layers
from vstar_kernels.models.hooks import Argument, Handle, Hooks, put_back
from vstar_kernels.models.layers import CrossLayer
from vstar_kernels.models.text import share_text, unshare_text
from vstar_kernels.reading import shorten

# By which the loss is multiplied in float16, whose smallest numbers gradients would fall below.
LOSS_SCALE = 2.0**10


@dataclass(frozen=True)
class GuidanceUpdate:
    """One update of the latents, and the losses before it, of all videos the mean.

    Attributes:
        step: The index of the denoising step.
        update: Which one in the step, from 0.
        total: What is minimised.
        spatial, syntax: The two losses, without their weights; None where one is not in use.
        mass: Which share of the nouns' maps lies in their boxes, of 1.
        applied: Whether the latents were updated: not where the loss was below ``stop_below``.
    """

    step: int
    update: int
    total: float
    spatial: float | None
    syntax: float | None
    mass: float
    applied: bool


def guide_latents(
    pipe: Any,
    plan: Trajectory | Sequence[Trajectory],
    config: GuidanceConfig | None = None,
    *,
    texts: Sequence[str] | None = None,
    guidance: bool | None = None,
    checkpointing: bool = True,
    backend: str | None = None,
) -> GuidanceHandle:
    """Draws the latents towards a plan while a pipeline samples (StarVid, arXiv 2409.15259).

    >>> plan = vk.Trajectory.load("plan.json")
    >>> with vk.guide_latents(pipe, plan) as guided:
    ...     video = pipe(plan.prompt, num_frames=16).frames
    >>> guided.updates[-1].mass  # the share of the nouns' attention that is in their boxes

    In some steps z ← z − η_t ∇_z(λ₁ · spatial loss + λ₂ · syntax loss), a few times, before the
    model evaluates z. Only the half with the prompt runs for it, with the model's parameters
    frozen, up to the last layer whose maps are used. ``apply_tar`` and ``condition_frames`` may be
    on beside it. It works in any pipeline with a text and a scheduler of diffusers; the gradient is
    taken in what the model is given (z scaled by the scheduler), so that η means the same for each.

    A scheduler that evaluates the model several times in a step (Heun, KDPM2, DPM-Solver
    singlestep, PNDM's first steps) goes on from the latents of the first evaluation: that one is
    guided. UniPC and SA-Solver leave out their correction of latents that have been updated.

    Args:
        pipe: A pipeline of diffusers with a tokenizer, a scheduler and one model with a text.
        plan: The plan; or one for each prompt of the call.
        config: When and how; None is ``GuidanceConfig()``.
        texts: What the frames are conditioned on, where :func:`condition_frames` replaces the
            prompt: all words must have the same tokens in each.
        guidance: Whether the first half of the model's batch is without the prompt. None: where
            both halves have the same latents.
        checkpointing: Compute each block of the model again in the backward pass, to save memory.
        backend: As for :func:`vstar_kernels.column_attention`.

    Returns:
        A handle: a context manager, with ``remove()``, after which the pipeline is as it was.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A word of the plan is not in its prompt, no subject has a verb while the syntax
            loss has a weight, the model has no text, is compiled or has IP adapters, or the
            pipeline is guided already. While sampling: no step would be guided, the batch does not
            fit the plans or ``guidance``, or a prompt has not its plan's words at their tokens.
        FloatingPointError: While sampling: a loss or its gradient is not finite.
        RuntimeError: While sampling: the pipeline's scheduler has been replaced, or it is under
            ``torch.inference_mode()``.
    """
    config = GuidanceConfig() if config is None else config
    if not isinstance(config, GuidanceConfig):
        raise TypeError(f"config must be a GuidanceConfig, got {type(config).__name__}")
    plans = [plan] if isinstance(plan, Trajectory) else plan
    if isinstance(plans, str) or not isinstance(plans, Sequence):
        raise TypeError(f"plan must be a Trajectory or a list of them, got {type(plan).__name__}")
    for one in plans:
        if not isinstance(one, Trajectory):
            raise TypeError(f"plan must be of Trajectories, got {type(one).__name__}")
    if not plans:
        raise ValueError("plan must hold at least one Trajectory, got none")
    for name, value in (("guidance", guidance), ("checkpointing", checkpointing)):
        if not isinstance(value, bool) and not (name == "guidance" and value is None):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    scheduler, tokenizer = getattr(pipe, "scheduler", None), getattr(pipe, "tokenizer", None)
    if scheduler is None or tokenizer is None or isinstance(pipe, nn.Module):
        raise TypeError(
            "pipe must be a pipeline of diffusers with a tokenizer and a scheduler, got "
            f"{type(pipe).__name__}"
        )
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got str")
    encoded = _as_encoded(pipe)
    words = [
        plan_words(tokenizer, one, [encoded(x) for x in ([one.prompt] if texts is None else texts)])
        for one in plans
    ]
    if config.lambdas[1] > 0 and config.syntax is not None:
        for one, found in zip(plans, words, strict=True):
            if not found.pairs:
                raise ValueError(
                    f"plan: no subject of {one.prompt!r} has a verb, and the syntax loss has the "
                    f"weight {config.lambdas[1]:g}: give a verb, or lambdas=(1, 0)"
                )
    return GuidanceHandle(
        text_model(pipe),
        scheduler,
        list(plans),
        words,
        config,
        # Where the frames have other texts, the pipeline's prompt is not what they attend to.
        find_words=(
            None if texts else lambda one, text: plan_words(tokenizer, one, [encoded(text)])
        ),
        guidance=guidance,
        checkpointing=checkpointing,
        backend=backend,
    )


class _Batch(NamedTuple):
    """What guidance makes of one call of the model.

    Attributes:
        rows: The batch size of the call.
        guided: Whether its first half is without the prompt.
        frames: The number of frames.
        videos_per_plan: Of how many videos a plan is.
    """

    rows: int
    guided: bool
    frames: int
    videos_per_plan: int

    def conditional(self, value: Any) -> Any:
        """Returns the half with the prompt of an argument of the model, whatever it is."""
        if not self.guided:
            return value
        if isinstance(value, Tensor):
            is_batch = value.ndim and value.shape[0] in (self.rows, self.rows * self.frames)
            return value.chunk(2)[1] if is_batch else value
        if isinstance(value, Mapping):
            return {name: self.conditional(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.conditional(item) for item in value)
        return value


class GuidanceHandle(Handle):
    """Guidance of a pipeline's latents: a context manager, with :meth:`remove`.

    Attributes:
        config: The configuration.
        plans: The plans.
        words: The words of each, in the order of the maps.
        updates: All updates so far, in their order; with ``applied=False`` also the losses at which
            a step has stopped, see :attr:`GuidanceConfig.stop_below`.
        maps: By step the words' maps of the step's last record in ``updates``, on the CPU: for each
            video ``(frames, words, height, width)``.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        plans: list[Trajectory],
        words: list[PlanWords],
        config: GuidanceConfig,
        *,
        find_words: Callable[[Trajectory, str], PlanWords] | None = None,
        guidance: bool | None,
        checkpointing: bool,
        backend: str | None,
    ) -> None:
        self.config, self.plans, self.words = config, plans, words
        self.updates: list[GuidanceUpdate] = []
        self.maps: dict[int, list[Tensor]] = {}
        self._model = model
        self._guidance, self._checkpointing, self._backend = guidance, checkpointing, backend
        self._layers = _layers(model, config)
        self._find_words = find_words
        self._sample = Argument(model, 0)
        self._text = Argument(model, "encoder_hidden_states")
        self._targets: dict[tuple[int, int, int, int], PlanTargets] = {}
        self._checked: set[tuple[int, str]] = set()  # prompts, by the plan's number
        self._hooks = Hooks()
        # Finds out now what cannot be captured, and not after the text has been encoded.
        self._capture(_weights(words, 1)).remove()
        self._scheduler = GuidedScheduler(scheduler)
        try:
            self._scheduler.install()
            self._hooks.before(model, self._before)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the hooks off the pipeline; nothing happens the second time.

        While it runs: what a step has updated by then it steps from, and an update that is not
        finished raises a RuntimeError there.
        """
        super().remove()
        put_back(self._hooks.remove, self._scheduler.remove)

    def clear(self) -> None:
        """Forgets the updates and maps so far."""
        self.updates, self.maps = [], {}

    # What the model is called with.

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None or in_conditional_passes() or self._scheduler.is_removed:
            return None
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "guide_latents takes gradients, which torch.inference_mode() forbids: sample "
                "without it, as pipelines are under torch.no_grad() by themselves"
            )
        noted = self._scheduler.noted
        if noted is None:
            raise RuntimeError(
                f"this {type(model).__name__} is under guide_latents, and was called without the "
                "scheduler's scale_model_input: has the pipeline another scheduler now?"
            )
        step = self._scheduler.find_step(noted.timestep)
        weights = self.config.weights(step, self._scheduler.num_steps)
        self._check_reach(step)
        if not any(weights) or self._scheduler.goes_on:
            return None
        sample = self._sample.get(args, kwargs)
        channels = noted.scaled.shape[1]
        if not torch.equal(sample[:, :channels], noted.scaled):
            raise RuntimeError(
                "the model was called with other latents than the scheduler has scaled: "
                "guide_latents cannot tell what to make of them"
            )
        pipeline = running_call(model)
        batch = self._fit(sample, sample[:, :channels], pipeline)
        self._check_text(batch, batch.conditional(self._text.get(args, kwargs)), pipeline)
        with exclusive(self._model), conditional_passes(), self._text_once():
            moved = self._descend(args, kwargs, sample, noted, batch, step, weights)
        latents = noted.latents.chunk(2)[1] if batch.guided else noted.latents
        updated = (latents.float() + moved / self._scheduler.factor(noted)).to(latents.dtype)
        self._scheduler.replace(latents, updated)
        scaled = self._scheduler.scale(torch.cat([updated] * (1 + batch.guided)), noted.timestep)
        scaled = torch.cat([scaled, sample[:, channels:]], dim=1)
        return self._sample.replace(args, kwargs, scaled)

    @contextmanager
    def _text_once(self) -> Iterator[None]:
        """Has our own forward passes project a text that frames share once for all of them."""
        share_text(self._model, self)
        try:
            yield
        finally:
            unshare_text(self._model, self)

    def _descend(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sample: Tensor,
        noted: Noted,
        batch: _Batch,
        step: int,
        weights: tuple[float, float],
    ) -> Tensor:
        """Returns by how much the updates of a step move the model's scaled latents, float32."""
        args, kwargs = batch.conditional(args), batch.conditional(kwargs)
        sample = batch.conditional(sample)
        channels = noted.scaled.shape[1]
        start, more = sample[:, :channels].float(), sample[:, channels:]
        columns = _weights(self.words, batch.videos_per_plan)
        moved = torch.zeros_like(start)
        rate = self.config.step_size * self._scheduler.decay(self.config.decay, noted, step)
        scale = LOSS_SCALE if sample.dtype == torch.float16 else 1.0
        for update in range(self.config.updates):
            with torch.enable_grad(), frozen(self._model), ExitStack() as stack:
                leaf = (start + moved).requires_grad_()
                capture = stack.enter_context(self._capture(columns))
                if self._checkpointing:
                    stack.enter_context(checkpointed(self._model))
                given = torch.cat([leaf.to(sample.dtype), more], dim=1)
                call_args, call_kwargs = self._sample.replace(args, kwargs, given)
                with suppress(LeftEarly):
                    self._model(*call_args, **call_kwargs)
                maps = capture.mean(size=self.config.size)
                loss, found = self._loss(maps, batch, step, update, weights)
                gradient = None
                if found.applied:
                    (gradient,) = torch.autograd.grad(scale * loss, leaf)
            self.updates.append(found)
            per_video = maps.detach().cpu()
            self.maps[step] = [
                video[:, : len(self.words[index // batch.videos_per_plan].texts)]
                for index, video in enumerate(per_video)
            ]
            if gradient is None:
                break
            if not gradient.isfinite().all():
                raise FloatingPointError(
                    f"the gradient of update {update} at step {step} is not finite: try a lower "
                    "step_size, or float32 instead of a 16-bit type"
                )
            moved = moved - rate / scale * gradient
        return moved

    def _loss(
        self,
        maps: Tensor,
        batch: _Batch,
        step: int,
        update: int,
        weights: tuple[float, float],
    ) -> tuple[Tensor, GuidanceUpdate]:
        """Returns the sum of the videos' losses, and their means as a record.

        Raises:
            FloatingPointError: It is not finite.
        """
        totals, spatials, syntaxes, masses = [], [], [], []
        for index, video in enumerate(maps):
            number = index // batch.videos_per_plan
            target = self._target(number, batch.frames, *video.shape[-2:])
            nouns = video[:, target.words.noun_columns]
            masks = target.masks.to(nouns.device)
            masses.append(_mean_mass(nouns.detach(), masks))
            total = video.new_zeros(())
            if weights[0]:
                spatials.append(self._spatial(nouns, masks))
                total = total + weights[0] * spatials[-1]
            if weights[1]:
                syntaxes.append(self._syntax(video[:, : len(target.words.texts)], target))
                total = total + weights[1] * syntaxes[-1]
            totals.append(total)
        loss = torch.stack(totals).sum()
        value = float(loss.detach()) / len(totals)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of update {update} at step {step} is {value}: try a lower step_size, or "
                "float32 instead of a 16-bit type"
            )
        stop_below = self.config.stop_below
        found = GuidanceUpdate(
            step,
            update,
            value,
            _mean(spatials),
            _mean(syntaxes),
            float(torch.stack(masses).mean()),
            applied=stop_below is None or value >= stop_below,
        )
        return loss, found

    def _spatial(self, nouns: Tensor, masks: Tensor) -> Tensor:
        config = self.config
        return spatial_loss(
            nouns,
            masks,
            form=config.form,
            share=config.share,
            inside=config.inside,
            outside=config.outside,
            normalize=config.normalize,
        )

    def _syntax(self, video: Tensor, target: PlanTargets) -> Tensor:
        config = self.config
        return syntax_loss(
            video,
            target.words.pairs,
            present=target.present,
            distance=config.distance,
            window=config.window,
            margin=config.margin,
        )

    def _target(self, plan: int, frames: int, height: int, width: int) -> PlanTargets:
        key = (plan, frames, height, width)
        if key not in self._targets:
            self._targets[key] = plan_targets(self.plans[plan], self.words[plan], *key[1:])
        return self._targets[key]

    def _capture(self, columns: Tensor) -> ColumnCapture:
        return ColumnCapture(
            self._model,
            columns,
            self._layers,
            None,
            lambda model: None,
            guidance=False,
            differentiable=True,
            backend=self._backend,
            leaves=True,
        )

    def _fit(self, sample: Tensor, latents: Tensor, pipeline: PipelineRun) -> _Batch:
        """Returns what a call of the model is a batch of.

        Args:
            sample: What the model is called with.
            latents: Its channels that are denoised.
            pipeline: What calls it.

        Raises:
            ValueError: It does not fit the plans, or it cannot be told what it is.
        """
        rows, plans = len(sample), len(self.plans)
        guided = self._guidance
        if guided is None:
            guided = has_equal_halves(sample)
            if guided and rows == plans:
                raise ValueError(
                    f"cannot tell whether a batch of {rows} with the same latents in both halves "
                    f"is under classifier-free guidance, with {plans} plans: pass guidance=True or "
                    "guidance=False"
                )
        known = pipeline.guided
        if self._guidance is not None and known is not None and known is not guided:
            raise ValueError(
                f"guidance={guided} was given to guide_latents, and the pipeline samples "
                f"{'under' if known else 'without'} classifier-free guidance: leave guidance= out"
            )
        if guided and rows % 2 == 0 and not has_equal_halves(latents):
            raise ValueError(
                "guidance=True was given to guide_latents, and the halves of the model's batch "
                "have different latents: leave guidance= out"
            )
        videos = rows // (1 + guided)
        if videos * (1 + guided) != rows or videos % plans:
            raise ValueError(
                f"{plans} plans with guidance={guided} need a batch that is a multiple of "
                f"{plans * (1 + guided)}, the model was called with {rows}"
            )
        return _Batch(rows, guided, sample.shape[2], videos // plans)

    def _check_text(self, batch: _Batch, text: Any, pipeline: PipelineRun) -> None:
        """Raises ValueError where videos of a plan have a text without its words at its tokens.

        What is not known as prompts, such as embeddings, must be the same for a plan's videos.
        """
        videos = batch.videos_per_plan * len(self.plans)
        if self._find_words is None:
            return
        prompts = pipeline.prompts
        if prompts is not None and videos % len(prompts) == 0:
            per_prompt = videos // len(prompts)
            for video in range(videos):
                number = video // batch.videos_per_plan
                self._check_prompt(number, prompts[video // per_prompt])
        elif isinstance(text, Tensor) and len(text) in (videos, videos * batch.frames):
            each = text.unflatten(0, (len(self.plans), -1)).float()
            apart = (each - each[:, :1]).abs().amax()
            if apart > 1e-2 * each.abs().amax():  # more than what a batch rounds otherwise
                raise ValueError(
                    f"the {batch.videos_per_plan} videos of a plan have different texts: give "
                    "guide_latents the plan of each prompt"
                )

    def _check_prompt(self, number: int, prompt: str) -> None:
        plan = self.plans[number]
        if prompt == plan.prompt or (number, prompt) in self._checked:
            return
        assert self._find_words is not None
        try:
            has_same = self._find_words(plan, prompt).tokens == self.words[number].tokens
        except ValueError:  # a word is not there at all
            has_same = False
        if not has_same:
            raise ValueError(
                f"the pipeline was called with {shorten(prompt)!r}, where the words of the plan "
                f"are not at the tokens that they have in {shorten(plan.prompt)!r}: call it with "
                "the plan's prompt, or give guide_latents the plan of each prompt"
            )
        self._checked.add((number, prompt))

    def _check_reach(self, step: int) -> None:
        """Raises ValueError where the pipeline has just begun, and no step will be guided."""
        begin, num_steps = self._scheduler.first_step, self._scheduler.num_steps
        if step != begin or not any(self.config.lambdas):
            return
        if not any(any(self.config.weights(x, num_steps)) for x in range(begin, num_steps)):
            raise ValueError(
                f"spatial={self.config.spatial} and syntax={self.config.syntax} guide none of the "
                f"steps {begin} to {num_steps - 1}: they are shares of the whole schedule"
            )


def _as_encoded(pipe: Any) -> Callable[[str], str]:
    """Returns what gives a prompt as the pipeline tokenizes it: Latte's in lower case."""
    preprocess = getattr(pipe, "_text_preprocessing", None)
    if preprocess is None:
        return lambda text: text
    return lambda text: preprocess(text, clean_caption=False)[0]


def _layers(model: nn.Module, config: GuidanceConfig) -> Callable[[CrossLayer], bool]:
    """Returns which layers' maps are used.

    Raises:
        ValueError: None is.
    """
    there = cross_layers(model)
    levels = config.levels
    if levels is None:
        coarser = {layer.level for layer in there if layer.level > 0}
        levels = sorted(coarser or {layer.level for layer in there})
    missing = set(levels) - {layer.level for layer in there}
    if missing:
        raise ValueError(
            f"levels: no cross-attention has level {min(missing)}: the levels are "
            f"{', '.join(map(str, sorted({layer.level for layer in there})))}"
        )

    def chooses(layer: CrossLayer) -> bool:
        return layer.level in levels and (config.places is None or layer.place in config.places)

    if not any(map(chooses, there)):
        raise ValueError(f"places {list(config.places or ())} have no layer of levels {levels}")
    return chooses


def _weights(words: list[PlanWords], videos_per_plan: int) -> Tensor:
    """Returns the columns of the words of each video, ``(videos, tokens, words)``.

    Videos with fewer words than others have columns without weight after theirs.
    """
    each = [token_weights(found.tokens) for found in words]
    size = [max(weights.shape[dim] for weights in each) for dim in (0, 1)]
    padded = torch.zeros(len(each), *size)
    for index, weights in enumerate(each):
        padded[index, : weights.shape[0], : weights.shape[1]] = weights
    return padded.repeat_interleave(videos_per_plan, dim=0)


def _mean_mass(nouns: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean of the share of each noun's map in its boxes, over frames with it."""
    shares = mass_inside(nouns, masks)[masks.flatten(-2).any(-1)]
    return shares.mean() if shares.numel() else shares.new_zeros(())


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack(values).detach().mean()) if values else None
