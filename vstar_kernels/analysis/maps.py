"""Mean attention maps, and what a set of them shows (VSTAR, Figs. 3, 4, 10, S.10 and S.13)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from vstar_kernels.attention import dispatch
from vstar_kernels.attention.bias import Bias, GaussianBias
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.attention.frames.layout import Frames, Layout
from vstar_kernels.attention.frames.operation import frame_attention
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.attention.temporal import tar_attention

Level = int | Literal["init"]
Place = Literal["down", "mid", "up", "init", "blocks"]
Axis = Literal["model", "level", "place", "step", "branch"]
M = TypeVar("M")
AXES: tuple[Axis, ...] = ("model", "level", "place", "step", "branch")

MAP_ELEMENTS = 2**24  # of the attention maps that the reference holds at a time: 64 MiB


@dataclass
class AttentionMap:
    """The mean attention map A′ of one layer at one step.

    Attributes:
        model: The model's name in its pipeline; empty for a model by itself.
        layer, level, place: The layer's name and where it is, as of :class:`TemporalLayer`.
        step: The index of the denoising step; None where it is not known.
        timestep: What the model was given.
        map: ``(batch, frames, frames)``, float32, on the CPU unless the capture is differentiable:
            the mean over heads and positions. A row is a query's frame and adds up to 1. Under
            classifier-free guidance the batch's first half is the unconditional one.
        positions: Of how many positions (of height × width) the mean is.
        calls: Of how many forward passes it is: FreeInit, for one, repeats its steps.
        branch: The side of classifier-free guidance where the model is called for each (lvdm's
            samplers): 0 with the prompt, 1 without; elsewhere 0.
        heads: ``(batch, heads, frames, frames)``, each head's own map; None unless asked for.
    """

    model: str
    layer: str
    level: Level
    place: Place
    step: int | None
    timestep: float
    map: Tensor
    positions: int
    calls: int = 1
    branch: int = 0
    heads: Tensor | None = field(default=None, kw_only=True)

    def add(self, other: AttentionMap) -> None:
        """Takes the map of one more forward pass into the mean.

        Raises:
            ValueError: It is of another size.
        """
        if other.map.shape != self.map.shape:
            raise ValueError(
                f"the map of {self.layer} has been {tuple(self.map.shape)} (batch, frames, frames) "
                f"and is now {tuple(other.map.shape)}: clear() the capture between videos of other "
                "sizes"
            )
        self.calls += 1
        self.map = self._mean(self.map, other.map)
        if self.heads is not None and other.heads is not None:
            self.heads = self._mean(self.heads, other.heads)

    def _mean(self, mean: Tensor, new: Tensor) -> Tensor:
        return mean + (new - mean) / self.calls


@dataclass
class FrameMap(AttentionMap):
    """The mean map between the frames of one layer at one step, each frame of many tokens.

    It is of a full-3D transformer, whose ``level`` is 0 and ``place`` is ``"blocks"``, or of an
    image UNet that sees a grid of frames. ``map`` is the mean over heads and over the tokens of a
    query's frame, of the weight on all tokens of a key's frame. A row adds up to 1 less what goes
    to text, which a grid has none of. ``positions`` is of how many tokens of the largest frame the
    mean is.

    Attributes:
        text: ``(batch, frames)``, the weight on tokens that belong to no frame.
        heads: ``(batch, heads, frames, frames + 1)``, each head's own map with text in the last
            column, as ``frame_attention(…, map_heads=True)`` returns it; None unless asked for.
        coordinates: Of the frames in the order of the maps, that of the sequence: the time in
            latent frames, as a rule.
    """

    text: Tensor = field(kw_only=True)
    coordinates: tuple[float, ...] = field(kw_only=True)

    @property
    def with_text(self) -> Tensor:
        """``(batch, frames, frames + 1)``: text in the last column, so that rows add up to 1."""
        return torch.cat([self.map, self.text[..., None]], dim=-1)

    def add(self, other: AttentionMap) -> None:
        """Takes the map of one more forward pass into the mean.

        Raises:
            ValueError: It is of another size, or of frames at other times.
        """
        assert isinstance(other, FrameMap)
        if other.coordinates != self.coordinates:
            raise ValueError(
                f"the map of {self.layer} has been of frames at {_listed(self.coordinates)} and is "
                f"now of frames at {_listed(other.coordinates)}: clear() the capture between "
                "videos of other sizes"
            )
        super().add(other)
        self.text = self._mean(self.text, other.text)


def _listed(coordinates: tuple[float, ...]) -> str:
    shown = [f"{x:g}" for x in coordinates]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-4:]])


def mean_map(
    query: Tensor,
    key: Tensor,
    bias: Bias | None,
    scale: float,
    *,
    heads: bool = False,
    max_rows: int,
) -> tuple[Tensor, int]:
    """Returns the mean of A′ over positions and heads, and the number of positions that it is of.

    These are all positions where a kernel gives maps; else some at equal distances, by the
    reference. The map is ``(batch, frames, frames)``, or ``(batch, heads, frames, frames)``.

    Args:
        query, key: ``(batch, positions, frames, heads, head_dim)``.
        bias, scale: As for :func:`vstar_kernels.tar_attention`.
        heads: Whether to return the map of each head.
        max_rows: How many rows (batch × positions) the reference takes at most, but at least one
            position of each batch element.
    """
    batch, positions, frames, num_heads, _ = query.shape
    options: dict[str, Any] = {"scale": scale, "return_map": True, "map_heads": heads}
    if _has_kernel(query, key, bias, options):
        return tar_attention(query, key, key, bias, **options)[1], positions
    count = min(positions, max(1, max_rows // batch))
    chosen = (2 * torch.arange(count) + 1) * positions // (2 * count)
    by_head = (num_heads,) if heads else ()
    total = query.new_zeros(batch, *by_head, frames, frames, dtype=torch.float32)
    for chunk in chosen.split(max(1, MAP_ELEMENTS // (batch * num_heads * frames**2))):
        index = chunk.to(query.device)
        q, k = query[:, index], key[:, index]
        _, weights = tar_attention(q, k, k, _at(bias, index), **options, backend="reference")
        total += weights * (len(chunk) / count)
    return total, count


def _at(bias: Bias | None, index: Tensor) -> Bias | None:
    """Returns the bias of some positions only."""
    if bias is None or not isinstance(bias.stat, Tensor):
        return bias
    return replace(bias, stat=bias.stat[:, index])


def _has_kernel(query: Tensor, key: Tensor, bias: Bias | None, options: dict[str, Any]) -> bool:
    """Returns whether a backend that is not the reference gives the map."""
    why_not = dispatch.why_not(query, key, key, bias, **options)
    return any(not reasons for name, reasons in why_not.items() if name != "reference")


def frame_map(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    *,
    key_layout: Layout | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    heads: bool = False,
    max_rows: int,
) -> tuple[Tensor, int]:
    """Returns the map between frames, and of how many tokens of the largest frame it is the mean.

    These are all where a kernel gives maps; else some of each frame at equal distances, by the
    reference, unless the rule asks for places within a frame.

    Args:
        query: ``(batch, tokens, heads, head_dim)``.
        key: ``(batch, keys, key_heads, head_dim)``.
        layout, rule, key_layout, key_lengths, scale: As for
            :func:`vstar_kernels.frame_attention`.
        heads: Whether to return the map of each head.
        max_rows: How many rows (batch × tokens) the reference takes at most, but at least one
            token of each frame and each batch element.

    Returns:
        ``(batch, frames, key frames + 1)``, or ``(batch, heads, frames, key frames + 1)``.
    """
    options: dict[str, Any] = {"key_lengths": key_lengths, "scale": scale}
    options |= {"return_map": True, "map_heads": heads}
    largest = max(layout.frame_tokens, default=0)
    if rule is not None and rule.is_identity:
        return frame_attention(query, key, key, layout, rule, key_layout=key_layout, **options)[
            1
        ], largest
    call = check_call(query, key, key, layout, rule, key_layout=key_layout, **options)
    reasons = dispatch.FRAME_ATTENTION.why_not(call)
    has_kernel = any(not why for name, why in reasons.items() if name != "reference")
    count = max(1, max_rows // (call.batch * max(1, layout.frames)))
    by_place = call.band is not None or call.factor_span is not None
    if has_kernel or by_place or count >= largest:
        backend = None if has_kernel else "reference"
        return frame_attention(
            query, key, key, layout, rule, key_layout=key_layout, backend=backend, **options
        )[1], largest
    index, kept = _some_tokens(layout, count)
    if rule is not None and isinstance(rule.stat, Tensor):
        rule = replace(rule, stat=rule.stat[:, index.to(query.device)])
    return frame_attention(
        query[:, index.to(query.device)],
        key,
        key,
        kept,
        rule,
        key_layout=layout if key_layout is None else key_layout,
        backend="reference",
        **options,
    )[1], count


def _some_tokens(layout: Layout, count: int) -> tuple[Tensor, Layout]:
    """Returns the places of at most ``count`` tokens of each frame, and the layout of these."""
    places: list[Tensor] = []
    kept: list[Frames] = []
    for frame, coordinate in enumerate(layout.coordinates):
        runs = [torch.arange(run.start, run.end) for run in layout.runs if run.frame == frame]
        tokens = torch.cat(runs)
        chosen = min(count, len(tokens))
        places.append(tokens[(2 * torch.arange(chosen) + 1) * len(tokens) // (2 * chosen)])
        kept.append(Frames(1, chosen, first=coordinate))
    return torch.cat(places), Layout(*kept)


def find_maps(maps: Iterable[M], **wanted: Any) -> list[M]:
    """Returns the maps whose attributes are what is wanted, None being anything.

    Raises:
        ValueError: There is none; it says what there is.
    """
    maps = list(maps)
    asked = {name: value for name, value in wanted.items() if value is not None}
    found = [m for m in maps if all(getattr(m, name) == value for name, value in asked.items())]
    if found:
        return found
    if asked.get("branch") == 0:
        asked.pop("branch")  # most models have no other
    what = ", ".join(f"{name} {value}" for name, value in asked.items()) or "any layer"
    there = (
        f"{'branches' if name == 'branch' else f'{name}s'} "
        + (", ".join(sorted({str(getattr(m, name)) for m in maps})) or "none")
        for name in wanted
    )
    raise ValueError(f"no map of {what} was captured: there are {'; '.join(there)}")


class HoldsMaps(Protocol):
    """A holder of attention maps, such as :class:`vstar_kernels.MapCapture`."""

    @property
    def maps(self) -> Sequence[AttentionMap]:
        """Each the map of one layer at one step."""


@dataclass(frozen=True, eq=False)
class MeanMap:
    """The mean of some layers' attention maps.

    Attributes:
        map: ``(batch, frames, frames)``; rows are queries.
        model, level, place, step, branch: Which ones it is of; None is all of them.
        layers: Of how many layers at how many steps it is the mean.
    """

    map: Tensor
    model: str | None = None
    level: Level | None = None
    place: Place | None = None
    step: int | None = None
    layers: int = 1
    branch: int | None = None

    @property
    def label(self) -> str:
        """The part of a model and the step that it is of, such as "level 0, up, step 13"."""
        parts = [self.model] if self.model else []
        parts += [] if self.level is None else [_level_name(self.level)]
        parts += [self.place] if self.place and self.place != self.level else []
        parts += [] if self.step is None else [f"step {self.step}"]
        parts += [f"branch {self.branch}"] if self.branch else []
        return ", ".join(parts) or "all layers"


def mean_maps(
    maps: HoldsMaps | Iterable[AttentionMap],
    by: Sequence[Axis] = ("level", "place", "step", "branch"),
) -> list[MeanMap]:
    """Returns the mean map of each level, place, step and branch there is (Figs. 3, 10, S.10).

    >>> [(item.level, item.step) for item in vk.analysis.mean_maps(capture, by=("level", "step"))]
    [(0, 0), (0, 13), (1, 0), (1, 13)]

    Args:
        maps: What :func:`vstar_kernels.capture_maps` or :func:`vstar_kernels.capture_real_maps`
            gave, or some of its maps.
        by: What to keep apart: any of ``"model"``, ``"level"``, ``"place"``, ``"step"`` and
            ``"branch"``, the side of guidance.

    Returns:
        In the order of levels (``"init"`` first), places as the layers run, and steps.

    Raises:
        ValueError: There are no maps, or ``by`` has another name in it.
    """
    for axis in by:
        if axis not in AXES:
            raise ValueError(f"by must be of {', '.join(map(repr, AXES))}, got {axis!r}")
    groups: dict[tuple[Any, ...], list[AttentionMap]] = {}
    found = maps if isinstance(maps, Iterable) else maps.maps
    for item in found:
        groups.setdefault(tuple(getattr(item, axis) for axis in by), []).append(item)
    if not groups:
        raise ValueError("maps holds no attention map: was the model run under capture_maps?")
    means = [
        MeanMap(
            torch.stack([item.map for item in items]).mean(0),
            **dict(zip(by, key, strict=True)),
            layers=len(items),
        )
        for key, items in groups.items()
    ]
    # Layers are captured in the order in which they run, and sorting keeps that of places.
    return sorted(means, key=lambda item: (_level_order(item.level), item.step or 0))


def min_max(matrix: Tensor) -> Tensor:
    """Puts each matrix on 0 to 1, as the paper shows maps; on 0 if all its elements are equal."""
    low, high = matrix.amin((-2, -1), keepdim=True), matrix.amax((-2, -1), keepdim=True)
    span = high - low
    return torch.where(span > 0, (matrix - low) / span.clamp(min=torch.finfo(span.dtype).tiny), 0)


def diagonalness(maps: Tensor) -> Tensor:
    """Returns the correlation of query and key frame, each pair weighted by its attention.

    It is 1 for the identity, 0 for uniform attention and for a single frame, −1 for the reversed
    identity. It is computed in float64.

    Args:
        maps: ``(…, frames, frames)``, not negative.

    Returns:
        ``(…,)``.

    Raises:
        TypeError, ValueError: ``maps`` is not of that kind or shape.
    """
    maps = _checked(maps)
    weights = maps.double()
    weights = weights / weights.sum((-2, -1), keepdim=True)
    frame = torch.arange(maps.shape[-1], dtype=torch.float64, device=maps.device)
    rows, columns = weights.sum(-1), weights.sum(-2)
    row = frame - (rows * frame).sum(-1, keepdim=True)
    column = frame - (columns * frame).sum(-1, keepdim=True)
    covariance = (weights * row[..., :, None] * column[..., None, :]).sum((-2, -1))
    variances = (rows * row.square()).sum(-1) * (columns * column.square()).sum(-1)
    scale = variances.sqrt()
    return torch.where(scale > 0, covariance / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0)


def map_penalty(map: Tensor, target: Tensor) -> Tensor:
    """Returns how far maps are from a target: the mean of the Frobenius norms ‖map − target‖.

    It is the distance of VSTAR's eq. 6, and what its §5 suggests as a loss in training. Gradients
    flow into maps that are in autograd's graph: ``return_map=True`` of the operations, and
    ``capture_maps(…, differentiable=True)``.

    Args:
        map: ``(…, queries, keys)``.
        target: Of the same last two sizes; those before must broadcast to the map's.

    Returns:
        A number, in float32 at least.

    Raises:
        TypeError, ValueError: An argument is no tensor, of integers, or their shapes do not fit.
    """
    for name, value in (("map", map), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.ndim < 2 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point (…, queries, keys), got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
    shape, wanted = tuple(map.shape), tuple(target.shape)
    fits = len(wanted) <= len(shape) and shape[-2:] == wanted[-2:]
    fits = fits and all(
        w in (1, s) for w, s in zip(wanted[:-2][::-1], shape[:-2][::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"target must broadcast to the map's shape {shape}, got {wanted}")
    wide = torch.promote_types(map.dtype, torch.float32)
    return torch.linalg.matrix_norm(map.to(wide) - target.to(map.device, wide)).mean()


def band_share(maps: Tensor, half_width: int = 1) -> Tensor:
    """Returns the share of the attention that goes to frames at most ``half_width`` away, of 1.

    Args:
        maps: ``(…, frames, frames)``, whose rows add up to 1.
        half_width: In frames, at least 0.

    Returns:
        ``(…,)``.

    Raises:
        TypeError, ValueError: ``maps`` is not of that kind or shape, or ``half_width`` is negative.
    """
    maps = _checked(maps)
    if half_width < 0:
        raise ValueError(f"half_width must be at least 0 frames, got {half_width}")
    return (maps * (_distances(maps) <= half_width)).sum(-1).mean(-1)


def band_width(maps: Tensor) -> Tensor:
    """Returns how far attention reaches: the root mean square of |j − i| under it, in frames.

    It is 0 for the identity; σ for a Gaussian of σ frames, away from the ends of a long video.

    Args:
        maps: ``(…, frames, frames)``, whose rows add up to 1.

    Returns:
        ``(…,)``.

    Raises:
        TypeError, ValueError: ``maps`` is not of that kind or shape.
    """
    maps = _checked(maps)
    return (maps * _distances(maps).square()).sum(-1).mean(-1).sqrt()


@dataclass(frozen=True, eq=False)
class MapFigures:
    """Figures of one :class:`MeanMap`, each ``(batch,)``.

    Attributes:
        source: What they are of.
        diagonalness: See :func:`diagonalness`.
        band_share: Of the attention within ``half_width`` frames.
        band_width: In frames.
        half_width: In frames.
    """

    source: MeanMap
    diagonalness: Tensor
    band_share: Tensor
    band_width: Tensor
    half_width: int


def map_figures(means: Iterable[MeanMap], half_width: int = 1) -> list[MapFigures]:
    """Returns how diagonal and how wide each map is.

    Args:
        means: From :func:`mean_maps`.
        half_width: In frames, for :func:`band_share`.
    """
    return [
        MapFigures(
            item,
            diagonalness(item.map),
            band_share(item.map, half_width),
            band_width(item.map),
            half_width,
        )
        for item in means
    ]


def delta_matrices(
    deltas: Sequence[float] | Mapping[str, Bias], num_frames: int
) -> dict[str, Tensor]:
    """Returns Δ for several σ (Fig. S.13), or of biases by name, each as ``.matrix()`` gives it.

    Args:
        deltas: Values of σ in frames, or biases by name.
        num_frames: N.

    Raises:
        ValueError: ``num_frames`` is less than 1, or a bias cannot serve it.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if not isinstance(deltas, Mapping):
        deltas = {f"σ = {sigma:g}": GaussianBias(sigma) for sigma in deltas}
    return {name: bias.matrix(num_frames) for name, bias in deltas.items()}


def _checked(maps: Any) -> Tensor:
    """Returns maps in floating point; raises for what is none, or would be repeated to be one."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps must be a torch.Tensor, got {type(maps).__name__}")
    if maps.ndim < 2 or maps.shape[-2] != maps.shape[-1] or maps.is_complex():
        raise ValueError(
            f"maps must be real (…, frames, frames), got {maps.dtype} of shape {tuple(maps.shape)}"
        )
    return maps if maps.is_floating_point() else maps.float()


def _distances(maps: Tensor) -> Tensor:
    frame = torch.arange(maps.shape[-1], device=maps.device)
    return (frame[:, None] - frame).abs()


def _level_order(level: Level | None) -> int:
    return -1 if level == "init" or level is None else int(level)


def _level_name(level: Level) -> str:
    return "init" if level == "init" else f"level {level}"
