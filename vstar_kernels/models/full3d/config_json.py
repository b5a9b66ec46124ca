"""The JSON of a :class:`FrameTAR`, which is read strictly: its form, a pydantic model.

Only functions import this file: it needs pydantic, and the package does not.
"""

from __future__ import annotations

from typing import Any, Literal

from vstar_kernels.attention.frames.rules import STATS
from vstar_kernels.models.config_json import List, Number, Steps, StrictForm
from vstar_kernels.reading import decode, validate


class FrameTARForm(StrictForm):
    """A :class:`FrameTAR`; the defaults are its own."""

    sigma: Number = 1.0
    strength: Number = 1.0
    stat: Literal[STATS] = "frame_max"  # type: ignore[valid-type]
    steps: Steps | None = 0.3
    layers: List[int] | None = None
    heads: List[int] | None = None


def read_fields(text: str) -> dict[str, Any]:
    """Returns the fields that a JSON text gives, of the types that :class:`FrameTAR` takes.

    Raises:
        FormatError: They are not of the form; the message names the field by its path.
    """
    form = validate(FrameTARForm, decode(text))
    return {name: getattr(form, name) for name in form.model_fields_set}
