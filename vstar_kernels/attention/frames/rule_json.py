"""The JSON of a :class:`FrameRule`, which is read strictly: its form, made from its terms' fields.

Only functions import this file: it needs pydantic, and the package does not. It stands beside the
rules, in the layer of attention, because ``vstar_kernels.reading`` stands below that.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model
from torch import Tensor

from vstar_kernels.attention.frames.rules import STATS, FrameRule
from vstar_kernels.attention.frames.terms import Term, pairs
from vstar_kernels.reading import FormatError, build, decode, hidden, shorten, validate

T = TypeVar("T")
DEPTHS = ROWS, TABLES = hidden("rows"), hidden("tables")
Number = Annotated[float, Field(allow_inf_nan=False)]
List = Annotated[list[T], Field(fail_fast=True)]
Entry = Number | None  # None: −inf, which JSON has no number for


def _depth(value: Any) -> str:
    """Returns how deep lists are nested, as far as their first entries tell."""
    inner = value[0] if isinstance(value, list) and value else None
    inner = inner[0] if isinstance(inner, list) and inner else None
    return TABLES if isinstance(inner, list) else ROWS


Entries = Annotated[
    Annotated[List[List[Entry]], Tag(ROWS)] | Annotated[List[List[List[Entry]]], Tag(TABLES)],
    Discriminator(_depth),
]
FORMS: dict[Any, Any] = {  # of a term's fields
    float: Number,
    float | None: Number | None,
    tuple[tuple[float, float], ...]: List[List[Number]],
    Tensor: Entries,
}


class _Strict(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _form(term: type[Any]) -> Any:
    """Returns the form of a kind of terms: its name and its fields, all of them."""
    hints = get_type_hints(term)
    names = [x.name for x in dataclasses.fields(term)]
    fields: dict[str, Any] = {name: (FORMS.get(hints[name], hints[name]), ...) for name in names}
    fields["term"] = (Literal[_name(term)], ...)
    return create_model(term.__name__, __base__=_Strict, **fields)


def _name(term: type[Any]) -> str:
    """Returns a kind of terms as JSON has it."""
    return term.__name__.lower()


KINDS: dict[str, Any] = {_name(term): term for term in get_args(Term)}
TermForm: Any = Annotated[
    Union[tuple(map(_form, KINDS.values()))],  # noqa: UP007
    Field(discriminator="term"),
]


class RuleForm(_Strict):
    """A :class:`FrameRule`; the defaults are its own."""

    terms: List[TermForm] = []
    stat: Literal[STATS] = "none"  # type: ignore[valid-type]
    clamp_negative: bool = False


def write(rule: FrameRule) -> str:
    """Returns a rule as JSON.

    Raises:
        ValueError: Its statistic is a tensor, which belongs to one call.
    """
    if isinstance(rule.stat, Tensor):
        raise ValueError(
            f"a rule whose stat is a tensor (of shape {tuple(rule.stat.shape)}) cannot be saved: "
            "it belongs to one call"
        )
    terms = [
        {"term": _name(type(term))}
        | {x.name: _encode(getattr(term, x.name)) for x in dataclasses.fields(term)}
        for term in rule.terms
    ]
    fields = {"terms": terms, "stat": rule.stat, "clamp_negative": rule.clamp_negative}
    return json.dumps(fields, allow_nan=False)


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _encode(value.detach().float().tolist())
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return None if value == -math.inf else value


def read(text: str) -> FrameRule:
    """Returns the rule that a JSON text is.

    Raises:
        FormatError: It is not of the form; the message names the field by its path.
    """
    form = validate(RuleForm, decode(text))
    terms = tuple(_make_term(term, f"terms[{i}]") for i, term in enumerate(form.terms))
    fields = {"terms": terms, "stat": form.stat, "clamp_negative": form.clamp_negative}
    return build(FrameRule, fields)


def _make_term(form: Any, path: str) -> Term:
    values = {name: getattr(form, name) for name in type(form).model_fields if name != "term"}
    try:
        if "table" in values:
            values["table"] = _make_tensor(values["table"])
        values = {name: pairs(x, name) if isinstance(x, list) else x for name, x in values.items()}
        made: Term = KINDS[form.term](**values)
        return made
    except (TypeError, ValueError) as error:
        raise FormatError(shorten(f"{path}: {error}")) from None


def _make_tensor(entries: Any) -> Tensor:
    def numbers(x: Any) -> Any:
        return (
            [numbers(item) for item in x] if isinstance(x, list) else -math.inf if x is None else x
        )

    try:
        given = torch.tensor(numbers(entries), dtype=torch.float64, device="cpu")
    except ValueError:
        raise ValueError("the lists of a table must be of equal lengths") from None
    table = given.float()
    if bool((table.isinf() & given.isfinite()).any()):
        raise ValueError("the table has numbers that are too large for float32")
    return table
