"""A configuration's fields as JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vstar_kernels.attention.bias import DenseBias, ToeplitzBias

KEYED = ("sigma", "by_width", "strength", "bias", "override")
FORMS: dict[str, tuple[str, ...]] = {
    "toeplitz": ("form", "values", "dtype", "signed"),
    "dense": ("form", "values", "dtype"),
}


def dumps(fields: Mapping[str, Any]) -> str:
    """JSON of the fields of a configuration.

    Raises:
        ValueError: A number is not finite, for which JSON has no notation.
    """
    return json.dumps({name: _encode(value) for name, value in fields.items()}, allow_nan=False)


def loads(text: str, *, allowed: Sequence[str]) -> dict[str, Any]:
    """The fields back, those that are there.

    Raises:
        ValueError: It is not a JSON object, or it has a key that is not allowed.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"a configuration must be a JSON object, got {type(fields).__name__}")
    _check_keys(fields, allowed, "the configuration")
    return {
        name: _decode(value, name) if name in KEYED else value for name, value in fields.items()
    }


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, ToeplitzBias | DenseBias):
        values = value.entries.detach().cpu()
        common = {"values": values.tolist(), "dtype": str(values.dtype).removeprefix("torch.")}
        if isinstance(value, DenseBias):
            return {"form": "dense", **common}
        return {"form": "toeplitz", **common, "signed": value.signed}
    return value


def _decode(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        return value
    if "form" in value:
        return _decode_bias(value)
    for key in value:
        if not key.isdecimal():
            raise ValueError(f"{name} must be keyed by levels or widths (0, 1, …), got {key!r}")
    return {int(key): _decode(item, name) for key, item in value.items()}


def _decode_bias(value: dict[str, Any]) -> ToeplitzBias | DenseBias:
    form = value["form"]
    if form not in FORMS:
        raise ValueError(f"a bias's form must be one of {', '.join(FORMS)}, got {form!r}")
    _check_keys(value, FORMS[form], f"a {form} bias")
    if "values" not in value:
        raise ValueError(f"a {form} bias needs values")
    dtype = getattr(torch, str(value.get("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a bias's dtype must be one of torch's, got {value['dtype']!r}")
    values = torch.tensor(value["values"], dtype=dtype)
    if form == "dense":
        return DenseBias(values)
    return ToeplitzBias(values, signed=value.get("signed", False))


def _check_keys(fields: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    for key in fields:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} in {what}: allowed are {', '.join(allowed)}")
