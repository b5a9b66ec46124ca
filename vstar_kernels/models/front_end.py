"""The front ends: each knows the models of one code base, and where their temporal attention is.

A front end is one file and one line in :data:`FRONT_ENDS`. It knows a model by the names of its
modules, so that importing it imports nothing of the code base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from vstar_kernels.models.comfyui import ComfyFrontEnd
from vstar_kernels.models.dit import TransformerFrontEnd
from vstar_kernels.models.hooks import ModelCall
from vstar_kernels.models.lavie import LavieFrontEnd
from vstar_kernels.models.layers import (
    ColumnController,
    CrossLayer,
    RegularizedAttention,
    TemporalLayer,
    WatchedCrossAttention,
)
from vstar_kernels.models.lvdm import LvdmFrontEnd
from vstar_kernels.models.unet import UNetFrontEnd


class FrontEnd(Protocol):
    """What must be known about a kind of model to regularize and to watch its attention."""

    @property
    def models(self) -> str:
        """The models that it knows, in words, for errors about a model that no front end knows."""

    @property
    def guides_in_turns(self) -> bool:
        """Whether samplers call the model for each side of guidance, not once for a batch of both.

        The first call is then with the prompt.
        """

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the model's temporal self-attention modules in order; none if it is unknown."""

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields the modules by which each frame attends to the text; none if there is no text."""

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns the blocks whose ``encoder_hidden_states`` are the text of each frame."""

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call of the model."""

    def get_attention(self, module: nn.Module) -> Any:
        """Returns what computes a layer's attention at present."""

    def set_attention(self, module: nn.Module, attention: Any) -> None:
        """Gives a layer what computes its attention from then on."""

    def make_attention(self, module: nn.Module, backend: str | None) -> RegularizedAttention:
        """Makes what computes a layer's attention under TAR; plain until it is given a bias."""

    def logit_factors(
        self, module: nn.Module, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Returns queries and keys whose scaled products are a layer's logits, and the scale.

        They are ``(…, frames, heads, head_dim)``, as the layer's projections make them.
        """

    def watch_cross_attention(
        self, controller: ColumnController, layer: CrossLayer, backend: str | None
    ) -> WatchedCrossAttention:
        """Makes what computes a cross-attention layer, and gives its column maps away."""

    def why_not_watch(self, attention: Any) -> str | None:
        """Returns why a cross-attention's ``get_attention`` cannot make way for that, or None."""

    def why_not_replace(self, attention: Any) -> str | None:
        """Returns why what ``get_attention`` returned cannot make way for TAR, or None."""

    def register(self) -> None:
        """Tells the code base about TAR, once for each model under ``apply_tar``."""


FRONT_ENDS: tuple[FrontEnd, ...] = (
    UNetFrontEnd(),
    TransformerFrontEnd(),
    LvdmFrontEnd(),
    ComfyFrontEnd(),
    LavieFrontEnd(),
)


def find_front_end(model: nn.Module) -> FrontEnd:
    """Returns the front end that knows a model, which must not be wrapped.

    Raises:
        ValueError: None does.
    """
    found = _find(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no temporal self-attention that is known here: known are "
            + _known_models()
        )
    return found


def temporal_layers(model: nn.Module) -> list[TemporalLayer]:
    """Returns the temporal self-attention modules of a model, in the model's order.

    Knows diffusers' ``UNet3DConditionModel``, ``I2VGenXLUNet``, ``UNetMotionModel``,
    ``SparseControlNetModel``, ``UNetSpatioTemporalConditionModel`` and ``LatteTransformer3DModel``,
    the ``UNetModel`` of ``lvdm`` (VideoCrafter, VSTAR) and of ComfyUI, and LaVie's
    ``UNet3DConditionModel``. A compiled model is unwrapped.

    Raises:
        ValueError: The model has none.
    """
    model = unwrap(model)
    return list(find_front_end(model).layers(model))


def cross_layers(model: nn.Module) -> list[CrossLayer]:
    """Returns the modules of a model by which each of its frames attends to the text.

    Knows the models of :func:`temporal_layers`; those without a text have none. A compiled model is
    unwrapped.

    Raises:
        ValueError: The model has no temporal self-attention.
    """
    model = unwrap(model)
    return list(find_front_end(model).cross_layers(model))


def modules_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Returns a pipeline's modules by their names; a model by itself has the name ``""``.

    Compiled ones are unwrapped.

    Raises:
        TypeError: It is neither a model nor a pipeline (an object with ``components``).
    """
    if isinstance(pipe_or_model, nn.Module):
        return {"": unwrap(pipe_or_model)}
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            "pipe_or_model must be a torch.nn.Module or a diffusers pipeline, "
            f"got {type(pipe_or_model).__name__}"
        )
    return {name: unwrap(x) for name, x in components.items() if isinstance(x, nn.Module)}


def models_with_temporal_attention(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Returns a pipeline's models with temporal self-attention by their names (``"unet"``).

    Compiled models are unwrapped. A model by itself has the name ``""``.

    Raises:
        TypeError: It is neither a model nor a pipeline (an object with ``components``).
        ValueError: There is none.
    """
    modules = modules_of(pipe_or_model)
    if isinstance(pipe_or_model, nn.Module):
        find_front_end(modules[""])
        return modules
    models = {name: module for name, module in modules.items() if _find(module) is not None}
    if not models:
        raise ValueError(
            f"{type(pipe_or_model).__name__} holds no model with temporal self-attention that is "
            f"known here; it holds {', '.join(pipe_or_model.components)}, known are "
            f"{_known_models()}"
        )
    return models


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module itself of one that ``torch.compile`` returned."""
    return getattr(model, "_orig_mod", model)


def _find(model: nn.Module) -> FrontEnd | None:
    has_layers = (found for found in FRONT_ENDS if next(found.layers(model), None) is not None)
    return next(has_layers, None)


def _known_models() -> str:
    return "; ".join(front_end.models for front_end in FRONT_ENDS)
