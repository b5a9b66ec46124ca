"""The cells of the report's tables: figures as text, a dash where there is none."""

from __future__ import annotations

from benchmarks.report import figures
from benchmarks.results import Record


def shape(record: Record) -> str:
    """The sizes, and what else tells a case apart."""
    return " × ".join(map(str, record.case.shape)) + _extra(record)


def _extra(record: Record) -> str:
    threads, latents = record.case.threads, record.case.latents
    if latents:
        return f", latents {latents[0]} × {latents[1]}"
    return f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""


def peer(record: Record, name: str) -> str:
    """How many times as long as the kernels a peer takes, or why it has no time."""
    value = figures.ratio(record, name)
    if value is not None:
        return f"{times(value)} {record.peers[name].note}".strip()
    return record.peers[name].status if name in record.peers else "–"


def bound(record: Record) -> str:
    """Which of the two makes the floor."""
    case = record.case
    if not (case.bytes and case.flops and record.bandwidth and record.rate):
        return "–"
    return "memory" if case.bytes / record.bandwidth > case.flops / record.rate else "arithmetic"


def milliseconds(seconds: float | None) -> str:
    """Without the unit."""
    return "–" if seconds is None else _three_digits(seconds * 1e3)


def mebibytes(record: Record, name: str) -> str:
    """A peer's peak memory, without the unit."""
    peak = record.peers[name].peak_bytes if name in record.peers else None
    return "–" if peak is None else _three_digits(peak / 2**20)


def _three_digits(value: float) -> str:
    """At least."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share."""
    return "–" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{value:.2f}×"
