"""How a plan guides the latents, and its JSON: :class:`GuidanceConfig`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from vstar_kernels.documents import Document
from vstar_kernels.methods.arguments import check_choice, check_integer
from vstar_kernels.methods.starvid.losses import (
    DISTANCES,
    FORMS,
    NORMALIZES,
    Distance,
    Form,
    Normalize,
)
from vstar_kernels.reading import build, decode, require_pydantic, validate

if TYPE_CHECKING:
    from pydantic import BaseModel

Decay = Literal["auto", "noise", "linear"]
Place = Literal["down", "mid", "up", "blocks"]
DECAYS: tuple[Decay, ...] = get_args(Decay)
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class GuidanceConfig(Document):
    """When and how latents are drawn towards a plan (StarVid, arXiv 2409.15259).

    The paper's formulas and values are not public. Its idea is marked [S], what public building
    blocks have [B] (Attend-and-Excite, BoxDiff, LVD, SynGen), our own choices [O]; docs/starvid.md
    tells more.

    Args:
        spatial: In which share of the schedule nouns are drawn into their boxes, from and to,
            without the last; None never. That it is early is [S], the numbers are [O].
        syntax: In which share verbs are drawn to their nouns; after it [S], the numbers are [O].
        updates: Of the latents in each of these steps [B: 1 to 5].
        step_size: η, of each update [B: LVD].
        decay: ``"noise"`` weighs η by √(1 − ᾱ_t) [B: LVD], ``"linear"`` by 1 falling to 0.5 over
            the schedule [B: Attend-and-Excite]; ``"auto"`` is the first where the scheduler has ᾱ.
        stop_below: Do no more updates in a step whose loss is below; None does them all [B].
        lambdas: The weights of the two losses [O].
        form, share, inside, outside, normalize: See
            :func:`vstar_kernels.methods.starvid.losses.spatial_loss` [B: BoxDiff, LVD].
        distance, window, margin: See :func:`vstar_kernels.methods.starvid.losses.syntax_loss`;
            ``"kl"`` and windows of adjacent frames are [S], their form is [B: SynGen].
        size: To which size all maps are brought [S]: a level's, or a height and a width [O].
        levels: Of which levels' layers the maps are [O]; None is all but the finest, or all of a
            model of one level. The model is left after the last of them.
        places: Of which places: any of ``"down"``, ``"mid"``, ``"up"``, ``"blocks"``; None is all.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range, or there is no step
            that would be guided.
    """

    spatial: tuple[float, float] | None = (0.0, 0.2)
    syntax: tuple[float, float] | None = (0.2, 0.5)
    updates: int = 3
    step_size: float = 20.0
    decay: Decay = "auto"
    stop_below: float | None = None
    lambdas: tuple[float, float] = (1.0, 1.0)
    form: Form = "topk"
    share: float = 0.75
    inside: float = 1.0
    outside: float = 4.0
    normalize: Normalize | None = None
    distance: Distance = "kl"
    window: int = 1
    margin: float | None = None
    size: int | tuple[int, int] = 1
    levels: Sequence[int] | None = None
    places: Sequence[Place] | None = None

    def __post_init__(self) -> None:
        for name in ("spatial", "syntax"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._range(name))
        if self.spatial is None and self.syntax is None:
            raise ValueError("spatial and syntax are None: no step would be guided")
        check_integer("updates", self.updates, 1)
        check_integer("window", self.window, 0)
        self._check_number("step_size", self.step_size, positive=True)
        if len(self._numbers("lambdas")) != 2:
            raise ValueError(f"lambdas must be two weights, got {len(self.lambdas)}")
        object.__setattr__(self, "lambdas", self._numbers("lambdas"))
        for name in ("inside", "outside"):
            self._check_number(name, getattr(self, name))
        self._check_number("share", self.share, positive=True)
        if self.share > 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if self.margin is not None:
            self._check_number("margin", self.margin, positive=True)
        if self.stop_below is not None:
            # Losses may be negative: distances from other words count against a verb's.
            self._check_number("stop_below", self.stop_below, least=-math.inf)
        self._check_choices()
        self._check_layers()

    def _check_choices(self) -> None:
        for name, allowed in (("decay", DECAYS), ("form", FORMS), ("distance", DISTANCES)):
            check_choice(name, getattr(self, name), allowed)
        if self.normalize is not None:
            check_choice("normalize", self.normalize, NORMALIZES)

    def _check_layers(self) -> None:
        if isinstance(self.size, int):
            check_integer("size", self.size, 0)
        else:
            size = self._sequence("size")
            if len(size) != 2:
                raise ValueError(f"size must be a level or (height, width), got {list(size)}")
            for side in size:
                check_integer("size", side, 1)
            object.__setattr__(self, "size", size)
        if self.levels is not None:
            levels = self._sequence("levels")
            for level in levels:
                check_integer("levels", level, 0)
            if not levels:
                raise ValueError("levels must name at least one level, got none")
            object.__setattr__(self, "levels", levels)
        if self.places is not None:
            places = self._sequence("places")
            for place in places:
                check_choice("places", place, PLACES)
            if not places:
                raise ValueError("places must name at least one place, got none")
            object.__setattr__(self, "places", places)

    def _sequence(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list, got {type(value).__name__}")
        return tuple(value)

    def _numbers(self, name: str) -> tuple[float, ...]:
        values = self._sequence(name)
        for value in values:
            self._check_number(name, value)
        return tuple(map(float, values))

    def _range(self, name: str) -> tuple[float, ...]:
        found = self._numbers(name)
        if len(found) != 2 or not found[0] < found[1] <= 1:
            raise ValueError(
                f"{name} must be two shares of the schedule, the first below the second, from 0 to "
                f"1, got {list(found)}: it would guide no step"
            )
        return found

    @staticmethod
    def _check_number(name: str, value: Any, *, positive: bool = False, least: float = 0.0) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= least) or (positive and value <= 0):
            allowed = "more than 0" if positive else f"at least {least:g}"
            raise ValueError(f"{name} must be finite and {allowed}, got {value}")

    def weights(self, step: int, num_steps: int) -> tuple[float, float]:
        """Returns the weights of the spatial and the syntax loss at a step, 0 outside its share."""

        def weight(window: tuple[float, float] | None, value: float) -> float:
            # 0.56 × 25 is a little more than 14 in floating point.
            bounds = [round(share * num_steps, 6) for share in window or (0.0, 0.0)]
            return value if bounds[0] <= step < bounds[1] else 0.0

        return weight(self.spatial, self.lambdas[0]), weight(self.syntax, self.lambdas[1])

    def to_json(self) -> str:
        """Returns all fields as JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> GuidanceConfig:
        """Reads what :meth:`to_json` gave; fields that are left out have their defaults.

        Raises:
            ValueError: It is not JSON, or not such a configuration; the message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        form: Any = validate(_form(), decode(text))
        return build(cls, {name: getattr(form, name) for name in form.model_fields_set})


@functools.cache
def _form() -> type[BaseModel]:
    """Returns the form of a configuration in JSON, a pydantic model."""
    require_pydantic()
    from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

    from vstar_kernels.reading import hidden

    Number = Annotated[float, Field(allow_inf_nan=False)]  # noqa: N806
    Several = Annotated[list[Number], Field(fail_fast=True)]  # noqa: N806
    Levels = Annotated[list[int], Field(fail_fast=True)]  # noqa: N806
    one, two = hidden("one"), hidden("two")
    Size = Annotated[  # noqa: N806
        Annotated[int, Tag(one)] | Annotated[Levels, Tag(two)],
        Discriminator(lambda value: two if isinstance(value, list) else one),
    ]

    class ConfigFields(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        spatial: Several | None = None
        syntax: Several | None = None
        updates: int = 0
        step_size: Number = 0.0
        decay: str = ""
        stop_below: Number | None = None
        lambdas: Several = []
        form: str = ""
        share: Number = 0.0
        inside: Number = 0.0
        outside: Number = 0.0
        normalize: str | None = None
        distance: str = ""
        window: int = 0
        margin: Number | None = None
        size: Size = 0
        levels: Levels | None = None
        places: Annotated[list[str], Field(fail_fast=True)] | None = None

    return ConfigFields
