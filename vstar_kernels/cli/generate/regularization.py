"""What regularizes a video: the options of it, and what they come to on a model of some kind.

``{"sigma": 2}`` is a ``TARConfig`` of a UNet and a ``FrameTAR`` of a full-3D transformer. The model
is not there yet when options are read, so that they are read as every kind that they fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import create_mutex_group

from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.cli.options import CommandError, number, option, parsed
from vstar_kernels.documents import Document
from vstar_kernels.methods.pipelines import is_full3d
from vstar_kernels.methods.vstar.vstar import FULL3D_DEFAULT, PAPER
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.reading import FormatError, decode, read_text, shorten

Config = TARConfig | FrameTAR | FrameRule
KINDS: tuple[type[Config], ...] = (TARConfig, FrameTAR, FrameRule)
# What configurations of a kind alone have, by which one that is of none is told to be of it.
OWN_FIELDS: dict[type[Config], set[str]] = {FrameRule: {"terms"}, FrameTAR: {"layers", "heads"}}
OF_FULL3D = (FrameTAR, FrameRule)  # in the order of preference
DEFAULTS: dict[type[Config], Config] = {TARConfig: PAPER, FrameTAR: FULL3D_DEFAULT}
SHOWN = 60  # characters of an option's value
# Options that change a configuration, and its fields.
CHANGES = {"sigma": "sigma", "strength": "strength", "tar_steps": "steps"}

one_config = create_mutex_group(required=False, title="temporal attention regularization: one of")


@dataclass(frozen=True)
class ConfigText(Document):
    """A configuration in JSON, of a kind that need not be known yet.

    Attributes:
        text: The JSON, which is one of some kind.
    """

    text: str

    def to_json(self) -> str:
        """Returns the configuration as the first kind that it is of writes it.

        So two spellings of one are the same in the key of a job.
        """
        return next(iter(_configs(self.text)[0].values())).to_json()

    @classmethod
    def from_json(cls, text: str) -> ConfigText:
        """Takes a text.

        Raises:
            ValueError: It is a configuration of no kind; the message names the field.
        """
        _configs(text)
        return cls(text)


def _sigma(text: str) -> Any:
    """Reads σ: a number, or a JSON object of one for each level."""
    allowed = "a finite number of at least 0, or a JSON object of one for each level"
    value = _field(TARConfig, "sigma", text, allowed)
    return {k: float(x) for k, x in value.items()} if isinstance(value, dict) else float(value)


def _steps(text: str) -> int | float:
    """Reads the last step, or a share of them."""
    allowed = "the index of a step from 0, or a share of the steps above 0.0, to 1.0"
    value: int | float = _field(FrameTAR, "steps", text, allowed)
    return value


def _field(kind: type[Config], name: str, text: str, allowed: str) -> Any:
    """Returns a value in JSON that a field of a kind may have; null is none, but no change of it.

    Raises:
        ValueError: It may not; the message says what is allowed.
    """
    try:
        value = decode(text)
        if value is not None:
            kind.from_json(json.dumps({name: value}))
            return value
    except ValueError:
        pass
    raise ValueError(f"must be {allowed}, got {shorten(text, SHOWN)}")


@dataclass(frozen=True)
class RegularizationOptions:
    """Temporal attention regularization (TAR)."""

    preset: Annotated[
        str | None,
        one_config,
        option(
            "NAME",
            default="sigma 1 at the finest level in the first 56 percent of the steps; none for "
            "--method grid and starvid",
        ),
    ] = None
    """Such as 64D1_32D8: sigma 1 at width 64 and 8 at width 32, in steps 0 to 13. Full-3D
    transformers have none; their default is sigma 1 in the first 30 percent."""
    config: Annotated[Path | ConfigText | None, one_config, parsed(Path, "FILE"), option()] = None
    """JSON that TARConfig.save wrote; for a full-3D transformer FrameTAR.save, or FrameRule.save of
    any rule between frames."""
    no_tar: Annotated[bool, one_config] = False
    """Sample without it: the baseline, or with stages synopsis prompting alone."""
    sigma: Annotated[Any, parsed(_sigma, "X"), option(default="that of the configuration")] = None
    """Sigma in frames, of a full-3D transformer in latent ones; of a UNet at the finest level, or
    JSON by level: {"0": 1, "1": 8}."""
    strength: Annotated[
        float | None, parsed(number, "X"), option(default="that of the configuration")
    ] = None
    """Factor on the bias."""
    tar_steps: Annotated[
        int | float | None, parsed(_steps, "N"), option(default="that of the configuration")
    ] = None
    """The last step with TAR; or a share of the steps, such as 0.56."""
    extend_positions: bool = False
    """Allow more frames than AnimateDiff or Latte have positions for."""

    def __post_init__(self) -> None:
        """Raises CommandError for a preset that is none, and for changes of nothing."""
        try:
            if self.preset is not None:
                TARConfig.preset(self.preset)
        except ValueError as error:
            raise CommandError(f"--preset: {error}") from error
        if self.no_tar and self.changes:
            raise CommandError(f"{self.changed} cannot go with --no-tar")

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the configuration that options change."""
        given = {name: getattr(self, option) for option, name in CHANGES.items()}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def changed(self) -> str:
        """The options that change the configuration, as the command has them."""
        given = [name for name in CHANGES if getattr(self, name) is not None]
        return " and ".join(f"--{name.replace('_', '-')}" for name in given)


