"""A run's file: JSON lines, the first says what is measured on what, each other holds one case.

Every line is written when its case ends, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from benchmarks.cases import Case
from vstar_kernels.cli.options import CommandError
from vstar_kernels.reading import FormatError, decode, format_error, read_bytes, shorten

SCHEMA = 1
MEASURED = "measured"
# Why a peer has no times.
UNAVAILABLE, REFUSED, FAILED, WRONG = "unavailable", "refused", "failed", "wrong"
# More of all cores' time than a quiet machine's own chores take.
DISTURBING_SHARE = 0.1


class ResultsError(CommandError):
    """A file is not a run of these benchmarks, or does not allow what is asked of it."""


@dataclass(frozen=True)
class Task:
    """A case, and the allocator setting of the process that measures it."""

    case: Case
    allocator: str

    @property
    def key(self) -> str:
        """Returns the case's key, told apart by allocator."""
        return f"{self.case.key}/{self.allocator}-allocator" if self.allocator else self.case.key


@dataclass(frozen=True)
class Outcome:
    """What a peer did in one case: the seconds of each round, or why there are none."""

    status: str
    seconds: list[float] = field(default_factory=list)
    reason: str = ""
    note: str = ""
    largest_error: float | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Returns the median of the rounds, in seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Returns half the distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / statistics.median(self.seconds)


@dataclass(frozen=True)
class Record(Task):
    """A measured task. ``yardsticks`` are seconds of a copy and of matrix products, by round."""

    peers: dict[str, Outcome]
    yardsticks: dict[str, list[float]] = field(default_factory=dict)
    bandwidth: float | None = None  # bytes per second
    flops_per_second: Annotated[float | None, Field(alias="rate")] = None
    # The share of all cores' time that other processes took meanwhile.
    disturbance: Annotated[float | None, Field(alias="others")] = None
    failure: str = ""  # why the whole case has no figures

    @property
    def disturbed(self) -> bool:
        """Returns whether others took so much of the processor that the times say little."""
        return self.disturbance is not None and self.disturbance > DISTURBING_SHARE

    @property
    def floors(self) -> dict[str, float]:
        """Returns the least seconds at the measured bandwidth and at the matrix products' speed."""
        case = self.case
        if not (case.bytes and case.flops and self.bandwidth and self.flops_per_second):
            return {}
        return {
            "memory": case.bytes / self.bandwidth,
            "arithmetic": case.flops / self.flops_per_second,
        }

    @property
    def floor(self) -> float | None:
        """Returns the larger of the floors, in seconds."""
        return max(self.floors.values(), default=None)

    def median(self, peer: str) -> float | None:
        """Returns a peer's median seconds, if it has any."""
        return self.peers[peer].median if peer in self.peers else None

    def floor_over_time(self, peer: str) -> float | None:
        """Returns 1 for a peer as fast as a copy or PyTorch's matrix product, less for slower."""
        median = self.median(peer)
        return None if median is None or self.floor is None else self.floor / median


@dataclass(frozen=True)
class Plan:
    """All that a run measures, and how: enough to go on with it."""

    device: str
    threads: int
    isa: str | None
    peers: tuple[str, ...]
    rounds: int
    seconds: float
    unet_width: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Run:
    """A run as far as it has come. All but the records is a file's first line."""

    environment: dict[str, Any]
    plan: Plan
    records: list[Record] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def missing(self) -> list[Task]:
        """Returns what is still to be measured, in order."""
        done = {record.key for record in self.records}
        return [task for task in self.plan.tasks if task.key not in done]


RUN, RECORD = TypeAdapter(Run), TypeAdapter(Record)


def create(path: Path, environment: dict[str, Any], plan: Plan) -> None:
    """Begins a run's file; an existing one is not touched."""
    line = RUN.dump_json(Run(environment, plan), by_alias=True, exclude={"records"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(line + b"\n")
    except OSError as error:
        if isinstance(error, FileExistsError) and path.is_file():
            raise ResultsError(f"{path} exists; --resume goes on with it") from None
        raise ResultsError(f"cannot write {path}: {error}") from error


def append(path: Path, record: Record) -> None:
    """Adds a case that has ended."""
    line = RECORD.dump_json(record, by_alias=True)
    try:
        with path.open("ab") as file:
            file.write(line + b"\n")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error}") from error


def load(path: Path) -> Run:
    """Reads a run. A last line that an interruption left incomplete does not count.

    Raises:
        ResultsError: It is not such a file, or one of another schema.
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error}") from error
    first, *others = content.split(b"\n")[:-1] or [b""]  # what follows the last is empty or torn
    try:
        run: Run = _read_line(RUN, first, 1)
        keys = set()
        for number, line in enumerate(others, start=2):
            record: Record = _read_line(RECORD, line, number)
            if record.key in keys:
                raise FormatError(f"line {number}: {shorten(record.key)} is there twice")
            keys.add(record.key)
            run.records.append(record)
    except FormatError as error:
        raise ResultsError(f"{path} is not a run of these benchmarks: {error}") from None
    return run


def _read_line(adapter: TypeAdapter[Any], line: bytes, number: int) -> Any:
    try:
        decoded = decode(line.decode())
        schema = decoded.get("schema", SCHEMA) if isinstance(decoded, dict) else SCHEMA
        if schema != SCHEMA:
            shown = shorten(repr(schema), 40)
            raise FormatError(f"it has schema {shown}, this program reads schema {SCHEMA}")
        # As JSON, where lists may be tuples and objects dataclasses.
        return adapter.validate_json(json.dumps(decoded), strict=True)
    except UnicodeDecodeError:
        raise FormatError(f"line {number}: it is not UTF-8") from None
    except FormatError as error:
        raise FormatError(f"line {number}: {error}") from None
    except ValidationError as error:
        raise FormatError(f"line {number}: {format_error(error)}") from None
