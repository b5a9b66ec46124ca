"""``apply_tar`` puts Temporal Attention Regularization on a whole model or pipeline in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.models.config import TARConfig, checked_tar
from vstar_kernels.models.front_end import models_with_temporal_attention
from vstar_kernels.models.full3d.apply import FramesHandle, apply_frames, find_full3d
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.models.hooks import put_back
from vstar_kernels.models.layers import RegularizedLayer
from vstar_kernels.models.regularized import RegularizedModel, check_keys
from vstar_kernels.models.schedule import StepGate, SteppedHandle, describe_steps, scheduler_of


@overload
def apply_tar(
    pipe_or_model: Any,
    config: TARConfig | str,
    *,
    scheduler: Any = ...,
    backend: str | None = ...,
    stock_elsewhere: bool = ...,
    extend_positions: bool = ...,
) -> TARHandle: ...
@overload
def apply_tar(
    pipe_or_model: Any, config: FrameTAR, *, scheduler: Any = ..., backend: str | None = ...
) -> FramesHandle: ...
def apply_tar(
    pipe_or_model: Any,
    config: TARConfig | FrameTAR | str,
    *,
    scheduler: Any = None,
    backend: str | None = None,
    stock_elsewhere: bool = False,
    extend_positions: bool = False,
) -> TARHandle | FramesHandle:
    """Regularizes the temporal attention of a video diffusion model (VSTAR, arXiv 2403.13501).

    >>> with vk.apply_tar(pipe, "64D1_32D8"):
    ...     video = pipe(prompt, num_frames=64).frames

    It works on diffusers' ``UNet3DConditionModel`` (ModelScope, Zeroscope), ``I2VGenXLUNet``,
    ``UNetMotionModel`` (AnimateDiff, PIA), ``SparseControlNetModel``,
    ``UNetSpatioTemporalConditionModel`` (Stable Video Diffusion; attn1 only) and
    ``LatteTransformer3DModel``, on pipelines that hold them, and on the ``UNetModel`` of the
    official VSTAR and VideoCrafter code (``lvdm``) and the ``UNet3DConditionModel`` of LaVie's. All
    temporal self-attention, regularized or not, goes through :func:`vstar_kernels.tar_attention`.

    Full-3D transformers (Wan, HunyuanVideo, CogVideoX, LTX, …) attend over space and time at once
    and take a :class:`FrameTAR` in the place of the configuration: see
    :func:`vstar_kernels.apply_frames`, which this then calls.

    What replaces attention processors or blocks (IP adapters, FreeNoise, fused projections,
    attention slicing) undoes TAR; the next forward pass puts it in again. Models that a pipeline is
    given after this call are not regularized.

    Args:
        pipe_or_model: A pipeline, whose every model with temporal attention is treated, or one
            model, compiled or not.
        config: A :class:`TARConfig`, or a preset such as ``"64D1_32D8"``; a :class:`FrameTAR` for
            full-3D transformers.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it unless ``steps`` is None or :attr:`TARHandle.step` is set. The official code passes
            the step to the model.
        backend: As for :func:`vstar_kernels.tar_attention`.
        stock_elsewhere: Leave the layers and steps that are not regularized to the model's own
            attention, as it always is with a FrameTAR.
        extend_positions: Compute longer frame positions for samples longer than the position
            embeddings of AnimateDiff and Latte, rather than raise.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        TypeError: ``pipe_or_model`` or another argument is of the wrong kind.
        ValueError: There is no temporal attention, a preset is malformed, no layer has one of the
            levels, a model is under ``apply_tar`` already, or has processors that TAR would have to
            discard. At a forward pass: no layer has one of the widths, the step cannot be known, or
            the sample has more frames than the model has positions for.
    """
    check_flag(stock_elsewhere, "stock_elsewhere")
    check_flag(extend_positions, "extend_positions")
    if isinstance(config, FrameTAR):
        if extend_positions:
            raise ValueError("extend_positions is for temporal attention, not for a FrameTAR")
        return apply_frames(
            pipe_or_model,
            config.rule(),
            steps=config.steps,
            layers=config.layers,
            heads=config.heads,
            backend=backend,
            scheduler=scheduler,
        )
    config = checked_tar("config", config, other="a FrameTAR")
    if find_full3d(pipe_or_model):
        raise ValueError(
            f"{type(pipe_or_model).__name__} is or holds a full-3D transformer, which has no "
            "temporal attention of its own: give apply_tar a vk.FrameTAR(sigma=…)"
        )
    models = models_with_temporal_attention(pipe_or_model)

    gate = StepGate(config.steps, scheduler_of(pipe_or_model, scheduler))
    regularized = [
        RegularizedModel(
            name,
            model,
            config,
            gate,
            backend=backend,
            stock_elsewhere=stock_elsewhere,
            extend_positions=extend_positions,
        )
        for name, model in models.items()
    ]
    if config.key == "level":
        check_keys(config.regularizations, regularized, "level")
    return TARHandle(config, gate, regularized)


class RegularizedHandle(SteppedHandle):
    """Some models with changed attention: a context manager, with :meth:`remove`."""

    def __init__(self, gate: StepGate, models: Sequence[RegularizedModel]) -> None:
        super().__init__(gate.announced)
        self._models = list(models)
        for model in self._models:
            model.peers = self._models
        self._install_all(self._models)

    @property
    def layers(self) -> list[RegularizedLayer]:
        """The regularized layers; by width they are known after a forward pass."""
        return [layer for model in self._models for layer in model.describe()]

    def remove(self) -> None:
        """Puts everything back as it was; nothing happens the second time.

        A module whose processor has been replaced since then keeps the replacement.
        """
        super().remove()
        put_back(*(model.remove for model in self._models))

    def describe_tar(self, config: TARConfig) -> str:
        """Returns a line for each regularized layer, under a line that says when."""
        count = sum(len(model.layers) for model in self._models)
        layers = self.layers
        kind, when = self._models[0].attention, describe_steps(config.steps)
        lines = [f"TAR on {len(layers)} of {count} {kind} layers, {when}"]
        if not layers:
            lines = [f"TAR on layers to be found by their widths at a forward pass, {when}"]
        return "\n".join([*lines, *(_describe(layer) for layer in layers)])


class TARHandle(RegularizedHandle):
    """TAR on a model or pipeline, from :func:`apply_tar`: a context manager, with :meth:`remove`.

    Attributes:
        config: What was applied.
    """

    def __init__(
        self, config: TARConfig, gate: StepGate, models: Sequence[RegularizedModel]
    ) -> None:
        self.config = config
        super().__init__(gate, models)

    def describe(self) -> str:
        """Returns a line for each regularized layer, under a line that says when."""
        return self.describe_tar(self.config)


def _describe(layer: RegularizedLayer) -> str:
    name = f"{layer.model}.{layer.name}" if layer.model else layer.name
    where = (
        f"level {layer.level}"
        if layer.width is None
        else (f"level {layer.level} (width {layer.width})")
    )
    if layer.override is not None:
        return f"  {name}: {where}, {layer.override} attention"
    form = type(layer.bias).__name__ if layer.sigma is None else f"σ = {layer.sigma:g}"
    return f"  {name}: {where}, {form}, strength {layer.strength:g}"