@dataclass(frozen=True)
class Regularization:
    """What the options come to, all files read.

    Attributes:
        of_kinds: The configuration of each kind that the options are of, or why it cannot be
            changed as they say. Empty where there is to be none.
        origin: What they name, as messages have it; empty where they name none.
        changed: The options that change it, likewise.
        reasons: Why it is of none of the other kinds, where it may have been meant to be.
    """

    of_kinds: Mapping[type[Config], Config | str]
    origin: str = ""
    changed: str = ""
    reasons: Mapping[type[Config], str] = field(default_factory=dict)

    @classmethod
    def read(cls, options: RegularizationOptions) -> Regularization:
        """Reads what the options name.

        Raises:
            CommandError: It cannot be read, or comes to a configuration of no kind.
        """
        if options.no_tar:
            return cls({})
        written, origin = dict(DEFAULTS), ""
        reasons: Mapping[type[Config], str] = {}
        if options.preset is not None:
            written = {TARConfig: TARConfig.preset(options.preset)}
            origin = f"--preset {options.preset}"
        if (config := options.config) is not None:
            origin = "--config" if isinstance(config, ConfigText) else f"--config {config}"
            try:
                text = config.text if isinstance(config, ConfigText) else read_text(config)
                written, reasons = _configs(text)
            except OSError as error:
                raise CommandError(f"{origin}: {error.strerror or error}") from error
            except ValueError as error:
                raise CommandError(f"{origin}: {error}") from error
        found = {kind: _changed(config, options.changes) for kind, config in written.items()}
        if all(isinstance(x, str) for x in found.values()):
            raise CommandError(f"{options.changed}: {next(iter(found.values()))}")
        return cls(found, origin, options.changed, reasons)

    def of_model(self, pipe: Any) -> Config | None:
        """Returns the configuration of a pipeline's kind; None where there is to be none.

        Raises:
            CommandError: They come to none of its kind.
        """
        kinds = OF_FULL3D if is_full3d(pipe) else (TARConfig,)
        return self._first(kinds, f"a {type(pipe).__name__}")

    def of_method(self, method: str) -> TARConfig | None:
        """Returns the TARConfig of a method that has none by default.

        Raises:
            CommandError: They come to none.
        """
        if not self.origin and not self.changed:
            return None
        found = self._first((TARConfig,), method)
        assert found is None or isinstance(found, TARConfig)
        return found

    def _first(self, kinds: tuple[type[Config], ...], whose: str) -> Config | None:
        if not self.of_kinds:
            return None
        found = [self.of_kinds[kind] for kind in kinds if kind in self.of_kinds]
        if not found:
            reason = self.reasons.get(kinds[0])
            raise CommandError(
                f"{self.origin} is a {_names(self.of_kinds)}, and {whose} takes a {_names(kinds)}"
                + (f"; as a {kinds[0].__name__}: {reason}" if reason else "")
            )
        if configs := [x for x in found if not isinstance(x, str)]:
            return configs[0]
        raise CommandError(f"{self.changed}: {whose} takes a {_names(kinds)}, and {found[0]}")


def _names(kinds: Iterable[type[Config]]) -> str:
    return " or a ".join(kind.__name__ for kind in kinds)


def _configs(text: str) -> tuple[dict[type[Config], Config], dict[type[Config], str]]:
    """Returns a text as each kind that it is of, at least one, and why it is not of the others.

    There are no reasons where its fields say what it was meant to be.

    Raises:
        ValueError: It is of none; the message is of the one that its fields speak for.
    """
    found: dict[type[Config], Config] = {}
    reasons: dict[type[Config], str] = {}
    for kind in KINDS:
        try:
            found[kind] = kind.from_json(text)
        except (ValueError, TypeError) as error:
            reasons[kind] = str(error)
    fields = decode(text)
    given = set(fields) if isinstance(fields, dict) else set()
    meant = next((kind for kind, own in OWN_FIELDS.items() if own & given), None)
    if not found:
        raise FormatError(reasons[meant or TARConfig])
    return found, {} if meant else reasons


def _changed(config: Config, changes: Mapping[str, Any]) -> Config | str:
    """Returns a configuration with some fields changed, or why they cannot be."""
    if not changes:
        return config
    if isinstance(config, FrameRule):
        return f"{', '.join(changes)} can be changed of TAR alone"
    if "sigma" in changes and getattr(config, "bias", None) is not None:
        return "sigma cannot be changed of a configuration that has a bias instead"
    fields = {**decode(config.to_json()), **changes}
    if "sigma" in changes and "by_width" in fields:
        fields["by_width"] = None  # the same σ, by widths
    try:
        return type(config).from_json(json.dumps(fields))
    except (ValueError, TypeError) as error:
        return str(error)
