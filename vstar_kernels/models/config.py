"""What to regularize, how strongly and when: :class:`TARConfig`, its presets and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from vstar_kernels.analysis.maps import Level
from vstar_kernels.attention.bias import STATS, Bias, DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.documents import Document
from vstar_kernels.models.layers import OVERRIDE_MAPS, Override, Regularization, TemporalLayer
from vstar_kernels.models.schedule import Steps, check_steps
from vstar_kernels.reading import build, require_pydantic

PRESET_STEPS = 13  # the last regularized step index, of 25, in the official code
LARGEST_CONFIG = 2**30  # bytes, for the matrices of many heads
_PRESET_TERM = re.compile(r"([0-9]{1,9})D([0-9]{1,9}(?:\.[0-9]+)?)")
_DEFAULT_WEIGHT = {"strength": 1.0, "stat": "row_max", "clamp_negative": False}
T = TypeVar("T")


@dataclass(frozen=True)
class TARConfig(Document):
    """Temporal Attention Regularization of a whole model (VSTAR, arXiv 2403.13501, §3.3).

    Layers are chosen by UNet level, 0 being the finest, at the latents' resolution, and each next
    level half that; or, with ``by_width``, by the width that their level has for the given latents,
    as the paper's code names them (64, 32, …). All mappings are keyed alike.

    Args:
        sigma: σ of the Gaussian in frames, by level; one number means level 0.
        by_width: σ by width, instead of ``sigma``.
        strength: Factor on the bias; one number, or keyed as sigma is.
        steps: When: an int, up to this step index, inclusive; a float in (0, 1], that share of the
            schedule, rounded up; None, always; or a callable ``(step, timestep) -> bool``. Indices
            are those of denoising steps in the scheduler's whole schedule, see
            :class:`vstar_kernels.models.schedule.StepGate`.
        bias: A :class:`ToeplitzBias` or :class:`DenseBias` (dynamics transfer, Fig. 8) instead of
            the Gaussian: one, for the keys of sigma or, without sigma, for level 0; or keyed as
            sigma is. Its weight is given by ``strength``, ``stat`` and ``clamp_negative`` here.
        stat: ``"row_max"`` (the official code), ``"map_max"`` (eq. 3) or ``"none"``; see
            :class:`GaussianBias`.
        clamp_negative: Use max(stat, 0), so that a negative maximum does not invert TAR.
        override: ``"identity"`` (out = V) or ``"uniform"`` (out = the mean of V over frames) in
            the place of the attention map, keyed as sigma is (Fig. 4).
        include_init: Regularize ``transformer_in`` / ``init_attn`` as well, as level 0. The paper
            leaves it alone.

    Raises:
        ValueError, TypeError: An argument is wrong, or the configuration regularizes nothing.
    """

    largest_file = LARGEST_CONFIG

    sigma: float | Mapping[int, float] | None = None
    by_width: Mapping[int, float] | None = None
    strength: float | Mapping[int, float] = 1.0
    steps: Steps = 13
    bias: Bias | Mapping[int, Bias] | None = None
    stat: str = "row_max"
    clamp_negative: bool = False
    override: Mapping[int, Override] = field(default_factory=dict)
    include_init: bool = False

    def __post_init__(self) -> None:
        if self.sigma is not None and self.by_width is not None:
            raise ValueError("give sigma (by level) or by_width, not both")
        for name in ("sigma", "by_width", "strength", "bias", "override"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, _checked_keys(value, name))
            elif name == "override" or (name == "by_width" and value is not None):
                keys = "levels or widths" if name == "override" else "widths to sigma"
                raise TypeError(f"{name} must map {keys}, got {type(value).__name__}")
        if not isinstance(self.stat, str) or self.stat not in STATS:
            raise ValueError(
                f"stat must be one of {', '.join(map(repr, STATS))}, got {self.stat!r}"
            )
        for key, kind in self.override.items():
            if not isinstance(kind, str) or kind not in OVERRIDE_MAPS:
                raise ValueError(
                    f"override must be 'identity' or 'uniform', got {kind!r} for {key}"
                )
        for name in ("clamp_negative", "include_init"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{name} must be True or False, got {type(getattr(self, name)).__name__}"
                )
        for bias in self.bias.values() if isinstance(self.bias, Mapping) else [self.bias]:
            if bias is not None:
                _check_bias(bias)
        check_steps(self.steps)
        self._check_regularizations()

    def _check_regularizations(self) -> None:
        biased = self._biased_keys()
        if isinstance(self.strength, Mapping) and set(self.strength) != biased:
            raise ValueError(
                f"strength must be keyed as sigma is, by {_listed(biased)}, "
                f"got {_listed(self.strength)}"
            )
        if not self.regularizations:  # made here so that what they are made of is checked, too
            raise ValueError(
                "the configuration regularizes nothing: give sigma, by_width, bias or override"
            )

    @classmethod
    def preset(cls, name: str) -> TARConfig:
        """Returns a configuration of the paper's code, such as ``"64D1"`` or ``"64D1_32D8"``.

        ``<width>D<sigma>``, joined by ``_``: σ = 1 at width 64, 8 at width 32; strength 1, steps 0
        to 13.

        Raises:
            TypeError, ValueError: The name is no text, or not of this form.
        """
        if not isinstance(name, str):
            raise TypeError(f"a preset must be a text, got {type(name).__name__}")
        by_width: dict[int, float] = {}
        for term in name.split("_"):
            match = _PRESET_TERM.fullmatch(term)
            if not match or int(match[1]) in by_width:
                raise ValueError(
                    "a preset must be <width>D<sigma>, joined by '_', each width once, such as "
                    f"'64D1' or '64D1_32D8', got {name!r}"
                )
            by_width[int(match[1])] = float(match[2])
        return cls(by_width=by_width, steps=PRESET_STEPS)

    @property
    def key(self) -> Literal["level", "width"]:
        """Whether the mappings are keyed by level or by width."""
        return "level" if self.by_width is None else "width"

    def key_of(self, layer: TemporalLayer, width: int | None) -> int | None:
        """Returns the level or width by which this may name a layer; None if by nothing.

        Args:
            layer: The layer.
            width: Of level 0 of the layer's model; None where it is not known.
        """
        if layer.level == "init" and not self.include_init:
            return None
        if self.key == "width":
            return width_at(layer.level, width)
        return 0 if layer.level == "init" else layer.level

    @property
    def regularizations(self) -> dict[int, Regularization]:
        """The change to the attention of the layers of each level or width."""
        found = {key: Regularization(bias=self._bias(key)) for key in self._biased_keys()}
        found |= {key: Regularization(override=kind) for key, kind in self.override.items()}
        return dict(sorted(found.items()))

    def _sigmas(self) -> Mapping[int, float]:
        if self.by_width is not None:
            return self.by_width
        if isinstance(self.sigma, Mapping):
            return self.sigma
        return {} if self.sigma is None else {0: self.sigma}

    def _biased_keys(self) -> set[int]:
        keys = set(self._sigmas())
        if isinstance(self.bias, Mapping):
            keys |= set(self.bias)
        elif self.bias is not None and not keys:
            keys = {0}
        return keys - set(self.override)

    def _bias(self, key: int) -> Bias:
        strength = self.strength[key] if isinstance(self.strength, Mapping) else self.strength
        weight: dict[str, Any] = {
            "strength": strength,
            "stat": self.stat,
            "clamp_negative": self.clamp_negative,
        }
        bias = self.bias.get(key) if isinstance(self.bias, Mapping) else self.bias
        return (
            GaussianBias(self._sigmas()[key], **weight) if bias is None else replace(bias, **weight)
        )

    def to_json(self) -> str:
        """Returns all fields as JSON; tables and matrices as nested lists.

        Raises:
            ValueError: ``steps`` is a callable, or a number is not finite.
            ImportError: ``pydantic`` is not installed.
        """
        if callable(self.steps):
            raise ValueError(
                "a configuration whose steps is a callable cannot be saved: give steps as an index "
                "or a share of the schedule, or set it after loading"
            )
        text = json.dumps(
            {item.name: _encode(getattr(self, item.name)) for item in fields(self)},
            allow_nan=False,
        )
        self.from_json(text)  # what cannot be read is not to be written
        return text

    @classmethod
    def from_json(cls, text: str) -> TARConfig:
        """Returns the configuration that :meth:`to_json` wrote.

        Fields that are left out have their defaults.

        Raises:
            ValueError: It is not JSON, or not a configuration; the message names the field.
            ImportError: ``pydantic`` is not installed.
        """
        require_pydantic()
        from vstar_kernels.models.config_json import read_fields

        return build(cls, read_fields(text))


def width_at(level: Level, width: int | None) -> int | None:
    """Returns the width at a level of a model whose level 0 has ``width``, None if not known."""
    if width is None:
        return None
    halvings = 0 if level == "init" else level
    return -(-width // 2**halvings)  # rounded up


def check_present(
    wanted: Iterable[int], present: Collection[int], kind: str, attention: str
) -> None:
    """Raises unless each level or width that is wanted is there.

    Args:
        wanted: What is wanted.
        present: What there is.
        kind: ``"level"`` or ``"width"``.
        attention: Whose levels or widths they are, for the message.

    Raises:
        ValueError: One is not.
    """
    for key in wanted:
        if key not in present:
            raise ValueError(
                f"no {attention} has {kind} {key}: the {kind}s are "
                f"{', '.join(map(str, sorted(present)))}"
            )


def checked_tar(name: str, config: Any, *, other: str = "None") -> TARConfig:
    """Returns a configuration, of a preset the one that it stands for.

    Args:
        name: Of the argument.
        config: What it was given.
        other: What else the argument takes, for the message.

    Raises:
        TypeError, ValueError: It is neither of them, or the preset is malformed.
    """
    if isinstance(config, str):
        return TARConfig.preset(config)
    if not isinstance(config, TARConfig):
        kind = type(config).__name__
        raise TypeError(f"{name} must be a TARConfig, a preset or {other}, got {kind}")
    return config


def _checked_keys(mapping: Mapping[int, T], name: str) -> dict[int, T]:
    for key in mapping:
        if isinstance(key, bool) or not isinstance(key, int) or key < 0:
            raise ValueError(f"{name} must be keyed by levels or widths (0, 1, …), got {key!r}")
    return dict(mapping)


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, ToeplitzBias | DenseBias):
        raise TypeError(
            f"bias must be a ToeplitzBias or a DenseBias, got {type(bias).__name__}"
            + (": give its sigma instead" if isinstance(bias, GaussianBias) else "")
        )
    for name, default in _DEFAULT_WEIGHT.items():
        if getattr(bias, name) is not default and getattr(bias, name) != default:
            raise ValueError(
                f"give {name} to TARConfig, not to its bias, which has "
                f"{name}={getattr(bias, name)!r}"
            )


def _listed(keys: Any) -> str:
    return ", ".join(map(str, sorted(keys))) or "nothing"


def _encode(value: Any) -> Any:
    """Returns the value of a field as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if not isinstance(value, ToeplitzBias | DenseBias):
        return value
    entries = value.entries.detach().cpu()
    dtype = str(entries.dtype).removeprefix("torch.")
    if isinstance(value, DenseBias):
        return {"form": "dense", "delta": entries.tolist(), "dtype": dtype}
    table = {"table": entries.tolist(), "signed": value.signed}
    return {"form": "toeplitz", **table, "dtype": dtype}
