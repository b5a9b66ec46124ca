"""ComfyUI: the mean attention maps of a diffusion model while a sampler runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vstar_kernels.models.comfyui import ComfyFrontEnd, layers_of
from vstar_kernels.models.config import check_present
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.schedule import ChosenSteps, as_indices
from vstar_kernels.models.temporal_capture import ModelWatch


class MapsWrapper:
    """Captures maps around the calls of a diffusion model, for ``add_wrapper_with_key``.

    The maps are those of what runs, under TAR the changed ones, whichever wrapper comes first. They
    are those of the last run of a sampler, as :meth:`begin` forgets those before.

    Args:
        steps: The indices of steps; None for all.
        levels: The UNet's resolution levels; None for all.
        max_rows: See :func:`vstar_kernels.capture_maps`.

    Attributes:
        capture: The maps.

    Raises:
        TypeError, ValueError: ``steps`` or ``levels`` are no indices.
    """

    def __init__(
        self,
        steps: Collection[int] | None = None,
        levels: Collection[int] | None = None,
        *,
        max_rows: int = 256,
    ) -> None:
        wanted = as_indices("steps", steps, "indices of denoising steps or None")
        self._levels = as_indices("levels", levels, "levels of the UNet or None")
        self._front_end = ComfyFrontEnd()
        self.capture = MapCapture(
            ChosenSteps(wanted, lambda _: None),
            lambda layer: self._levels is None or getattr(layer, "level", None) in self._levels,
            max_rows,
            differentiable=False,
        )

    def begin(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a sampler (``WrappersMP.OUTER_SAMPLE``), of which alone the maps then are."""
        self.capture.clear()
        return executor(*args, **kwargs)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model (``WrappersMP.DIFFUSION_MODEL``), and captures its maps.

        Raises:
            ValueError: There is no temporal attention, or none at a level; the step cannot be
                known.
            RuntimeError: A layer was not called, or with a part of the video.
        """
        model = executor.class_obj
        levels: Any = {layer.level for layer in layers_of(self._front_end, model)}
        check_present(self._levels or (), levels, "level", "temporal attention")
        with ModelWatch(self.capture, "", model, self._front_end).during(args, kwargs):
            return executor(*args, **kwargs)
