"""The JSON of a :class:`TARConfig`, which is read strictly: its form, a pydantic model.

Only functions import this file: it needs pydantic, and the package does not.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from torch import Tensor

from vstar_kernels.attention.bias import STATS, Bias, DenseBias, ToeplitzBias
from vstar_kernels.models.layers import Override
from vstar_kernels.reading import FormatError, decode, hidden, validate

T = TypeVar("T")
# Where a field may have one of several forms, a tag says which it has, and errors are of that one.
ONE, KEYED = hidden("one"), hidden("keyed")
INDEX, SHARE = hidden("index"), hidden("share")
DEPTHS = NUMBERS, ROWS, TABLES = hidden("numbers"), hidden("rows"), hidden("tables")


def _read_key(name: Any) -> int:
    """Returns a level or width, only as it is written, so that no two keys are the same number."""
    if not isinstance(name, str) or not re.fullmatch("0|[1-9][0-9]{0,17}", name):
        raise ValueError("it must be keyed by levels or widths (0, 1, …)")
    return int(name)


def _one_or_keyed(value: Any) -> str:
    return KEYED if isinstance(value, dict) and "form" not in value else ONE


def _index_or_share(value: Any) -> str:
    return INDEX if isinstance(value, int) else SHARE


def _depth(value: Any) -> str:
    """Returns how deep lists are nested, as far as their first entries tell."""
    depth = 0
    while depth < 2 and isinstance(value, list) and value and isinstance(value[0], list):
        value, depth = value[0], depth + 1
    return DEPTHS[depth]


Number = Annotated[float, Field(allow_inf_nan=False)]
Key = Annotated[int, BeforeValidator(_read_key)]
Keyed = dict[Key, T]
OneOrKeyed = Annotated[
    Annotated[T, Tag(ONE)] | Annotated[Keyed[T], Tag(KEYED)], Discriminator(_one_or_keyed)
]
Steps = Annotated[
    Annotated[int, Tag(INDEX)] | Annotated[Number, Tag(SHARE)], Discriminator(_index_or_share)
]
List = Annotated[list[T], Field(fail_fast=True)]
Entries = Annotated[
    Annotated[List[Number], Tag(NUMBERS)]
    | Annotated[List[List[Number]], Tag(ROWS)]
    | Annotated[List[List[List[Number]]], Tag(TABLES)],
    Discriminator(_depth),
]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class StrictForm(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ToeplitzForm(StrictForm):
    """A :class:`ToeplitzBias`."""

    form: Literal["toeplitz"]
    table: Entries
    signed: bool = False
    dtype: Dtype = "float32"


class DenseForm(StrictForm):
    """A :class:`DenseBias`."""

    form: Literal["dense"]
    delta: Entries
    dtype: Dtype = "float32"


BiasForm = Annotated[ToeplitzForm | DenseForm, Field(discriminator="form")]


class ConfigForm(StrictForm):
    """A :class:`TARConfig`; the defaults are its own."""

    sigma: OneOrKeyed[Number] | None = None
    by_width: Keyed[Number] | None = None
    strength: OneOrKeyed[Number] = 1.0
    steps: Steps | None = None
    bias: OneOrKeyed[BiasForm] | None = None
    stat: Literal[STATS] = "row_max"  # type: ignore[valid-type]
    clamp_negative: bool = False
    override: Keyed[Override] = {}
    include_init: bool = False


def read_fields(text: str) -> dict[str, Any]:
    """Returns the fields that a JSON text gives, of the types that :class:`TARConfig` takes.

    Raises:
        FormatError: They are not of the form; the message names the field by its path.
    """
    form = validate(ConfigForm, decode(text))
    fields = {name: getattr(form, name) for name in form.model_fields_set}
    bias = fields.get("bias")
    if isinstance(bias, dict):
        fields["bias"] = {key: _make_bias(bias[key], f"bias.{key}") for key in bias}
    elif bias is not None:
        fields["bias"] = _make_bias(bias, "bias")
    return fields


def _make_bias(form: ToeplitzForm | DenseForm, path: str) -> Bias:
    try:
        if isinstance(form, DenseForm):
            return DenseBias(_make_tensor(form.delta, form.dtype))
        return ToeplitzBias(_make_tensor(form.table, form.dtype), signed=form.signed)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def _make_tensor(entries: Any, dtype: str) -> Tensor:
    try:
        tensor = torch.tensor(entries, dtype=torch.float64).to(getattr(torch, dtype))
    except ValueError:
        raise ValueError("lists must be of equal lengths") from None
    if not tensor.isfinite().all():
        raise ValueError(f"there are numbers that are too large for {dtype}")
    return tensor
