"""Checks what methods are called with: a wrong kind is a TypeError, a wrong value a ValueError."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises TypeError or ValueError unless it is an integer within limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {_shown(value)}")


def check_seconds(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, got {type(value).__name__}")
    try:
        is_length = 0 < value < math.inf and float(value) > 0
    except OverflowError:
        is_length = False
    if not is_length:
        raise ValueError(f"{name} must be more than 0 seconds, and finite, got {_shown(value)}")


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError unless it is one of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_text(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless it is a text that says something and can be saved."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value[:20]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{name} must hold no halves of characters, got {half!r}") from None


def _shown(value: int | float) -> str:
    """Returns a number for a message, of which Python writes no more than 4,300 digits."""
    is_long = isinstance(value, int) and value.bit_length() > 100
    return "one of more than 30 digits" if is_long else str(value)
