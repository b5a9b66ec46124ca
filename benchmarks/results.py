"""A run's file: JSON lines, the first says what is measured on what, each other holds one case.

Every line is written when its case ends, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.disturbance import MUCH

SCHEMA = 1
MEASURED = "measured"
# Why a peer has no times.
UNAVAILABLE, REFUSED, FAILED, WRONG = "unavailable", "refused", "failed", "wrong"


class ResultsError(Exception):
    """A file that is not such a run."""


@dataclass(frozen=True)
class Task:
    """A case, and the allocator setting that its process has."""

    case: Case
    allocator: str

    @property
    def key(self) -> str:
        """As :attr:`Case.key`, told apart by allocator."""
        return f"{self.case.key}/{self.allocator}-allocator" if self.allocator else self.case.key


@dataclass(frozen=True)
class Outcome:
    """A peer in one case: seconds of each round, or why there are none."""

    status: str
    seconds: list[float] = field(default_factory=list)
    reason: str = ""
    note: str = ""
    largest_error: float | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / statistics.median(self.seconds)


@dataclass(frozen=True)
class Record:
    """A case's line. ``yardsticks`` are seconds of a copy and of matrix products, round by round.

    ``others`` is the share of the processor's time that other processes took meanwhile. ``failure``
    says why the whole case has no figures.
    """

    task: Task
    peers: dict[str, Outcome]
    yardsticks: dict[str, list[float]] = field(default_factory=dict)
    bandwidth: float | None = None  # bytes per second
    rate: float | None = None  # floating-point operations per second
    others: float | None = None
    failure: str = ""

    @property
    def disturbed(self) -> bool:
        """Others took so much of the processor that the times are worth little."""
        return self.others is not None and self.others > MUCH

    @property
    def case(self) -> Case:
        """What was measured."""
        return self.task.case

    @property
    def floor(self) -> float | None:
        """Seconds that the case takes at least at the measured bandwidth and rate."""
        case = self.case
        if not (case.bytes and case.flops and self.bandwidth and self.rate):
            return None
        return max(case.bytes / self.bandwidth, case.flops / self.rate)

    def median(self, peer: str) -> float | None:
        """A peer's seconds, if it has any."""
        return self.peers[peer].median if peer in self.peers else None

    def share_of_floor(self, peer: str) -> float | None:
        """The floor over a peer's time: 1 is as fast as a copy or PyTorch's matrix product."""
        median = self.median(peer)
        return None if median is None or self.floor is None else self.floor / median

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        data = {**vars(self), "peers": {name: vars(x) for name, x in self.peers.items()}}
        del data["task"]
        return {"case": self.case.to_json(), "allocator": self.task.allocator, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that :meth:`to_json` described."""
        rest = {
            name: data[name] for name in ("yardsticks", "bandwidth", "rate", "others", "failure")
        }
        peers = {name: Outcome(**x) for name, x in data["peers"].items()}
        return cls(Task(Case.from_json(data["case"]), data["allocator"]), peers, **rest)


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

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        tasks = [{"case": x.case.to_json(), "allocator": x.allocator} for x in self.tasks]
        return {**vars(self), "tasks": tasks}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_json` described."""
        tasks = tuple(Task(Case.from_json(x["case"]), x["allocator"]) for x in data["tasks"])
        return cls(**{**data, "tasks": tasks, "peers": tuple(data["peers"])})


@dataclass(frozen=True)
class Run:
    """A run as far as it has come."""

    environment: dict[str, Any]
    plan: Plan
    records: list[Record]

    @property
    def missing(self) -> list[Task]:
        """What is still to be measured, in order."""
        done = {record.task.key for record in self.records}
        return [task for task in self.plan.tasks if task.key not in done]


def create(path: Path, environment: dict[str, Any], plan: Plan) -> None:
    """Begin a run's file; an existing one is not touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": SCHEMA, "environment": environment, "plan": plan.to_json()}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
    except FileExistsError:
        raise ResultsError(f"{path} exists; --resume goes on with it") from None


def append(path: Path, record: Record) -> None:
    """Add a case that has ended."""
    line = json.dumps(record.to_json()) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def load(path: Path) -> Run:
    """Read a run. A last line that an interruption left incomplete does not count.

    Raises:
        ResultsError: It is not such a file, or one of another schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"cannot read {path}: {error}") from error
    complete = lines[:-1]  # what follows the last newline is empty or torn
    try:
        header, *rest = map(json.loads, complete)
        schema = header["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not a run of these benchmarks: {error!r}") from None
    if schema != SCHEMA:
        raise ResultsError(f"{path} has schema {schema}, this program reads schema {SCHEMA}")
    records = [Record.from_json(data) for data in rest]
    return Run(header["environment"], Plan.from_json(header["plan"]), records)


def drop_torn_line(path: Path) -> None:
    """Cut off what an interruption left of a line, so that the next begins a new one."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        with path.open("r+b") as file:
            file.truncate(end)
