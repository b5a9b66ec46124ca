"""What to regularize in a full-3D transformer, and when: :class:`FrameTAR` and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

from vstar_kernels.attention.frames.layout import check_count
from vstar_kernels.attention.frames.rules import STATS, FrameRule
from vstar_kernels.documents import Document
from vstar_kernels.models.full3d.seats import FrameLayer
from vstar_kernels.models.schedule import Steps, check_steps
from vstar_kernels.reading import build, require_pydantic

Layers = Collection[int] | Callable[[FrameLayer], bool] | None
LARGEST_CONFIG = 2**20  # bytes


@dataclass(frozen=True)
class FrameTAR(Document):
    """Temporal Attention Regularization of a full-3D video transformer, frame by frame.

    It is VSTAR's (arXiv 2403.13501, eq. 2 and 3) between frames of tokens: see
    :meth:`vstar_kernels.FrameRule.tar`. The attention within a frame is left as it is.

    Args:
        sigma: σ in latent frames (of which Wan makes one from 4 frames of the video).
        strength: Factor on the bias.
        stat: ``"frame_max"``, ``"row_max"`` or ``"none"``: the statistic of a row that the bias is
            weighed by.
        steps: When: an int, up to this step index, inclusive; a float in (0, 1], that share of the
            schedule, rounded up; None, always; or a callable ``(step, timestep) -> bool``.
        layers: Which of the video's self-attention layers: their indices, such as ``range(10)``; a
            callable of a layer (its ``name`` and ``index``); None, all.
        heads: The indices of the heads; None, all.

    Raises:
        ValueError, TypeError: An argument is wrong.
    """

    largest_file = LARGEST_CONFIG

    sigma: float = 1.0
    strength: float = 1.0
    stat: str = "frame_max"
    steps: Steps = 0.3
    layers: Layers = None
    heads: Collection[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stat, str) or self.stat not in STATS:
            raise ValueError(
                f"stat must be one of {', '.join(map(repr, STATS))}, got {self.stat!r}"
            )
        self.rule()
        check_steps(self.steps)
        object.__setattr__(self, "layers", checked_layers(self.layers))
        object.__setattr__(self, "heads", checked_indices(self.heads, "heads"))

    def rule(self) -> FrameRule:
        """Returns what is done between frames."""
        return FrameRule.tar(self.sigma, self.strength, self.stat)

    def to_json(self) -> str:
        """Returns all fields as JSON.

        Raises:
            ValueError: ``steps`` or ``layers`` is a callable.
            ImportError: ``pydantic`` is not installed.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in values.items():
            if callable(value):
                raise ValueError(
                    f"a configuration whose {name} is a callable cannot be saved: give indices, "
                    "or set it after loading"
                )
        text = json.dumps(values, allow_nan=False)
        self.from_json(text)  # what cannot be read is not to be written
        return text

    @classmethod
    def from_json(cls, text: str) -> FrameTAR:
        """Returns the configuration that :meth:`to_json` wrote.

        Fields that are left out have their defaults.

        Raises:
            ValueError: It is not JSON, or not a configuration; the message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        require_pydantic()
        from vstar_kernels.models.full3d.config_json import read_fields

        return build(cls, read_fields(text))


def checked_layers(layers: Layers) -> Layers:
    """Returns which layers, indices as a tuple.

    Raises:
        ValueError, TypeError: They are no indices.
    """
    return layers if callable(layers) else checked_indices(layers, "layers")


def checked_indices(indices: Collection[int] | None, name: str) -> tuple[int, ...] | None:
    """Returns indices as a tuple in order; None of None.

    Raises:
        ValueError, TypeError: There is none, or they are no indices.
    """
    if indices is None:
        return None
    if isinstance(indices, str | bytes) or not isinstance(indices, Collection):
        raise TypeError(f"{name} must be indices or None, got {type(indices).__name__}")
    for index in indices:
        check_count(index, f"an index of {name}", 0)
    if not indices:
        raise ValueError(f"{name} names none: give at least one index, or None for all")
    return tuple(sorted(set(indices)))
